"""
Stock generation on VoxLM: what transformers' own generation tests ask of a model, asked here of the composite.

(The library's `tests/generation` is in none of its packages, so these are checks of our own along the same lines.)
"""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer

from tests import tiny
from voxlm_hf.decoding_voxlm import padded_batches
from voxlm_hf.generation_voxlm import (
    SegmentTask,
    TranscriptionOptions,
    finish_segments,
    join_recordings,
    known_seconds,
    segment_recordings,
    task_groups,
)
from voxlm_hf.segmentation_voxlm import AudioSegment
from voxlm_hf.transcription_voxlm import Segment


NEW = 6


@pytest.fixture(scope="module", params=["plain", "gated"])
def case(request):
    """A model, the inputs of two clips of unlike lengths, and its greedy ids."""
    gated = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3}
    model = tiny.model(llm="qwen3", **(gated if request.param == "gated" else {}))
    inputs = model.processor.apply_transcription_request([tiny.noise(0.6, 1), tiny.noise(1.2, 2)])
    return model, inputs, model.generate(**inputs, max_new_tokens=NEW, do_sample=False)


def new_ids(inputs, ids):
    return ids[:, inputs["input_ids"].shape[1] :]


def likelihoods(model, output):
    """Sums of the log-probabilities of generated tokens, by the model's own scores."""
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    return scores.masked_fill(torch.isinf(scores), 0.0).sum(-1)


# `generate`


def test_the_output_dict_holds_a_step_each(case):
    model, inputs, ids = case
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert torch.equal(output.sequences, ids)
    steps = new_ids(inputs, ids).shape[1]
    config = model.config.text_config
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == steps
    assert all(step.shape == (2, config.vocab_size) for step in output.logits)
    assert len(output.hidden_states[0]) == config.num_hidden_layers + 1
    assert output.hidden_states[0][-1].shape == (2, inputs["input_ids"].shape[1], config.hidden_size)
    assert all(step[-1].shape == (2, 1, config.hidden_size) for step in output.hidden_states[1:])


def test_greedy_ids_are_the_likeliest_of_each_step(case):
    model, inputs, ids = case
    output = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(output.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(new_ids(inputs, ids)[:, 0], output.scores[0].argmax(-1))
    for row, tokens in enumerate(new_ids(inputs, ids).tolist()):
        for step, token in enumerate(tokens):
            assert token == int(output.scores[step][row].argmax()) or token == model.config.pad_token_id


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"num_beams": 1, "num_return_sequences": 1},
        {"logits_to_keep": 1},
        {
            "generation_config": GenerationConfig(
                do_sample=False, max_new_tokens=NEW, eos_token_id=1, pad_token_id=2, suppress_tokens=[3]
            )
        },
    ],
    ids=["no cache", "static cache", "dynamic cache", "one beam", "logits_to_keep", "own config"],
)
def test_ways_to_the_same_greedy_text(case, options):
    model, inputs, ids = case
    assert torch.equal(model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options}), ids)


def test_a_batch_says_what_each_clip_says_alone(case):
    model, inputs, ids = case
    for row, clip in enumerate((tiny.noise(0.6, 1), tiny.noise(1.2, 2))):
        single = model.processor.apply_transcription_request(clip)
        alone = new_ids(single, model.generate(**single, max_new_tokens=NEW, do_sample=False))[0].tolist()
        assert new_ids(inputs, ids)[row].tolist()[: len(alone)] == alone


def test_prompt_embeddings_give_the_same_text(case):
    """As `transcribe` hands them over for beams and sampling: penalties then see the text alone."""
    model, inputs, ids = case
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    embeds = model.merge_audio(inputs["input_ids"], None, audio.pooler_output, audio.audio_embeds_mask)
    mask = model.visible_positions(inputs["input_ids"], inputs["attention_mask"], audio)
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, new_ids(inputs, ids))


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


def test_sampling_at_a_low_temperature_is_greedy(case):
    model, inputs, ids = case
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=True, temperature=1e-4, top_k=0), ids)


