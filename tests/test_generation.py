"""
Stock generation on VoxLM: what transformers' own generation tests ask of a model, asked here of the composite.

(The library's `tests/generation` is in none of its packages, so these are checks of our own along the same lines.)
"""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer

from tests import tiny


@pytest.fixture(scope="module", params=["plain", "gated"])
def case(request):
    """A model, the inputs of two clips of unlike lengths, and its greedy ids."""
    gated = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3}
    model = tiny.model(llm="qwen3", **(gated if request.param == "gated" else {}))
    inputs = model.processor.apply_transcription_request([tiny.noise(0.6, 1), tiny.noise(1.2, 2)])
    return model, inputs, model.generate(**inputs, max_new_tokens=6, do_sample=False)


def test_the_output_dict_holds_a_step_each(case):
    model, inputs, ids = case
    output = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=False,
    )
    assert torch.equal(output.sequences, ids)
    steps = ids.shape[1] - inputs["input_ids"].shape[1]
    config = model.config.text_config
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == steps
    assert all(step.shape == (2, config.vocab_size) for step in output.logits)
    assert len(output.hidden_states[0]) == config.num_hidden_layers + 1
    assert output.hidden_states[0][-1].shape == (2, inputs["input_ids"].shape[1], config.hidden_size)
    assert all(step[-1].shape == (2, 1, config.hidden_size) for step in output.hidden_states[1:])
    transitions = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert transitions.shape == (2, steps) and (transitions <= 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"num_beams": 1, "num_return_sequences": 1},
        {"logits_to_keep": 1},
        {"generation_config": GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=1, pad_token_id=2)},
    ],
    ids=str,
)
def test_ways_to_the_same_greedy_text(case, options):
    model, inputs, ids = case
    prompt = inputs["input_ids"].shape[1]
    same = model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **options})
    suppressed = model.config.audio_token_id
    if "generation_config" in options and (same[:, prompt:] == suppressed).any():
        pytest.skip("a config of the caller's own does not suppress the placeholder")
    assert torch.equal(same, ids)


def test_prompt_lookup_gives_the_greedy_text(case):
    model, _, _ = case
    inputs = model.processor.apply_transcription_request(tiny.noise(0.9, 3))  # the library: batch 1 only
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), greedy)


def test_sampling_is_seeded_and_varied(case):
    model, inputs, _ = case
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(
            model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=3.0, num_return_sequences=2)
        )
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape[0] == 4


def test_beams_are_at_least_as_likely_as_greedy(case):
    model, inputs, ids = case
    output = model.generate(
        **inputs,
        max_new_tokens=6,
        num_beams=4,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        num_return_sequences=3,
    )
    assert output.sequences.shape[0] == 6
    scores = output.sequences_scores.view(2, 3)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    torch.manual_seed(0)
    mixed = model.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=True)
    assert mixed.shape[0] == 2


def test_a_streamer_gets_the_text_as_it_comes(case):
    model, _, _ = case
    inputs = model.processor.apply_transcription_request(tiny.noise(0.6, 1))
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_prompt=True)
    model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=streamer)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    assert "".join(streamer) == model.processor.tokenizer.decode(new_ids)


def test_generation_goes_on_from_a_cache(case):
    """Three tokens and then three more from the cache of the first call, against six at once."""
    model, _, _ = case
    inputs = model.processor.apply_transcription_request(tiny.noise(0.6, 1))
    whole = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    if whole.shape[1] - prompt < 6:
        pytest.skip("the random model stops early")
    first = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, past_key_values=DynamicCache(), return_dict_in_generate=True
    )
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    mask = model.hide_gated_frames(inputs["input_ids"], inputs["attention_mask"], audio)
    mask = torch.nn.functional.pad(mask, (0, first.sequences.shape[1] - prompt), value=1)
    rest = model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=3,
        do_sample=False,
    )
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("stop", ["max_length", "eos"])
def test_what_ends_a_text(case, stop):
    model, inputs, ids = case
    prompt = inputs["input_ids"].shape[1]
    if stop == "max_length":
        assert model.generate(**inputs, max_length=prompt + 2, do_sample=False).shape[1] == prompt + 2
    else:
        found = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=int(ids[0, prompt]))
        assert (found[0, prompt + 1 :] == model.config.pad_token_id).all()


def test_logits_processors_and_penalties_are_honoured(case):
    model, inputs, ids = case
    prompt = inputs["input_ids"].shape[1]
    banned = int(ids[0, prompt])
    other = model.generate(**inputs, max_new_tokens=6, do_sample=False, bad_words_ids=[[banned]])
    assert not (other[:, prompt:] == banned).any()
    grams = model.generate(**inputs, max_new_tokens=20, do_sample=False, no_repeat_ngram_size=2)[0, prompt:].tolist()
    if 1 in grams:
        grams = grams[: grams.index(1)]
    pairs = list(zip(grams, grams[1:]))
    assert len(pairs) == len(set(pairs))


def test_text_alone_is_continued_like_the_llm_does():
    """Without audio the model is the LLM."""
    model = tiny.model(llm="qwen3")
    ids = model.processor.tokenizer("the quick brown", return_tensors="pt")["input_ids"]
    ours = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    theirs = model.language_model.generate(
        input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=2, suppress_tokens=[3]
    )
    assert torch.equal(ours, theirs)
