"""Encoded batches, prompts and budgets; greedy decoding with drafts and teacher forcing against stock `generate`."""

import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.generation import GenerationConfig, StoppingCriteriaList

from tests import tiny
from voxlm_hf import fallback_voxlm
from voxlm_hf.decoding_voxlm import (
    DecodedText,
    draft_texts,
    generate_text,
    greedy_decode,
    next_draft,
    pack_left,
    pack_prompt,
    search_options,
    split_decoded,
    stop_tokens,
    teacher_force,
    token_budget,
    token_budgets,
    token_entropies,
)


BUDGET = 12
MIXTURE = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3}


def request(model, seconds=(1.0, 0.4, 1.6)):
    """Some clips as an encoded batch, and their packed prompt."""
    batch = tiny.encoded(model, *(tiny.noise(length, 7) for length in seconds))
    return batch, pack_prompt(model, batch)


def stock(model, prompt):
    """What transformers' `generate` writes: for each row its ids, whether eos ended them, and their log-probabilities."""
    output = model.generate(
        **prompt, max_new_tokens=BUDGET, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    new_ids = output.sequences[:, prompt["input_ids"].shape[1] :]
    stop = model.generation_config.eos_token_id
    ids = [row[: row.index(stop)] if stop in row else row for row in new_ids.tolist()]
    logprobs = torch.stack(output.logits, dim=1).float().log_softmax(-1).gather(-1, new_ids.unsqueeze(-1)).squeeze(-1)
    return ids, [stop in row for row in new_ids.tolist()], logprobs


@torch.no_grad()
def forced(model, prompt, row, ids):
    """The output of a plain forward over prompt and text."""
    return model(
        input_ids=torch.cat([prompt["input_ids"][row : row + 1], torch.tensor([ids]).long()], dim=1),
        attention_mask=torch.nn.functional.pad(prompt["attention_mask"][row : row + 1], (0, len(ids)), value=1),
        audio_embeds=prompt["audio_embeds"][row : row + 1],
        audio_embeds_mask=prompt["audio_embeds_mask"][row : row + 1],
        output_hidden_states=True,
    )


def states_of(model, prompt, row, ids):
    """The LLM's last hidden states that predict the tokens, by a plain forward over prompt and text."""
    return forced(model, prompt, row, ids).hidden_states[-1][0, -len(ids) - 1 : -1]


# Packing and batches


def test_visible_positions_move_to_the_right_in_order():
    visible = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 1]])
    ids = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    packed = pack_left(visible, {"ids": (ids, 0), "mask": (visible, 0)})
    assert packed["ids"].tolist() == [[0, 10, 12], [21, 22, 24]]
    assert packed["mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_a_prompt_without_its_hidden_frames_has_the_same_logits():
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.5)
    batch, packed = request(model, (2.0, 0.8))
    assert packed["input_ids"].shape[1] < batch.input_ids.shape[1]
    inputs = model.processor.apply_transcription_request([tiny.noise(length, 7) for length in (2.0, 0.8)])
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        torch.testing.assert_close(model(**packed).logits[:, -1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [{}, MIXTURE], ids=["plain", "gated"])
def test_a_row_of_a_batch_is_the_clip_encoded_by_itself(fields):
    model = tiny.model(llm="qwen3", **fields)
    batch, _ = request(model)
    for number, (segment, clip) in enumerate(zip(batch.segments, batch.clips)):
        row, alone = batch.row(number), tiny.encoded(model, tiny.noise(segment.duration_s, 7))
        assert np.array_equal(clip, row.clips[0]) and np.array_equal(clip, alone.clips[0])
        assert row.input_ids.tolist() == alone.input_ids.tolist() and row.attention_mask.all()
        assert row.visible_frames == alone.visible_frames and row.segments == [segment]
        for name, value in alone.audio.items():
            torch.testing.assert_close(getattr(row.audio, name), value, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "fields, asked, expected",
    [
        ({}, None, [15 + 16, 6 + 16]),  # 15 tokens a second and 16
        ({}, 5, [5, 5]),
        ({"frame_gate_threshold": 0.0}, None, [int(1.25 * 13) + 16, int(1.25 * 5) + 16]),  # every frame is visible
    ],
)
def test_token_budgets_follow_the_audio(fields, asked, expected):
    batch, _ = request(tiny.model(**fields), (1.0, 0.4))
    assert token_budgets(batch, asked) == expected


def test_entropies_of_known_distributions():
    logprobs = torch.tensor([[0.25] * 4, [0.5, 0.5, 1e-12, 1e-12]]).log()
    torch.testing.assert_close(token_entropies(logprobs), torch.tensor([np.log(4), np.log(2)]).float())


@pytest.mark.parametrize("eos, expected", [(1, {1}), ([1, 5], {1, 5}), (None, set())])
def test_stop_tokens(eos, expected):
    assert stop_tokens(eos) == expected


# Greedy decoding


def damaged(ids, kind):
    """A draft that is right, empty, wrong throughout, or has one token changed, one left out, or one too many."""
    middle = len(ids) // 2
    return {
        "right": ids,
        "empty": [],
        "wrong": [8 if token == 7 else 7 for token in ids],
        "changed": [*ids[:middle], 5, *ids[middle + 1 :]],
        "short": [*ids[:middle], *ids[middle + 1 :]],
        "long": [*ids[:middle], 5, *ids[middle:], 6, 7],
    }[kind]


@pytest.mark.parametrize("llm", ["qwen2", "qwen3", "llama", "gemma2", "phi3", "granite"])
def test_ids_states_and_probabilities_are_those_of_stock_generate(llm):
    model = tiny.model(llm=llm)
    _, prompt = request(model)
    ids, ended, logprobs = stock(model, prompt)
    kinds = ("right", "empty", "wrong", "changed", "short", "long")
    if any(DynamicCache(config=model.config.text_config).is_sliding):
        kinds = ("empty",)  # such models get no drafts
    states = [states_of(model, prompt, row, tokens) if tokens else None for row, tokens in enumerate(ids)]
    for number in range(len(kinds)):
        drafts = [damaged(row, kinds[(number + place) % len(kinds)]) for place, row in enumerate(ids)]
        texts = greedy_decode(model, prompt, [BUDGET] * 3, drafts)
        assert [text.ids for text in texts] == ids and [text.ended for text in texts] == ended
        for row, text in enumerate(texts):
            if text.ids:
                torch.testing.assert_close(text.logprobs, logprobs[row, : len(text.ids)], atol=1e-4, rtol=0)
                torch.testing.assert_close(text.states, states[row], atol=1e-4, rtol=0)


def test_a_right_draft_saves_passes():
    model = tiny.model(llm="qwen3")
    _, prompt = request(model)
    ids, _, _ = stock(model, prompt)
    assert max(map(len, ids)) == BUDGET
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    greedy_decode(model, prompt, [BUDGET] * 3, ids)
    assert len(passes) == 1
    greedy_decode(model, prompt, [BUDGET] * 3, [[]] * 3)
    assert len(passes) == 1 + BUDGET


def test_each_row_keeps_its_budget():
    model = tiny.model(llm="qwen3")
    _, prompt = request(model)
    ids, _, _ = stock(model, prompt)
    texts = greedy_decode(model, prompt, [0, 3, BUDGET], ids)
    assert [text.ids for text in texts] == [[], ids[1][:3], ids[2]]
    assert not any(text.ended for text in texts)


def test_the_draft_is_the_text_of_greedy_ctc():
    model = tiny.model(llm="qwen3", **MIXTURE)
    batch, _ = request(model)
    first, *_ = draft_texts(model, model.processor, batch.audio)
    greedy = batch.audio.tokens[0][batch.audio.tokens[0] >= 0]
    tokenizer = model.processor.tokenizer
    assert first and tokenizer.decode(first) == tokenizer.decode(greedy, skip_special_tokens=True).lstrip()


@pytest.mark.parametrize("llm, fields", [("qwen2", {}), ("gemma2", MIXTURE)], ids=["no CTC", "sliding window"])
def test_models_that_cannot_check_drafts_get_none(llm, fields):
    model = tiny.model(llm=llm, **fields)
    assert draft_texts(model, model.processor, request(model)[0].audio) == [[]] * 3


@pytest.mark.parametrize("fields", [{}, {**MIXTURE, "projector_vocab_size": 50}], ids=["plain", "drafted"])
def test_transcripts_do_not_depend_on_the_loop(fields, monkeypatch):
    model = tiny.model(llm="qwen3", **fields)
    clips = [tiny.noise(seconds, 3) for seconds in (0.7, 2.0, 1.1)]
    loop = model.transcribe(clips)
    monkeypatch.setattr(fallback_voxlm, "search_options", lambda *_: {"num_beams": 2})
    library = model.transcribe(clips)
    assert any(result.words for result in loop)
    assert [result.text for result in loop] == [result.text for result in library]
    for first, second in zip(loop, library):
        assert [word["word"] for word in first.words] == [word["word"] for word in second.words]
        for one, other in zip(first.words, second.words):
            assert one["start"] == pytest.approx(other["start"], abs=0.021)
            assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-3)


