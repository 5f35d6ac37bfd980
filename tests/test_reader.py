"""The audio model's decoder as a reader, against transformers' own and against all texts counted out; choosing by three."""

import itertools
import json

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, WhisperForConditionalGeneration

from hub_export.export import export
from tests import tiny
from tests.test_ctc import frames_of
from training.reader import train_reader
from training.train import run
from voxlm_hf import VoxLMForSpeechSeq2Seq, joint_voxlm, reader_voxlm
from voxlm_hf.ctc_voxlm import ANYTHING, CTCFrames, CTCPrefix, read_frames, text_logprobs
from voxlm_hf.decoding_voxlm import DecodedText
from voxlm_hf.joint_voxlm import Candidate, candidates_of, joint_decode, score_texts
from voxlm_hf.reader_voxlm import Reading, spelling_table
from voxlm_hf.transcription_voxlm import prompt_with_audio, read_states


START = 1


def with_reader(letters: str = "", **settings) -> VoxLMForSpeechSeq2Seq:
    """A tiny model with a random reader whose token 3 + i writes the i-th of `letters` (by default words of the LLM's tokenizer)."""
    tokens = tiny.tokenizer()
    words = tokens(list(letters), add_special_tokens=False)["input_ids"] if letters else [[n] for n in range(260, 300)]
    settings = {"prompt_ids": [START], "eos_token_id": 2, "end_frames": 3, "num_beams": 4, **settings}
    settings["spelling_size"] = sum(map(len, words))
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.3, reader_config=settings)
    lengths = [0, 0, 0] + [len(word) for word in words]
    lengths += [0] * (model.config.audio_config.vocab_size - len(lengths))
    model.reader.spelling = torch.tensor([token for word in words for token in word], dtype=torch.int32)
    model.reader.spelling_offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    torch.manual_seed(1)
    for parameter in model.reader.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def states_of(*lengths: int):
    """Random encoder states of a batch and their mask."""
    torch.manual_seed(2)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return torch.randn(len(lengths), max(lengths), 16), mask