def test_beams_are_at_least_as_likely_as_greedy(case):
    model, inputs, _ = case
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    greedy = likelihoods(model, model.generate(**inputs, **options))
    beams = model.generate(**inputs, **options, num_beams=4, length_penalty=0.0, num_return_sequences=3)
    scores = beams.sequences_scores.view(2, 3)
    assert (scores[:, 0] >= greedy - 1e-4).all()
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_the_scores_of_beams_are_the_models_log_probabilities(case):
    model, inputs, _ = case
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 4, "length_penalty": 0.0, "eos_token_id": -1}
    beams = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    for row, ids in enumerate(new_ids(inputs, beams.sequences)):
        # One forward over prompt and text, with the placeholder forbidden as in generation.
        text = {
            "input_ids": torch.cat([inputs["input_ids"][row], ids])[None],
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"][row], (0, len(ids)), value=1)[None],
            "input_features": inputs["input_features"][row : row + 1],
            "input_features_mask": inputs["input_features_mask"][row : row + 1],
        }
        with torch.no_grad():
            logits = model(**text).logits[0, -len(ids) - 1 : -1]
        total = float(logits.log_softmax(-1)[range(len(ids)), ids].sum())
        assert float(beams.sequences_scores[row]) == pytest.approx(total, abs=1e-3)


def text_alone(inputs):
    """What continues from a cache: the sequence and its mask, without the audio."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", ["dynamic", "static", "beams"])
def test_generation_continues_from_its_own_cache(case, kind):
    """As the library's tests do: the sequence so far, a mask that only knows of padding, and no audio."""
    model, inputs, _ = case
    options = {"do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(**inputs, **options, max_new_tokens=4)
    cache = StaticCache(model.config, 64) if kind == "static" else DynamicCache(config=model.config)
    first = model.generate(**inputs, **options, past_key_values=cache, max_new_tokens=3)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    if kind == "beams":  # as the library has it, the cache has a row for each beam
        cache.batch_repeat_interleave(2)
        options |= {"num_beams": 2, "length_penalty": 0.0}
    last = model.generate(
        input_ids=first.sequences, attention_mask=mask, past_key_values=cache, **options, max_new_tokens=1
    )
    assert torch.equal(last.sequences, whole.sequences)
    torch.testing.assert_close(last.logits[0][:: len(last.logits[0]) // 2], whole.logits[3], atol=1e-4, rtol=1e-4)


def test_generation_continues_without_a_mask(case):
    model, _, _ = case
    inputs = model.processor.apply_transcription_request(tiny.noise(0.6, 1))
    options = {
        "do_sample": False,
        "eos_token_id": -1,
        "suppress_tokens": [2, 3],
    }  # no pad, from which masks are inferred
    whole = model.generate(**inputs, **options, max_new_tokens=5)
    cache = DynamicCache(config=model.config)
    first = model.generate(**inputs, **options, past_key_values=cache, max_new_tokens=3)
    assert torch.equal(model.generate(input_ids=first, past_key_values=cache, **options, max_new_tokens=2), whole)


@pytest.mark.parametrize("change", ["as it is", "cropped", "reset", "repeated"])
@torch.no_grad()
def test_a_pass_continues_from_the_cache_of_another(case, change):
    """Prefix and continuation, against one pass over both; the masks know of padding alone."""
    model, inputs, _ = case
    more = torch.tensor([[40, 41, 42], [43, 44, 45]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    both = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": mask}
    expected = model(**both).logits[:, -3:]
    cache = model(**inputs, use_cache=True).past_key_values
    if change == "cropped":
        model(input_ids=more.flip(1), attention_mask=mask, past_key_values=cache)
        cache.crop(-3)
    if change == "reset":
        cache.reset()
        cache = model(**inputs, past_key_values=cache).past_key_values
    if change == "repeated":
        cache.batch_repeat_interleave(2)
        more, mask, expected = (item.repeat_interleave(2, dim=0) for item in (more, mask, expected))
    found = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_that_was_cropped_into_the_audio_forgets_what_was_hidden_there(case):
    model, inputs, _ = case
    cache = model(**inputs, use_cache=True).past_key_values
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = int(
        (ids == model.config.audio_token_id).int().argmax(1).max()
    )  # all of both rows' audio is behind it, or none
    cache.crop(first - ids.shape[1])
    cache = (
        model(**{**inputs, "input_ids": ids[:, first:]}, past_key_values=cache).past_key_values if first == 0 else cache
    )
    text = torch.full_like(ids[:, first:], 50)
    found = model(input_ids=text, attention_mask=mask, past_key_values=cache).logits
    plain = torch.cat([ids[:, :first], text], 1)
    expected = model.language_model(input_ids=plain[:1, mask[0].bool()]).logits
    visible = int(mask[0, first:].sum())
    torch.testing.assert_close(found[0, -visible:], expected[0, -visible:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_two_audios_one_after_the_other_in_a_chat(case):
    """Audio, text and another audio: at once, by passes and by `generate` from a cache."""
    model, _, _ = case
    processor, clips = model.processor, [tiny.noise(0.6, 4), tiny.noise(0.9, 5)]
    turns = ["<|audio|> the fox", " he hoped <|audio|> dog"]
    whole = processor(text="".join(turns), audio=clips)
    first, second = (processor(text=turn, audio=clip) for turn, clip in zip(turns, clips))
    length = first["input_ids"].shape[1]
    expected = model(**whole).logits
    cache = model(**first, use_cache=True).past_key_values
    found = model(**{**second, "attention_mask": whole["attention_mask"]}, past_key_values=cache)
    torch.testing.assert_close(found.logits, expected[:, length:], atol=1e-4, rtol=1e-4)
    options = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 3}
    cache = model(**first, use_cache=True).past_key_values
    audio = {name: second[name] for name in second if name.startswith("input_features")}
    continued = model.generate(**text_alone(whole), **audio, past_key_values=cache, **options)
    assert torch.equal(continued, model.generate(**whole, **options))


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 3, "length_penalty": 0.0}], ids=["greedy", "beams"]
)
def test_prompts_may_have_several_audios_or_none(case, options):
    model, _, _ = case
    clips = [tiny.noise(0.6, 6), tiny.noise(1.1, 7), tiny.noise(0.8, 8)]
    texts = ["<|audio|> and <|audio|>", "the lazy dog", "<|audio|> fox"]
    options = {"eos_token_id": -1, "max_new_tokens": 4, **options}
    batch = model.processor(text=texts, audio=clips)
    found = new_ids(batch, model.generate(**batch, **options))
    for row, audio in enumerate((clips[:2], None, clips[2:])):
        alone = model.processor(text=texts[row], audio=audio)
        assert torch.equal(found[row : row + 1], new_ids(alone, model.generate(**alone, **options)))


@pytest.mark.parametrize("other", ["the same", "another"])
def test_audio_that_is_not_in_the_new_part_of_the_prompt_is_refused(case, other):
    """It would be ignored: what the cache holds was computed from the audio then."""
    model, inputs, _ = case
    first = model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=-1, return_dict_in_generate=True)
    features = inputs["input_features"] + (other == "another")
    continued = {**inputs, "input_features": features, "input_ids": first.sequences}
    continued["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    with pytest.raises(ValueError, match=r"hold \[0, 0\] audio placeholders .* only the audio that is not in it"):
        model.generate(**continued, past_key_values=first.past_key_values, max_new_tokens=1)


def test_a_cache_of_other_prompts_and_a_mask_without_it_are_refused():
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.3)
    inputs = model.processor.apply_transcription_request([tiny.noise(0.6, 1), tiny.noise(1.2, 2)])
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="made for 2 prompts, but there are 3"):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="mask has 1 columns, but there are .* in the cache and 1 new"):
        new = torch.ones(2, 1, dtype=torch.long)
        model(input_ids=new, attention_mask=new, past_key_values=cache)


