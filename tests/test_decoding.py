"""The greedy loop with drafts, against stock `generate`."""

import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from voxlm_hf import transcription_voxlm
from voxlm_hf.decoding_voxlm import greedy_decode, is_plain_greedy, next_draft
from voxlm_hf.transcription_voxlm import draft_texts


BUDGET = 12


def request(model, seconds=(1.0, 0.4, 1.6)):
    """Encoded audio and prompt of some clips, and what stock `generate` writes for them, with its logits."""
    inputs = model.processor.apply_transcription_request([tiny.noise(length, 7) for length in seconds])
    features = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    audio = model.get_audio_features(**features)
    prompt = {
        "input_ids": inputs["input_ids"],
        "attention_mask": model.hide_gated_frames(inputs["input_ids"], inputs["attention_mask"], audio),
        "audio_embeds": audio.pooler_output,
        "audio_embeds_mask": audio.audio_embeds_mask,
    }
    output = model.generate(
        **prompt, max_new_tokens=BUDGET, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    stop = model.generation_config.eos_token_id
    ids = [row[: row.index(stop)] if stop in row else row for row in new_ids.tolist()]
    logprobs = torch.stack(output.logits, dim=1).float().log_softmax(-1).gather(-1, new_ids.unsqueeze(-1)).squeeze(-1)
    return prompt, audio, ids, [stop in row for row in new_ids.tolist()], logprobs


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
    prompt, _, ids, ended, logprobs = request(model)
    kinds = ("right", "empty", "wrong", "changed", "short", "long")
    if any(DynamicCache(config=model.config.text_config).is_sliding):
        kinds = ("empty",)  # such models get no drafts
    for number in range(len(kinds)):
        drafts = [damaged(row, kinds[(number + place) % len(kinds)]) for place, row in enumerate(ids)]
        text = greedy_decode(model, prompt, [BUDGET] * 3, drafts)
        assert text.ids == ids and text.ended == ended
        for row, tokens in enumerate(ids):
            torch.testing.assert_close(
                text.logprobs[row, : len(tokens)], logprobs[row, : len(tokens)], atol=1e-4, rtol=0
            )
            forced = model(
                **{
                    "input_ids": torch.cat([prompt["input_ids"][row : row + 1], torch.tensor([tokens]).long()], dim=1),
                    "attention_mask": torch.nn.functional.pad(
                        prompt["attention_mask"][row : row + 1], (0, len(tokens)), value=1
                    ),
                    **{name: prompt[name][row : row + 1] for name in ("audio_embeds", "audio_embeds_mask")},
                },
                output_hidden_states=True,
            )
            states = forced.hidden_states[-1][0, -len(tokens) - 1 : -1]
            torch.testing.assert_close(text.states[row, : len(tokens)], states, atol=1e-4, rtol=0)


def test_a_right_draft_saves_passes():
    model = tiny.model(llm="qwen3")
    prompt, _, ids, _, _ = request(model)
    assert max(map(len, ids)) == BUDGET
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    greedy_decode(model, prompt, [BUDGET] * 3, ids)
    assert len(passes) == 1
    greedy_decode(model, prompt, [BUDGET] * 3, [[]] * 3)
    assert len(passes) == 1 + BUDGET


def test_each_row_keeps_its_budget():
    model = tiny.model(llm="qwen3")
    prompt, _, ids, _, _ = request(model)
    text = greedy_decode(model, prompt, [0, 3, BUDGET], ids)
    assert text.ids == [[], ids[1][:3], ids[2]] and text.ended == [False] * 3


def test_the_draft_is_what_the_projector_reads():
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.3)
    _, audio, _, _, _ = request(model)
    (first, *_), tokenizer = draft_texts(model, model.processor, audio), model.processor.tokenizer
    read = tokenizer.decode(audio.tokens[0][audio.tokens[0] >= 0], skip_special_tokens=True)
    assert tokenizer.decode(first) == read.lstrip() and first
    plain = tiny.model()
    assert draft_texts(plain, plain.processor, request(plain)[1]) == [[]] * 3


@pytest.mark.parametrize("kind", ["plain", "drafted"])
def test_transcripts_do_not_depend_on_the_loop(kind, monkeypatch):
    drafted = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3, "projector_vocab_size": 50}
    model = tiny.model(llm="qwen3", **(drafted if kind == "drafted" else {}))
    clips = [tiny.noise(seconds, 3) for seconds in (0.7, 2.0, 1.1)]
    loop = model.transcribe(clips)
    monkeypatch.setattr(transcription_voxlm, "is_plain_greedy", lambda *_: False)
    stock = model.transcribe(clips)
    assert [result.text for result in loop] == [result.text for result in stock]
    for first, second in zip(loop, stock):
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


def test_only_a_bare_greedy_search_takes_the_loop():
    config = tiny.model().generation_config
    assert is_plain_greedy(config, {"max_new_tokens": 4}) and is_plain_greedy(config, {"do_sample": False})
    for options in ({"num_beams": 2}, {"do_sample": True}, {"repetition_penalty": 1.2}, {"no_such_option": 1}):
        assert not is_plain_greedy(config, options)
    config.no_repeat_ngram_size = 4
    assert not is_plain_greedy(config, {})