@pytest.mark.parametrize(
    "draft, position, token, expected",
    [
        ([1, 2, 3, 4], 1, 9, 2),  # another word in its place
        ([1, 2, 3, 4], 1, 3, 3),  # the draft had one too many
        ([1, 2, 3, 4], 4, 9, 5),  # behind its end
    ],
)
def test_the_draft_goes_on_after_a_mistake(draft, position, token, expected):
    assert next_draft(draft, position, token) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 4},
        {"do_sample": False, "temperature": 0.5, "top_k": 3},
        {"num_beams": 1, "use_cache": True, "synced_gpus": False},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "num_return_sequences": 1},
        {"use_cache": False, "output_scores": True, "return_dict_in_generate": True},
        {"num_beams": None, "streamer": None, "assistant_model": None},
        {"logits_processor": [], "stopping_criteria": StoppingCriteriaList()},
        {"generation_config": GenerationConfig(max_new_tokens=3, num_beams=1)},
        {"eos_token_id": 1},  # the tiny model's own
    ],
)
def test_options_at_their_defaults_change_nothing(options):
    assert search_options(tiny.model().generation_config, options) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"no_such_option": 1},
        {"eos_token_id": 7},
        {"suppress_tokens": [4, 5]},
        {"logits_processor": [lambda ids, scores: scores]},
    ],
)
def test_only_a_bare_greedy_search_takes_the_loop(options):
    assert search_options(tiny.model().generation_config, options) == options