def test_audio_goes_into_prompt_embeddings_as_into_ids(case):
    model, inputs, ids = case
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    found = model.generate(inputs_embeds=embeds, **rest, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, new_ids(inputs, ids))


def test_audio_alone_gets_the_trained_prompt(case):
    model, inputs, ids = case
    features = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    with torch.no_grad():
        encoded = model.encode_audio(**features)
    states = {"audio_states": encoded.last_hidden_state, "audio_states_mask": encoded.frame_mask}
    for audio in (features, states):
        assert torch.equal(model.generate(**audio, max_new_tokens=NEW, do_sample=False), new_ids(inputs, ids))


def test_encoder_states_without_a_mask_are_all_real(case):
    model, _, _ = case
    inputs = model.processor.apply_transcription_request(tiny.noise(0.9, 3))
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        states = model.encode_audio(inputs["input_features"]).last_hidden_state
        assert torch.equal(model(**text_alone(inputs), audio_states=states).logits, model(**inputs).logits)
    found = model.generate(**text_alone(inputs), audio_states=states, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("assistant", ["same", "other"])
def test_drafts_of_an_assistant_leave_the_text_as_it_is(case, assistant):
    model, _, _ = case
    inputs = model.processor.apply_transcription_request(tiny.noise(0.9, 3))
    helper = model if assistant == "same" else tiny.model(llm="qwen3", projector_hidden_size=8)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(**inputs, **options, assistant_model=helper), model.generate(**inputs, **options))


