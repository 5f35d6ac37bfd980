"""The audio model's decoder as a reader: against transformers' own decoder, and against all texts there are."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests import tiny
from tests.tiny import READER_END, READER_START
from voxlm_hf import VoxLMForSpeechSeq2Seq, reader_voxlm
from voxlm_hf.reader_voxlm import BeamSearch, ReaderHypothesis, plain_piece, token_table


@torch.no_grad()
def test_scores_are_those_of_transformers_decoder():
    reader, (states, mask) = tiny.with_reader().reader, tiny.encoder_states(9, 5)
    ids = torch.tensor([[READER_START, 4, 9, 7], [READER_START, 5, 5, 6]])
    logits = reader.teacher_force(states, mask, ids)
    for row, length in enumerate((9, 5)):
        keys = torch.cat([states[row, :length], reader.end])[None]
        expected = reader.decoder(input_ids=ids[row : row + 1], encoder_hidden_states=keys).last_hidden_state
        expected = expected[0] @ reader.decoder.embed_tokens.weight.T
        spelt = torch.isfinite(logits[row])
        assert spelt.sum(-1).tolist() == [41] * 4  # forty words and the end
        torch.testing.assert_close(logits[row][spelt], expected[spelt], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_wide_search_finds_every_text_with_its_probability(monkeypatch):
    monkeypatch.setattr(reader_voxlm, "BEAM_MARGIN", 1e9)
    monkeypatch.setattr(reader_voxlm, "MAX_HYPOTHESES", 1000)
    reader, (states, mask) = tiny.with_reader("abc", num_beams=30).reader, tiny.encoder_states(7, 4)
    for row, n_best in enumerate(reader(states, mask, [3, 3])):
        everything = {}
        for length in range(3):
            for text in itertools.product((3, 4, 5), repeat=length):
                ids = torch.tensor([[READER_START, *text, READER_END]])
                logprobs = reader.teacher_force(states[row : row + 1], mask[row : row + 1], ids).log_softmax(-1)[0]
                everything[text] = float(sum(logprobs[place, token] for place, token in enumerate([*text, READER_END])))
        for hypothesis in n_best:
            if hypothesis.ended:
                assert hypothesis.logprob == pytest.approx(everything.pop(tuple(hypothesis.ids)), abs=1e-4)
        assert not everything


def greedy(reader, states, mask, budget):
    """The ids that the decoder prefers one by one."""
    ids = [READER_START]
    while len(ids) <= budget:
        token = int(reader.teacher_force(states, mask, torch.tensor([ids]))[0, -1].argmax())
        if token == READER_END:
            break
        ids.append(token)
    return ids[1:]


@pytest.mark.parametrize("row, budget", [(0, 6), (2, 4)])
@torch.no_grad()
def test_a_search_with_one_beam_is_greedy(row, budget):
    reader, (states, mask) = tiny.with_reader(num_beams=1).reader, tiny.encoder_states(9, 5, 7)
    one = states[row : row + 1], mask[row : row + 1]
    assert reader(*one, [budget])[0][0].ids == greedy(reader, *one, budget)


@torch.no_grad()
def test_hypotheses_do_not_depend_on_the_batch():
    reader, (states, mask) = tiny.with_reader().reader, tiny.encoder_states(9, 5, 7)
    together = reader(states, mask, [6, 3, 4])
    for row, budget in enumerate((6, 3, 4)):
        length = int(mask[row].sum())
        (alone,) = reader(states[row : row + 1, :length], mask[row : row + 1, :length], [budget])
        assert [text.ids for text in alone] == [text.ids for text in together[row]]
        assert [text.logprob for text in alone] == pytest.approx([text.logprob for text in together[row]], abs=1e-4)


@torch.no_grad()
def test_without_a_budget_there_is_nothing_to_propose():
    reader, (states, mask) = tiny.with_reader().reader, tiny.encoder_states(9, 5)
    assert reader(states, mask, [4, 0])[1] == [ReaderHypothesis([], [], ended=False)]


def search_by(rule, budget: int, vocabulary: int = 40, spell=None) -> list[ReaderHypothesis]:
    """The n-best list of a search in which `rule` maps a text to the log-probabilities `{token: logprob}` of what follows."""
    search = BeamSearch(3, budget, spell)
    while search.open:
        logprobs = torch.full((len(search.open), vocabulary), -50.0)
        for row, text in enumerate(search.open):
            for token, logprob in rule(text.ids).items():
                logprobs[row, token] = logprob
        search.advance(logprobs, READER_END)
    return search.n_best()


def test_half_a_recording_does_not_beat_the_whole():
    """Thirty tokens at -0.3 each are 9 nats less likely than the end after one of them."""

    def rule(ids):
        end = -0.1 if len(ids) == 30 else -3.0 if len(ids) == 1 else -20.0
        return {READER_END: end} if len(ids) == 30 else {3 + len(ids): -0.3, READER_END: end}

    best = search_by(rule, 60)[0]
    assert best.ids == list(range(3, 33)) and best.logprob == pytest.approx(30 * -0.3 - 0.1)


def test_a_loop_scores_no_more_than_what_it_repeats():
    """Saying six tokens again costs next to nothing, and may end as well as what was said once."""

    def rule(ids):
        return {3 + len(ids) % 6: -0.01, READER_END: -0.7 if ids and len(ids) % 6 == 0 else -20.0}

    assert search_by(rule, 120)[0].ids == [3, 4, 5, 6, 7, 8]


# Tokens of a search that compares texts by their words.
PIECES = {3: " he", 4: " said", 5: "", 6: " sad", 7: " sat", 8: " he"}


def test_variants_of_one_text_take_no_places():
    """Three beams, and "he" with and without a capital or a comma is likelier than other words; all of them end alike."""

    def rule(ids):
        words = [token for token in ids if token != 5]
        if len(words) == 2:
            return {READER_END: -0.1}
        if not words:
            return {3: -0.5, 8: -1.0}
        return {4: -1.0, 6: -2.5, 7: -3.0} | ({} if 5 in ids else {5: -0.2})

    plain, by_words = (search_by(rule, 5, spell=spell) for spell in (None, PIECES.get))
    heard = [
        [{tuple(PIECES[token] for token in text.ids if token != 5) for text in found[:-1]}]
        for found in (plain, by_words)
    ]
    assert by_words[0].logprob == max(text.logprob for text in plain)
    assert [len(texts) for (texts,) in heard] == [2, 3]


def test_a_likelier_variant_replaces_one_that_is_ahead():
    """ "He, said" comes a step after "he said", and is likelier."""
    rules = {(): {3: -0.1}, (3,): {5: -0.3, 4: -2.0}, (3, 5): {4: -0.1}}
    found = search_by(lambda ids: rules.get(tuple(ids), {READER_END: -0.1}), 5, spell=PIECES.get)
    assert [text.ids for text in found[:-1]] == [[3, 5, 4]]


def test_words_are_as_likely_as_all_their_variants():
    """ "he said" with two spellings of "he", with and without a comma, in every order of events."""
    first, comma, end = {3: -0.5, 8: -1.0}, {4: -1.2, 5: -0.4}, {READER_END: -0.1}
    rules = {(): first} | {(one,): comma for one in first} | {(one, 5): {4: -0.2} for one in first}
    (found, _) = search_by(lambda ids: rules.get(tuple(ids), end), 5, spell=PIECES.get)
    said = np.logaddexp(-1.2, -0.4 - 0.2)
    assert found.logprob + found.variants == pytest.approx(np.logaddexp(-0.5, -1.0) + said - 0.1, abs=1e-3)


def test_the_likeliest_text_goes_on_though_another_with_its_words_was_likelier():
    rules = {(): {3: -0.1}, (3,): {4: -0.5, 5: -1.0}, (3, 4): {7: -40.0}, (3, 5): {4: -0.1}}
    found = search_by(lambda ids: rules.get(tuple(ids), {READER_END: -0.1}), 5, spell=PIECES.get)
    assert found[0].ids == [3, 5, 4]


@pytest.mark.parametrize(
    "text, piece",
    [(" The", " the"), (",", ""), (" -", ""), (" “", ""), ("'s", "'s"), (" '", ""), ("’t", "'t"), ("well-known", "well known"),
     (" $5", " 5"), ("É", "é"), ("你", "你"), ("a\ufffd", "<9>")],
)  # fmt: skip
def test_what_a_token_adds_to_the_words(text, piece):
    assert plain_piece(text, 9) == piece


def test_the_empty_text_comes_last_with_its_probability():
    empty = search_by(lambda ids: {3: -0.1, READER_END: -0.2 if ids else -9.0}, 5)[-1]
    assert (empty.ids, empty.logprob) == ([], -9.0)


def test_a_text_that_the_budget_ends_has_not_ended():
    (best, _) = search_by(lambda ids: {3 + len(ids): -0.1}, 4)
    assert best.ids == [3, 4, 5, 6] and not best.ended


def followed(*tokens):
    text = ReaderHypothesis([], [])
    for token in tokens:
        text = text.followed_by(token, -0.1)
    return text


def test_repeated_runs_are_no_novel_tokens():
    """In "no, no, no, no" (3 4 3 4 ...) a run of four is there again from the sixth token on."""
    text = followed(3, 4, 3, 4, 3, 4, 3)
    assert text.novel_tokens == 2 and text.repeating and text.logprob == pytest.approx(-0.7)


def test_a_text_without_repetition_is_novel_throughout():
    text = followed(3, 4, 5, 3, 4, 6)
    assert text.novel_tokens == 6 and not text.repeating


def test_a_hypothesis_ends_by_itself_or_by_its_budget():
    assert followed(3).finished(-0.5).logprob == pytest.approx(-0.6)
    assert not followed(3).finished(ended=False).ended


# In a model


def test_saved_and_loaded_it_proposes_the_same(tmp_path):
    model = tiny.with_reader()
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    clip = tiny.noise(1.3, 5)
    assert again.transcribe(clip).text == model.transcribe(clip).text
    assert not any(parameter.requires_grad for parameter in again.reader.decoder.parameters())


@pytest.fixture
def composed(tmp_path):
    """The folder of a tiny Whisper, its weights as transformers has them, and a model composed with it."""
    base = tiny.save_whisper(tmp_path)
    model = VoxLMForSpeechSeq2Seq.from_base_models(tmp_path / "audio", tmp_path / "text")
    return tmp_path / "audio", base, model.add_reader(tmp_path / "audio", end_frames=4)


def test_a_composed_model_gets_the_decoder_of_its_audio_model(composed):
    _, base, model = composed
    for name, tensor in base.get_decoder().state_dict().items():
        torch.testing.assert_close(model.reader.decoder.state_dict()[name], tensor)
    assert model.config.reader_config["prompt_ids"] == [0, 1, 0, 0]  # start, language, task, no timestamps


def test_the_audio_models_tokens_are_spelt_in_the_llms(composed):
    folder, _, model = composed
    ids = AutoTokenizer.from_pretrained(folder)(" the lazy dog, café", add_special_tokens=False)["input_ids"]
    flat = [token for group in model.reader.to_llm_tokens(ids) for token in group]
    assert model.processor.decode_text(flat) == " the lazy dog, café"


def test_special_and_suppressed_tokens_have_no_spelling(composed):
    assert composed[2].reader.to_llm_tokens([0, 1, 2, 10]) == [[], [], [], []]


def test_an_unknown_language_is_refused(composed):
    folder, _, model = composed
    with pytest.raises(ValueError, match="language 'xx'"):
        model.add_reader(folder, language="xx")


def test_bytes_of_a_character_are_spelt_one_by_one():
    tokens = tiny.tokenizer()
    table, offsets = token_table(tokens, tokens, [])
    ids = tokens("你好", add_special_tokens=False)["input_ids"]
    spelt = [token for one in ids for token in table[offsets[one] : offsets[one + 1]].tolist()]
    assert tokens.decode(spelt) == "你好"


def test_a_base_with_other_weights_is_refused(composed):
    folder, _, model = composed
    weights = load_file(folder / "model.safetensors")
    changed = {name: tensor + 0.1 if "encoder.layer_norm" in name else tensor for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not the audio model.*layer_norm"):
        model.add_reader(folder)


def test_an_audio_model_without_a_decoder_is_refused(tmp_path):
    model = tiny.model(encoder="wav2vec2")
    model.encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs an audio model of"):
        model.add_reader(tmp_path)


@pytest.mark.parametrize(
    "reader",
    [{"beams": 3}, {"prompt_ids": []}, {"prompt_ids": [1], "num_beams": 0}, {"prompt_ids": [1], "ctc_weight": 0.1}],
)
def test_settings_that_mean_nothing_are_refused(reader):
    with pytest.raises(ValueError, match="reader_config"):
        tiny.config(reader_config=reader)