def test_a_generation_config_that_asks_for_more_does_not_take_the_loop():
    config = tiny.model().generation_config
    assert search_options(config, {"generation_config": GenerationConfig(num_beams=3)}) == {"num_beams": 3}
    config.no_repeat_ngram_size = 4
    assert search_options(config, {}) == {"no_repeat_ngram_size": 4}
    assert search_options(config, {"no_repeat_ngram_size": 0}) == {}


@pytest.mark.parametrize("options", [{"max_new_tokens": value} for value in (0, -1, 2.5, "3", True, math.nan)])
def test_a_token_budget_is_a_whole_number_of_at_least_one(options):
    with pytest.raises(ValueError, match=f"at least 1, got {options['max_new_tokens']!r}"):
        tiny.model().transcribe([tiny.noise(1.0)], **options)


@pytest.mark.parametrize(
    "options, message", [({"max_length": 30}, "max_new_tokens"), ({"num_return_sequences": 2}, "one")]
)
def test_options_that_mean_nothing_for_a_transcript_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny.model().transcribe(tiny.noise(1.0), **options)


@pytest.mark.parametrize(
    "options, budget",
    [({}, None), ({"max_new_tokens": np.int64(4)}, 4), ({"generation_config": GenerationConfig(max_new_tokens=2)}, 2)],
)
def test_the_callers_token_budget_is_found(options, budget):
    assert token_budget(options) == budget