@pytest.mark.parametrize("kind", [np.int16, np.float32, np.int32, torch.int16, torch.float32], ids=str)
def test_samples_of_any_type_are_audio_and_no_ids(case, kind):
    model, _, _ = case
    clip = tiny.noise(0.7, 9)
    scale = 1 if kind in (np.float32, torch.float32) else 2.0**31 if kind is np.int32 else 2.0**15
    samples = clip * np.float32(scale)
    samples = torch.from_numpy(samples).to(kind) if isinstance(kind, torch.dtype) else samples.astype(kind)
    assert model.generate(samples, max_new_tokens=NEW).text == model.transcribe(clip, max_new_tokens=NEW).text


LONG = "x " * 300  # 600 tokens, and the tiny LLMs have a context of 512


@pytest.mark.parametrize("saved", [True, False], ids=["in the processor", "not in the processor"])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, clip: model.transcribe(clip, prompt=LONG),
        lambda model, clip: model.transcribe([clip, clip], prompt=[None, LONG]),
        lambda model, clip: model.align(clip, "the fox", prompt=LONG),
        lambda model, clip: model.generate(**model.processor.apply_transcription_request(clip, prompt=LONG)),
        lambda model, clip: model.generate(**model.processor(text="<|audio|>" + LONG, audio=clip), num_beams=2),
    ],
    ids=["transcribe", "one of several", "align", "generate", "processor"],
)
def test_a_prompt_that_the_llm_cannot_hold_is_refused_with_both_numbers(case, call, saved, monkeypatch):
    model, _, _ = case
    monkeypatch.setattr(model.processor, "context_length", 512 if saved else None)
    with pytest.raises(ValueError, match=r"has (6|7)\d\d tokens .*context of 512"):
        call(model, tiny.noise(0.6))


def test_audio_that_the_llm_cannot_hold_is_refused_with_both_numbers():
    model = tiny.model(llm="qwen3", projector_stride=1)
    for call in (model.transcribe, lambda clip: model.generate(**model.processor.apply_transcription_request(clip))):
        with pytest.raises(ValueError, match=r"has \d{3} tokens .*context of 512"):
            call(tiny.noise(12.0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": 5}, "prompt must be a string.* got 5"),
        ({"prompt": [5]}, "prompt must be a string, got int"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
        ({"chunk_length_s": "5"}, "chunk_length_s.*a number of at least 1.*'5'"),
        ({"chunk_length_s": float("nan")}, "chunk_length_s.*nan"),
        ({"num_beams": 0}, "num_beams.*an integer of at least 1, got 0"),
        ({"num_beams": "2"}, "num_beams.*'2'"),
        ({"batch_size": "8"}, "batch_size.*an integer of at least 1, got '8'"),
        ({"batch_size": 2.5}, "batch_size.*2.5"),
        ({"sampling_rate": float("nan")}, "sampling_rate.*nan"),
        ({"sampling_rate": 0}, "sampling_rate.*got 0"),
        ({"vad": 5}, "vad.*'energy', 'silero', got 5"),
        *[({"return_timestamps": value}, "True, False or 'word'") for value in ("char", "segment", 5, 1.0, ["word"])],
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(case, options, message):
    model, _, _ = case
    clip = tiny.noise(0.6)
    with pytest.raises(ValueError, match=message):
        model.transcribe(clip, **options)
    if "batch_size" not in options:  # that of a pipeline is the library's
        with pytest.raises(ValueError, match=message):
            model.transcription_pipeline()(clip, **options)


@pytest.mark.parametrize(
    "inputs", [{}, {"input_features": torch.zeros(1, 80, 100)}, {"audio_states": torch.zeros(1, 50, 16)}]
)
def test_a_pass_without_a_prompt_says_what_is_missing(case, inputs):
    model, _, _ = case
    with pytest.raises(ValueError, match="The prompt is missing: pass `input_ids`"):
        model(**inputs)


def test_a_streamer_gets_the_text_as_it_comes(case):
    model, _, _ = case
    inputs = model.processor.apply_transcription_request(tiny.noise(0.6, 1))
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_prompt=True)
    model.generate(**inputs, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert "".join(streamer) == model.processor.tokenizer.decode(new_ids(inputs, ids)[0])


def test_generation_continues_from_a_cache(case, monkeypatch):
    """Three tokens and then three more from the cache of the first call, against six at once; no eos ends them early."""
    model, _, _ = case
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    inputs = model.processor.apply_transcription_request(tiny.noise(0.6, 1))
    whole = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    assert whole.shape[1] == prompt + 6
    first = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, past_key_values=DynamicCache(), return_dict_in_generate=True
    )
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    mask = model.visible_positions(inputs["input_ids"], inputs["attention_mask"], audio)
    mask = torch.nn.functional.pad(mask, (0, first.sequences.shape[1] - prompt), value=1)
    rest = model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=3,
        do_sample=False,
    )
    assert torch.equal(rest, whole)


def test_a_text_ends_at_its_longest_length(case):
    model, inputs, _ = case
    prompt = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_length=prompt + 2, do_sample=False).shape[1] == prompt + 2