@torch.no_grad()
def test_scores_are_those_of_transformers_decoder():
    model = with_reader()
    reader, (states, mask) = model.reader, states_of(9, 5)
    ids = torch.tensor([[START, 4, 9, 7], [START, 5, 5, 6]])
    logits = reader.teacher_forced(states, mask, ids)
    for row, length in enumerate((9, 5)):
        keys = torch.cat([states[row, :length], reader.end])[None]
        expected = reader.decoder(input_ids=ids[row : row + 1], encoder_hidden_states=keys).last_hidden_state
        expected = expected[0] @ reader.decoder.embed_tokens.weight.T
        spelt = torch.isfinite(logits[row])
        assert spelt.sum(-1).tolist() == [41] * 4  # forty words and the end
        torch.testing.assert_close(logits[row][spelt], expected[spelt], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_wide_search_finds_the_likeliest_of_all_texts(monkeypatch):
    monkeypatch.setattr(reader_voxlm, "BEAM_MARGIN", 1e9)
    monkeypatch.setattr(reader_voxlm, "MOST_READINGS", 1000)
    reader, (states, mask) = with_reader("abc", num_beams=30).reader, states_of(7, 4)
    found = reader(states, mask, [3, 3])
    for row, readings in enumerate(found):
        everything = {}
        for length in range(3):
            for text in itertools.product((3, 4, 5), repeat=length):
                ids = torch.tensor([[START, *text, 2]])
                logprobs = reader.teacher_forced(states[row : row + 1], mask[row : row + 1], ids).log_softmax(-1)[0]
                everything[text] = float(sum(logprobs[place, token] for place, token in enumerate([*text, 2])))
        for reading in readings:
            if reading.ended:
                assert reading.logprob == pytest.approx(everything.pop(tuple(reading.ids)), abs=1e-4)
        assert not everything


@torch.no_grad()
def test_a_narrow_search_is_greedy_and_the_batch_does_not_matter():
    reader, (states, mask) = with_reader(num_beams=1).reader, states_of(9, 5, 7)
    together = reader(states, mask, [6, 0, 4])
    assert together[1] == [Reading([], [], ended=False)]
    for row, budget in ((0, 6), (2, 4)):
        (alone,) = reader(
            states[row : row + 1, : int(mask[row].sum())], mask[row : row + 1, : int(mask[row].sum())], [budget]
        )
        assert [reading.ids for reading in together[row]] == [reading.ids for reading in alone]
        ids = [START]
        while len(ids) <= budget:
            logits = reader.teacher_forced(states[row : row + 1], mask[row : row + 1], torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert alone[0].ids == [token for token in ids[1:] if token != 2][:budget]


@torch.no_grad()
def test_the_llm_scores_texts_as_a_teacher_forced_pass_does():
    model = with_reader()
    inputs = model.processor.apply_transcription_request([tiny.noise(1.4, 2), tiny.noise(0.8, 3)])
    features = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    audio = model.get_audio_features(**features)
    prompt = prompt_with_audio(model, inputs, audio)
    texts = [[[5, 9, 11], [7], []], [[8, 8, 30, 31]]]
    candidates = [
        [Candidate(None, ids, ids, 0.0, True, torch.ones(len(ids), dtype=torch.bool)) for ids in row] for row in texts
    ]
    for row, scores in enumerate(score_texts(model, prompt, candidates)):
        for place, score in enumerate(scores):
            decoded = DecodedText(ids=[others[min(place, len(others) - 1)] for others in texts], ended=[True] * 2)
            read_states(model, prompt, decoded)
            ids = texts[row][place]
            torch.testing.assert_close(score.logprobs, decoded.logprobs[row, : len(ids)], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(score.states, decoded.states[row, : len(ids)], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(score.entropies, decoded.entropies[row, : len(ids)], atol=1e-4, rtol=1e-4)
            assert score.end_logprob < 0


@torch.no_grad()
def test_whole_texts_have_the_scores_of_growing_ones():
    model = with_reader()
    inputs = model.processor.apply_transcription_request([tiny.noise(1.5, 2)])
    features = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    (frames,) = read_frames(model, model.get_audio_features(**features))
    embeddings, texts = model.get_input_embeddings().weight, [[], [5], [5, 5, 9]]
    for text, score in zip(texts, text_logprobs(frames, embeddings, texts)):
        prefix = CTCPrefix(frames, embeddings)
        for token in text:
            prefix.score([token])
            prefix.append(token)
        assert score == pytest.approx(prefix.logprob + prefix.end_score(), abs=1e-3)


def test_candidates_keep_capitals_and_points_and_are_read_plainly():
    model = with_reader("Hi, yo.h", plain_text=True)
    # H i , _ y o  |  h i _ y o .
    first, second = [3, 4, 5, 6, 7, 8], [10, 4, 6, 7, 8, 9]
    readings = [Reading(first, [-0.5, -1.0, -9.0, -0.1, -0.2, -0.3], -0.1), Reading(second, [-2.0] * 6, -0.1)]
    (candidate,) = candidates_of(model, model.processor, readings)
    assert candidate.written.text == "Hi, yo" and candidate.written.words == ["Hi,", "yo"]
    assert model.processor.decode_text(candidate.ids) == "hi yo"
    assert candidate.written.reader_logprobs == pytest.approx([-1.5, -0.5])  # the comma is no part of the word
    assert candidate.reader_logprob == pytest.approx(np.logaddexp(readings[0].logprob, readings[1].logprob))
    letters = [model.processor.decode_text([token]).strip() for token in candidate.ids]
    assert [word for word, letter in zip(candidate.written.token_words, letters) if letter] == [0, 0, 1, 1][
        : sum(map(bool, letters))
    ]


@torch.no_grad()
def test_frames_alone_cannot_forbid_a_text_but_say_whether_there_was_speech(monkeypatch):
    model = with_reader(ctc_weight=0.1, word_bonus=0.0, llm_weight=0.0)
    inputs = model.processor.apply_transcription_request([tiny.noise(1.3, 5)])
    features = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    audio = model.get_audio_features(**features)
    prompt = prompt_with_audio(model, inputs, audio)
    readings = [Reading([4, 5], [-1.0, -1.0], -1.0), Reading([], [], -9.0)]
    monkeypatch.setattr(model.reader, "forward", lambda *inputs: [readings])
    for by_frames, expected in (([-1e9, -60.0], 2), ([-1e9, -2.0], 0), ([-30.0, -40.0], 2)):
        monkeypatch.setattr(joint_voxlm, "text_logprobs", lambda *inputs, scores=by_frames: scores)
        if expected == 0:  # the reader would have to be as unsure of words as of none
            readings[0].logprobs[:] = [-9.0, -9.0]
        assert len(joint_decode(model, model.processor, prompt, [8], audio).ids[0]) == expected
        readings[0].logprobs[:] = [-1.0, -1.0]
    # No text is what the frames read, but they read something.
    monkeypatch.setattr(joint_voxlm, "text_logprobs", lambda *inputs: [-60.0, -10.0])
    readings[0].logprobs[:] = [-9.0, -9.0]
    for heard, expected in ((4.0, 0), (40.0, 2)):
        monkeypatch.setattr(CTCFrames, "heard", heard)
        assert len(joint_decode(model, model.processor, prompt, [8], audio).ids[0]) == expected


def test_figures_are_taken_on_the_readers_word():
    model = with_reader("hi 18.", plain_text=True)
    (candidate,) = candidates_of(model, model.processor, [Reading([3, 4, 5, 6, 7, 8, 5, 3], [-1.0] * 8)])
    assert candidate.written.text == "hi 18. h"
    at_figures = [candidate.written.words[word] == "18." for word in candidate.written.token_words]
    assert candidate.known.tolist() == [not figures for figures in at_figures] and any(at_figures)
    assert candidate.plain.count(ANYTHING) == 1
    # Three frames that surely say 1, 2, 3 and any text with a place for what is not spelt.
    logits = torch.full((3, 5), -8.0)
    logits[range(3), [2, 3, 4]] = 8.0
    frames, _, embeddings = frames_of(logits)
    scores = text_logprobs(frames, embeddings, [[1, 2, 3], [1, ANYTHING], [ANYTHING], [1, 3], [2, ANYTHING]])
    assert scores[:3] == pytest.approx([0, 0, 0], abs=1e-3) and max(scores[3:]) < -10


def test_weights_decide_between_reader_llm_and_frames():
    model = with_reader()
    clip = tiny.noise(1.5, 4)
    inputs = model.processor.apply_transcription_request([clip])
    features = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    with torch.no_grad():
        audio = model.get_audio_features(**features)
        prompt = prompt_with_audio(model, inputs, audio)
        candidates = candidates_of(
            model, model.processor, model.reader(audio.last_hidden_state, audio.frame_mask, [8])[0]
        )
        (scores,) = score_texts(model, prompt, [candidates])
    assert len(candidates) > 1
    for weights, best in (
        ({"llm_weight": 0.0, "word_bonus": 0.0}, max(candidates, key=lambda text: text.reader_logprob)),
        (
            {"llm_weight": 1e6, "word_bonus": 0.0},
            candidates[int(np.argmax([score.logprob(text.known) for text, score in zip(candidates, scores)]))],
        ),
    ):
        model.config.reader_config.update(weights)
        chosen = joint_decode(model, model.processor, prompt, [8], audio)
        assert chosen.written[0].text == best.written.text and chosen.ids == [best.ids]


def test_the_text_does_not_depend_on_the_batch_nor_on_times():
    model = with_reader(word_bonus=1e3)
    model.reader.decoder.embed_tokens.weight.data[2] = 0  # the random end would be likelier than any word
    clips = [tiny.noise(seconds, 3) for seconds in (0.7, 2.0, 1.1)]
    together = model.transcribe(clips)
    assert all(result.text for result in together)
    assert [model.transcribe(clip).text for clip in clips] == [result.text for result in together]
    assert [result.text for result in model.transcribe(clips, return_timestamps=False)] == [
        one.text for one in together
    ]
    for result in together:
        assert " ".join(word["word"] for word in result.words).split() == result.text.split()
        times = [time for word in result.words for time in (word["start"], word["end"])]
        assert times == sorted(times) and 0 <= times[0] and times[-1] <= result.duration
        assert all({"logprob", "entropy", "reader"} == set(score) for score in result.word_scores)


def test_nothing_is_one_of_the_texts():
    model = with_reader(word_bonus=-1e6)
    (result,) = model.transcribe([tiny.noise(1.3, 5)])
    assert (result.text, result.words, result.truncated) == ("", [], False)


def test_saved_and_loaded_it_reads_the_same(tmp_path):
    model = with_reader()
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    clip = tiny.noise(1.3, 5)
    assert again.transcribe(clip).text == model.transcribe(clip).text
    assert not any(parameter.requires_grad for parameter in again.reader.decoder.parameters())


def whisper_base(folder) -> WhisperForConditionalGeneration:
    """A tiny Whisper as the Hub has them: weights, tokenizer, generation config."""
    tiny.save_bases(folder, "qwen2")
    tokens = tiny._bpe(["<|startoftranscript|>", "<|en|>", "<|endoftext|>"], 300)
    special = ["<|startoftranscript|>", "<|en|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<|endoftext|>", extra_special_tokens=special
    )
    config = tiny.config().audio_config
    config.vocab_size, config.eos_token_id, config.decoder_start_token_id = 300, 2, 0
    torch.manual_seed(3)
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():  # as it comes it would go on for ever; this one ends its texts
        model.model.decoder.embed_tokens.weight[2] *= 40
    model.save_pretrained(folder / "audio")
    tokenizer.save_pretrained(folder / "audio")
    GenerationConfig(
        decoder_start_token_id=0,
        no_timestamps_token_id=0,
        is_multilingual=True,
        lang_to_id={"<|en|>": 1},
        task_to_id={"transcribe": 0},
        suppress_tokens=[10],
    ).save_pretrained(folder / "audio")
    return model


def test_a_composed_model_gets_the_decoder_of_its_audio_model(tmp_path):
    base = whisper_base(tmp_path)
    model = VoxLMForSpeechSeq2Seq.from_base_models(tmp_path / "audio", tmp_path / "text")
    model.add_reader(tmp_path / "audio", end_frames=4)
    assert model.config.reader_config["prompt_ids"] == [0, 1, 0, 0]
    for name, tensor in base.get_decoder().state_dict().items():
        torch.testing.assert_close(model.reader.decoder.state_dict()[name], tensor)
    audio_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "audio")
    ids = audio_tokenizer(" the lazy dog, café", add_special_tokens=False)["input_ids"]
    flat = [token for piece in model.reader.spell(ids) for token in piece]
    assert model.processor.decode_text(flat) == " the lazy dog, café"
    assert model.reader.spell([0, 1, 2, 10]) == [[], [], [], []]
    with pytest.raises(ValueError, match="language 'xx'"):
        model.add_reader(tmp_path / "audio", language="xx")


def test_bytes_of_a_character_are_spelt_one_by_one():
    tokens = tiny.tokenizer()
    spelling, offsets = spelling_table(tokens, tokens, [])
    ids = tokens("你好", add_special_tokens=False)["input_ids"]
    spelt = [token for one in ids for token in spelling[offsets[one] : offsets[one + 1]].tolist()]
    assert tokens.decode(spelt) == "你好"


def test_training_teaches_the_end(tmp_path):
    whisper_base(tmp_path)
    model = VoxLMForSpeechSeq2Seq.from_base_models(tmp_path / "audio", tmp_path / "text")
    model.add_reader(tmp_path / "audio", end_frames=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clips = [tiny.noise(seconds, number) for number, seconds in enumerate((0.5, 0.8, 1.0))]
    losses = train_reader(model, clips, steps=30, learning_rate=0.05)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["reader.end"]


def test_a_recipe_adds_and_trains_a_reader_and_goes_on_after_it(tmp_path):
    whisper_base(tmp_path)
    rows = []
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", tiny.noise(0.6, number), tiny.RATE)
        rows.append(json.dumps({"audio": f"{number}.wav", "text": "the lazy dog"}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows))
    recipe = {
        "model": {"audio": str(tmp_path / "audio"), "text": str(tmp_path / "text")},
        "output": str(tmp_path / "runs"),
        "data": {"train": [{"manifest": str(tmp_path / "manifest.jsonl")}]},
        "stages": [
            {
                "kind": "reader",
                "base": str(tmp_path / "audio"),
                "settings": {"end_frames": 4},
                "steps": 2,
                "recordings": 2,
            }
        ],
    }
    first = VoxLMForSpeechSeq2Seq.from_pretrained(run(recipe))
    assert first.reader.end.any()
    again = VoxLMForSpeechSeq2Seq.from_pretrained(run(recipe))  # the finished stage is read
    for name in ("end", "spelling", "spelling_offsets"):
        torch.testing.assert_close(getattr(first.reader, name), getattr(again.reader, name))


def test_exports_hold_the_decoder_apart_and_a_delta_takes_it_from_its_base(tmp_path):
    whisper_base(tmp_path)
    bases = str(tmp_path / "audio"), str(tmp_path / "text")
    model = VoxLMForSpeechSeq2Seq.from_base_models(*bases).add_reader(bases[0], end_frames=4)
    clip = tiny.noise(1.0, 3)
    expected = model.transcribe(clip).text
    for mode, options in (("lora", {}), ("delta", {"bases": bases})):
        export(model, tmp_path / mode, mode, **options)
        assert (tmp_path / mode / "decoder.safetensors").exists() == (mode == "lora")
        assert VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / mode).transcribe(clip).text == expected
    export(model, tmp_path / "int8", "lora", storage="int8")
    stored = load_file(tmp_path / "int8" / "decoder.safetensors")
    assert stored["reader.decoder.layers.0.fc1.weight"].dtype == torch.int8
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "int8").reader.decoder.state_dict()
    for name, tensor in model.reader.decoder.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, atol=0.02, rtol=0.02)


def test_a_base_that_is_another_model_is_refused(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        whisper_base(folder)
    model = VoxLMForSpeechSeq2Seq.from_base_models(tmp_path / "one" / "audio", tmp_path / "one" / "text")
    weights = load_file(tmp_path / "other" / "audio" / "model.safetensors")
    changed = {name: tensor + 0.1 if "encoder.layer_norm" in name else tensor for name, tensor in weights.items()}
    save_file(changed, tmp_path / "other" / "audio" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not the audio model.*layer_norm"):
        model.add_reader(tmp_path / "other" / "audio")
    unlike = tiny.model(encoder="wav2vec2")
    unlike.encoder.save_pretrained(tmp_path / "wav2vec2")
    with pytest.raises(ValueError, match="needs an audio model of"):
        unlike.add_reader(tmp_path / "wav2vec2")


@pytest.mark.parametrize(
    "reader",
    [{"beams": 3}, {"prompt_ids": []}, {"prompt_ids": [1], "num_beams": 0}, {"prompt_ids": [1], "ctc_weight": 0.1}],
)
def test_settings_that_mean_nothing_are_refused(reader):
    with pytest.raises(StrictDataclassClassValidationError, match="reader_config"):
        tiny.config(reader_config=reader)


def search_by(rule, budget: int, vocabulary: int = 40) -> list[Reading]:
    """The readings of a search whose next log-probabilities `{token: logprob}` are a rule of the text so far; 2 ends it."""
    search = reader_voxlm.BeamSearch(3, budget)
    while search.open:
        logprobs = torch.full((len(search.open), vocabulary), -50.0)
        for row, text in enumerate(search.open):
            for token, logprob in rule(text.ids).items():
                logprobs[row, token] = logprob
        search.advance(logprobs, 2)
    return search.readings()


def test_half_a_recording_does_not_beat_the_whole():
    """Thirty tokens at -0.3 each are 9 nats less likely than the end after one of them."""

    def rule(ids):
        return {2: -0.1} if len(ids) == 30 else {3 + len(ids): -0.3, 2: -3.0 if len(ids) == 1 else -20.0}

    readings = search_by(rule, 60)
    assert readings[0].ids == list(range(3, 33)) and readings[0].logprob == pytest.approx(-9.1)


def test_a_loop_is_not_worth_more_than_what_it_repeats():
    """Saying six tokens again costs next to nothing, and may end as well as what was said once."""

    def rule(ids):
        return {3 + len(ids) % 6: -0.01, 2: -0.7 if ids and len(ids) % 6 == 0 else -20.0}

    readings = search_by(rule, 120)
    assert readings[0].ids == [3, 4, 5, 6, 7, 8]
    # In "no, no, no, no" a run of four is there again from the fifth token on.
    text = Reading([], [])
    for token in (3, 4, 3, 4, 3, 4, 3):
        text = text.followed_by(token, -0.1)
    assert text.fresh == 2 and text.looping and text.logprob == pytest.approx(-0.7)