def test_a_generation_config_is_as_good_as_its_options():
    model, clip = tiny.model(llm="qwen3"), tiny.noise(1.0)
    for options in ({"do_sample": True, "temperature": 3.0}, {"num_beams": 2}, {"max_new_tokens": 3}):
        torch.manual_seed(0)
        expected = model.transcribe(clip, **options)
        torch.manual_seed(0)
        assert model.transcribe(clip, generation_config=GenerationConfig(**options)) == expected


@pytest.mark.parametrize("fields", [{}, MIXTURE], ids=["plain", "gated"])
def test_no_budget_goes_beyond_the_context(fields):
    """The tiny model ends no text by itself; without a bound, this would go on for days."""
    model = tiny.model(llm="qwen3", **fields)
    batch, prompt = request(model)
    context = model.config.text_config.max_position_embeddings
    room = [context - length for length in prompt["attention_mask"].sum(1).tolist()]
    assert token_budgets(batch, 10**30, context) == room
    assert token_budgets(batch, 5, context) == [5] * 3


# Other searches and known texts


def test_generated_texts_end_at_eos_or_at_their_own_budget():
    model = tiny.model(llm="qwen3")
    _, prompt = request(model)
    ids, _, _ = stock(model, prompt)
    # The second token of the first row is eos now, so one token is left.
    eos = ids[0][1]
    assert eos != ids[0][0] and eos not in ids[1][:2]
    model.generation_config.eos_token_id = eos
    texts = generate_text(model, prompt, [BUDGET, 2, BUDGET], {})
    assert (texts[0].ids, texts[0].ended) == (ids[0][:1], True)
    assert (texts[1].ids, texts[1].ended) == (ids[1][:2], False)


@torch.no_grad()
def test_teacher_forcing_scores_texts_as_one_pass_over_each_does():
    model = tiny.model(llm="qwen3")
    _, prompt = request(model)
    texts = [DecodedText(ids, True) for ids in ([5, 9, 11], [], [8, 8, 30, 31])]
    teacher_force(model, prompt, texts)
    for row, text in enumerate(texts):
        assert text.logprobs.shape == text.entropies.shape == (len(text.ids),)
        if text.ids:
            states = states_of(model, prompt, row, text.ids)
            logprobs = model.get_output_embeddings()(states).log_softmax(-1)
            torch.testing.assert_close(text.states, states, atol=1e-5, rtol=0)
            torch.testing.assert_close(text.logprobs, logprobs[range(len(text.ids)), text.ids], atol=1e-4, rtol=0)
            torch.testing.assert_close(text.entropies, -(logprobs.exp() * logprobs).sum(-1), atol=1e-4, rtol=0)


def test_decoded_ids_get_text_words_and_their_mean():
    processor = tiny.model().processor
    ids = processor.tokenizer(" the lazy dog")["input_ids"]
    text = DecodedText(ids, True, logprobs=torch.linspace(-3, -1, len(ids)))
    split_decoded(processor, text)
    assert (text.text, text.words) == ("the lazy dog", ["the", "lazy", "dog"])
    assert text.mean_logprob == pytest.approx(-2.0)
    assert sorted(set(text.token_words.tolist()) - {-1}) == [0, 1, 2]


def test_a_text_of_the_reader_keeps_its_spelling():
    processor = tiny.model().processor
    text = DecodedText([5], True, text="Hi!", words=["Hi!"], token_words=np.array([0]), mean_logprob=-0.5)
    split_decoded(processor, text)
    assert (text.text, text.words, text.mean_logprob) == ("Hi!", ["Hi!"], -0.5)