def test_behind_eos_is_padding(case):
    model, inputs, ids = case
    prompt = inputs["input_ids"].shape[1]
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=int(ids[0, prompt]))
    assert found[0, prompt] == ids[0, prompt] and (found[0, prompt + 1 :] == model.config.pad_token_id).all()


def test_banned_words_do_not_occur(case):
    model, inputs, ids = case
    banned = int(new_ids(inputs, ids)[0, 0])
    other = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, bad_words_ids=[[banned]])
    assert not (new_ids(inputs, other) == banned).any()


def test_no_pair_of_tokens_occurs_twice_when_that_is_forbidden(case):
    model, inputs, _ = case
    (tokens, *_) = new_ids(inputs, model.generate(**inputs, max_new_tokens=20, do_sample=False, no_repeat_ngram_size=2))
    tokens = tokens[tokens != model.config.pad_token_id].tolist()
    pairs = list(zip(tokens, tokens[1:]))
    assert len(pairs) > 2 and len(pairs) == len(set(pairs))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_placeholder_is_never_generated(use_cache):
    """Though it would be the likeliest token at every step."""
    model = tiny.model(llm="llama")
    inputs = model.processor.apply_transcription_request(tiny.noise(1.0))
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.zero_()
        state = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        head.weight[model.config.audio_token_id] = state
        assert int(model(**inputs).logits[0, -1].argmax()) == model.config.audio_token_id
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use_cache)
    assert not (new_ids(inputs, ids) == model.config.audio_token_id).any()


def test_text_alone_is_continued_like_the_llm_does():
    """Without audio the model is the LLM."""
    model = tiny.model(llm="qwen3")
    ids = model.processor.tokenizer("the quick brown", return_tensors="pt")["input_ids"]
    ours = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    theirs = model.language_model.generate(
        input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=2, suppress_tokens=[3]
    )
    assert torch.equal(ours, theirs)


def test_the_audio_is_encoded_once(case):
    model, inputs, _ = case
    passes = []
    hook = model.encoder.conv1.register_forward_hook(lambda *_: passes.append(1))
    model.generate(**inputs, max_new_tokens=NEW, num_beams=2)
    hook.remove()
    assert len(passes) == 1


# Recordings on their way through the model


def task(recording, seconds=1.0, start_s=0.0, **fields):
    audio = AudioSegment(np.zeros(round(seconds * 10)), 10, round(start_s * 10), **fields)
    return SegmentTask(recording, audio, Segment(start_s, start_s + seconds, f"r{recording}s{start_s:g}"))


def end(recording, seconds=3.0, error=None):
    return SegmentTask(recording, duration_s=seconds, error=error)


def options(**fields):
    defaults = {
        "sampling_rate": None,
        "with_words": True,
        "batch_size": 2,
        "longest_s": 4.0,
        "vad": "energy",
        "generate_kwargs": {},
    }
    return TranscriptionOptions(**{**defaults, **fields})


def test_groups_hold_a_few_batches_and_ends_do_not_count():
    tasks = [task(0) for _ in range(9)] + [end(0), task(1), end(1)]
    assert [sum(item.audio is not None for item in group) for group in task_groups(tasks, 2, at_once=False)] == [8, 2]


def test_the_first_group_is_one_segment_when_results_are_wanted_at_once():
    tasks = [task(0) for _ in range(6)]
    assert [len(group) for group in task_groups(tasks, 2, at_once=True)] == [1, 2, 2, 1]


def test_groups_lose_nothing_and_keep_the_order():
    tasks = [task(0), end(0), end(1), task(2), task(2), end(2)]
    assert [item for group in task_groups(tasks, 1, at_once=True) for item in group] == tasks


@pytest.mark.parametrize(
    "lengths, size, seconds, expected",
    [
        ([1, 1, 1, 1, 1], 2, 100, [2, 2, 1]),
        ([1, 2, 3, 10], 8, 12, [3, 1]),  # 4 x 10 s with padding would be too much
        ([30, 30], 8, 12, [1, 1]),  # one is always taken
        ([], 8, 12, []),
    ],
)
def test_batches_have_so_many_segments_and_so_much_audio(lengths, size, seconds, expected):
    batches = padded_batches(lengths, float, seconds, size)
    assert [len(batch) for batch in batches] == expected


def test_segments_are_joined_to_recordings():
    tasks = [task(0), task(0, start_s=1), end(0), end(1, 0.5), task(2), end(2)]
    results = list(join_recordings(tasks))
    assert [(result.text, result.duration, len(result.segments)) for result in results] == [
        ("r0s0 r0s1", 3.0, 2),
        ("", 0.5, 0),
        ("r2s0", 3.0, 1),
    ]


def test_a_recording_with_an_error_has_no_text():
    (result,) = join_recordings([task(0), end(0, error=ValueError("two\nlines"))])
    assert (result.text, result.error) == ("", "two lines")


def word(text, start):
    return {"word": text, "start": start, "end": start + 0.2, "confidence": 1.0}


def test_words_of_an_overlap_are_kept_once():
    left, right = task(0, 3.0, continues=True), task(0, 3.0, start_s=2.0, overlap=10)
    left.result.text, left.result.words = "a b c", [word("a", 0.5), word("b", 2.2), word("c", 2.6)]
    right.result.text, right.result.words = "b c d", [word("b", 2.2), word("c", 2.6), word("d", 3.5)]
    for item in (left, right):
        item.result.word_scores = [{} for _ in range(3)]
    first, second, _ = finish_segments([left, right, end(0)], options())
    assert (first.result.text, second.result.text) == ("a b c", "d")


def test_words_that_were_not_asked_for_are_left_out():
    item = task(0)
    item.result.words, item.result.word_scores = [word("a", 0.1)], [{}]
    first, _ = finish_segments([item, end(0)], options(with_words=False))
    assert (first.result.words, first.result.word_scores) == ([], [])


def test_each_recording_ends_with_its_length():
    processor = tiny.model().processor
    tasks = list(
        segment_recordings(processor, [tiny.noise(1.0), np.zeros(8000, np.float32), tiny.noise(9.5)], options())
    )
    ends = [(item.recording, item.duration_s) for item in tasks if item.audio is None]
    assert ends == [(0, 1.0), (1, 0.5), (2, 9.5)]
    segments = [item.recording for item in tasks if item.audio is not None]
    assert segments == sorted(segments) and set(segments) == {0, 2}  # silence makes no segment


def test_a_recording_that_cannot_be_read_ends_with_its_error():
    processor = tiny.model().processor
    bad, good = list(segment_recordings(processor, ["no such.wav", tiny.noise(1.0)], options()))[:2]
    assert isinstance(bad.error, FileNotFoundError) and good.recording == 1 and good.error is None


@pytest.mark.parametrize(
    "items, seconds",
    [
        ([np.zeros(8000), np.zeros((2, 16000))], 1.5),
        ([{"array": np.zeros(16000), "sampling_rate": 16000}], 1.0),
        (["tests/data/austen-0880.flac", "no such.wav"], pytest.approx(3.0, abs=0.1)),
        ([b"bytes of a file"], None),
        ([{"array": np.zeros(8000), "sampling_rate": 8000}, {"raw": np.zeros(8000), "sampling_rate": 16000}], 1.5),
        ([{"array": None, "path": "tests/data/austen-0880.flac"}], pytest.approx(3.0, abs=0.1)),
        ([{"array": np.zeros(8000), "sampling_rate": "8000"}], None),
        ([{"array": np.zeros(8000), "sampling_rate": 0}], None),
        ([{"array": np.zeros(8000)}, {}], None),
    ],
)
def test_seconds_are_known_where_recordings_say_them(items, seconds):
    assert known_seconds(items, 16000) == seconds
