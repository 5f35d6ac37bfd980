"""`generate` writes the text of `transcribe`: through the processor as code for Whisper has it, in every way it can be called."""

import logging

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from tests import tiny
from voxlm_hf import fallback_voxlm, rescoring_voxlm
from voxlm_hf.features_voxlm import active_seconds, halves, silence_behind
from voxlm_hf.placeholders_voxlm import feature_mask
from voxlm_hf.segmentation_voxlm import EnergyDetector, segment_audio


CLIPS = [tiny.noise(seconds, 3) for seconds in (0.7, 2.0, 1.1)]


@pytest.fixture(scope="module")
def model():
    """A model with a reader that prefers many words."""
    made = tiny.with_reader(word_bonus=1e3)
    made.reader.decoder.embed_tokens.weight.data[tiny.READER_END] = 0  # the random end would be likelier than any word
    return made


@pytest.fixture(scope="module")
def expected(model):
    """What `transcribe` writes."""
    texts = [result.text for result in model.transcribe(CLIPS)]
    assert len(set(texts)) == 3 and all(texts)
    return texts


def texts_of(model, ids):
    return model.processor.batch_decode(ids, skip_special_tokens=True)


def as_whisper(model):
    return model.generate(**model.processor(CLIPS, sampling_rate=16000, return_tensors="pt"))


def with_the_prompt(model):
    inputs = model.processor.apply_transcription_request(CLIPS)
    ids = model.generate(**inputs)
    assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return ids[:, inputs["input_ids"].shape[1] :]


def padded_on_the_right(model):
    prompt = [model.processor.render_prompt()] * len(CLIPS)
    inputs = model.processor(text=prompt, audio=CLIPS, padding_side="right")
    return model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]


def without_masks(model):
    inputs = model.processor.apply_transcription_request(CLIPS)
    features = {name: inputs[name] for name in ("input_ids", "input_features")}
    return model.generate(**features)[:, inputs["input_ids"].shape[1] :]


WAYS = {
    "as Whisper": as_whisper,
    "features alone": lambda model: model.generate(model.processor(CLIPS, sampling_rate=16000).input_features),
    "with the prompt": with_the_prompt,
    "padded on the right": padded_on_the_right,
    "without masks": without_masks,
    "another config": lambda model: model.generate(
        **model.processor(CLIPS), generation_config=GenerationConfig(do_sample=False, eos_token_id=1, pad_token_id=2)
    ),
    "a cache kind": lambda model: model.generate(**model.processor(CLIPS), use_cache=False, num_beams=1),
    "as a dict": lambda model: model.generate(**model.processor(CLIPS), return_dict_in_generate=True).sequences,
    "with labels": lambda model: model.generate(
        **model.processor.collate([{"audio": clip, "text": "he hoped"} for clip in CLIPS])
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_call_it_writes_what_transcribe_writes(model, expected, way):
    assert texts_of(model, way(model)) == expected


def test_one_clip_at_a_time(model, expected):
    for clip, text in zip(CLIPS, expected):
        assert texts_of(model, model.generate(**model.processor(clip, sampling_rate=16000))) == [text]


def test_ids_are_those_of_the_llm_and_end_with_eos_and_padding(model, expected):
    rows = as_whisper(model).tolist()
    own = [model.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in expected]
    truncated = [result.truncated for result in model.transcribe(CLIPS)]
    ends = [[] if cut else [1] for cut in truncated]
    longest = max(len(ids) + len(end) for ids, end in zip(own, ends))
    assert rows == [ids + end + [2] * (longest - len(ids) - len(end)) for ids, end in zip(own, ends)]


def test_a_text_that_ends_by_itself_ends_with_eos():
    made = tiny.with_reader(word_bonus=-1e6)  # the empty text
    inputs = made.processor.apply_transcription_request(CLIPS[0])
    new = made.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert made.transcribe(CLIPS[0]).text == "" and new.tolist() == [1]


@pytest.mark.parametrize("options", [{"max_new_tokens": 4}, {"max_length": 4}], ids=str)
def test_a_budget_is_that_of_transcribe(model, options):
    ids = model.generate(**model.processor(CLIPS), **options)
    budgeted = model.transcribe(CLIPS, max_new_tokens=4)
    assert ids.shape[1] <= 4 and texts_of(model, ids) == [result.text for result in budgeted]


def test_another_prompt_is_the_prompt_of_transcribe():
    """Where the LLM decides."""
    made = tiny.with_reader(llm_weight=1e6)
    made.reader.decoder.embed_tokens.weight.data[tiny.READER_END] = 0
    inputs = made.processor.apply_transcription_request(CLIPS, prompt="Names: Ada")
    ids = made.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    assert texts_of(made, ids) == [result.text for result in made.transcribe(CLIPS, prompt="Names: Ada")]


@pytest.mark.parametrize("kind", ["a second of silence", "window", "halves", "rejected", "projector"])
def test_fallbacks_are_those_of_transcribe(kind, monkeypatch):
    made = tiny.with_reader(word_bonus=1e3)
    made.reader.decoder.embed_tokens.weight.data[tiny.READER_END] = 0
    clip = np.concatenate([tiny.noise(1.5, 1), np.zeros(8000, np.float32), tiny.noise(1.0, 2)])
    gates = {"window": [["left_out"], []], "halves": [["left_out"], ["loop"], [], []], "rejected": [["no_speech"]]}
    gates["projector"] = [["loop"], ["loop"], []]
    monkeypatch.setattr(rescoring_voxlm, "in_doubt", lambda *_: kind == "a second of silence")

    def judge():
        fired = iter(gates.get(kind, [[]]))
        monkeypatch.setattr(fallback_voxlm, "fired_gates", lambda *_: next(fired))

    judge()
    result = made.transcribe(clip)
    found = result.segments[0]
    assert found["fallback"] == {"a second of silence": "window", "rejected": None}.get(kind, kind)
    assert bool(result.text) == (kind != "rejected")
    judge()
    ids = made.generate(**made.processor(clip, sampling_rate=16000))
    assert texts_of(made, ids) == [result.text]


def test_silence_has_no_text(model):
    silent = np.zeros(16000, np.float32)
    assert model.transcribe(silent).text == ""
    assert model.generate(**model.processor(silent, sampling_rate=16000)).tolist() == [[1]]


def test_encoder_states_have_no_fallback_that_encodes_anew(model, monkeypatch):
    monkeypatch.setattr(rescoring_voxlm, "in_doubt", lambda *_: False)
    features = model.processor(CLIPS)
    with torch.no_grad():
        encoded = model.encode_audio(**features)
    states = {"audio_states": encoded.last_hidden_state, "audio_states_mask": encoded.frame_mask}
    expected = [result.text for result in model.transcribe(CLIPS)]
    monkeypatch.setattr(rescoring_voxlm, "in_doubt", lambda *_: True)
    assert texts_of(model, model.generate(**states)) == expected


@pytest.mark.parametrize(
    "name", ["output_scores", "output_logits", "output_attentions", "output_hidden_states", "streamer"]
)
def test_outputs_of_each_step_are_refused_by_name(model, name):
    inputs = model.processor(CLIPS)
    with pytest.raises(ValueError, match=f"`{name}` .* `use_reader=False`"):
        model.generate(**inputs, **{name: True}, return_dict_in_generate=True)
    if name != "streamer":
        options = {name: True, "return_dict_in_generate": True, "max_new_tokens": 3}
        output = model.generate(**inputs, **options, use_reader=False)
        assert isinstance(output, GenerateDecoderOnlyOutput) and len(output[name.removeprefix("output_")]) <= 3


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"repetition_penalty": 2.0},
        {"do_sample": True, "temperature": 1e-4, "top_k": 0},
        {"past_key_values": DynamicCache},
    ],
    ids=str,
)
def test_searches_are_the_llm_alone_and_say_so(model, options, caplog):
    options = {name: value() if isinstance(value, type) else value for name, value in options.items()}
    logger = logging.getLogger("voxlm_hf.generation_voxlm")
    logger.warning_once.cache_clear()
    inputs = model.processor(CLIPS)
    logger.addHandler(caplog.handler)
    try:
        found = model.generate(**inputs, **options, max_new_tokens=5)
    finally:
        logger.removeHandler(caplog.handler)
    assert f"cannot follow {next(iter(options))}: `generate` is the LLM alone" in caplog.text.replace("do_sample, ", "")
    options = {name: DynamicCache() if name == "past_key_values" else value for name, value in options.items()}
    assert torch.equal(found, model.generate(**inputs, **options, max_new_tokens=5, use_reader=False))


def test_without_the_reader_the_llm_writes(model, expected):
    alone = [result.text for result in model.transcribe(CLIPS, use_reader=False)]
    assert alone != expected
    ids = model.generate(**model.processor(CLIPS), use_reader=False)
    assert [text.strip() for text in texts_of(model, ids)] == alone
    pipe = model.transcription_pipeline()
    assert [pipe(clip, generate_kwargs={"use_reader": False})["text"] for clip in CLIPS] == alone
    assert all("reader" not in score for score in model.transcribe(CLIPS[0], use_reader=False).word_scores)


def test_whether_to_use_the_reader_is_a_bool(model):
    for call in (lambda: model.transcribe(CLIPS[0], use_reader=0), lambda: model.generate(CLIPS[0], use_reader="no")):
        with pytest.raises(ValueError, match="`use_reader` must be True or False, got"):
            call()


@pytest.mark.parametrize(
    "audio",
    [CLIPS[0], CLIPS[0].tolist(), torch.from_numpy(CLIPS[0]), [CLIPS[0]], {"array": CLIPS[0], "sampling_rate": 16000}],
    ids=type,
)
def test_audio_may_be_the_processors_first_argument(model, audio):
    named = model.processor(audio=CLIPS[0], sampling_rate=16000)
    found = model.processor(audio, sampling_rate=16000, return_tensors="pt", padding="longest", truncation=False)
    assert set(found) == set(named) == {"input_features", "input_features_mask"}
    assert torch.equal(found["input_features"], named["input_features"])


@pytest.mark.parametrize("options", [{"language": "en", "task": "transcribe"}, {"language": ["en"] * 3}], ids=str)
def test_language_and_task_are_those_of_whisper(options):
    made = tiny.with_reader(word_bonus=1e3, language="en", languages={"en": 1})
    made.reader.decoder.embed_tokens.weight.data[tiny.READER_END] = 0
    ids = made.generate(**made.processor(CLIPS), **options)
    assert texts_of(made, ids) == [result.text for result in made.transcribe(CLIPS)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "translate"}, "`task` must be 'transcribe'"),
        ({"language": "de", "num_beams": 2}, "does not know the language 'de'"),
    ],
    ids=str,
)
def test_what_the_reader_is_not_asked_for(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**model.processor(CLIPS), **options)


# What features know of the samples


def speech_like(seconds):
    """Noise with a pause, and digital silence at the end."""
    waveform = tiny.noise(seconds, 5)
    waveform[int(0.4 * len(waveform)) : int(0.6 * len(waveform))] *= 0.001
    return waveform


@pytest.mark.parametrize("seconds", [0.3, 1.004, 4.0])
@pytest.mark.parametrize("level", [1.0, 1e-3])
def test_silence_behind_features_is_that_of_the_extractor(model, seconds, level):
    waveform = level * speech_like(seconds)
    processor = model.processor
    (clip,) = processor.extract_clips([waveform])
    (expected,) = processor.extract_clips([np.pad(waveform, (0, 16000))])
    found, own = silence_behind(processor, clip, 1.0), clip.shape[1]
    assert found.shape == expected.shape
    untouched = np.r_[: own - 2, own + 2 : found.shape[1]]
    np.testing.assert_allclose(found[:, untouched], expected[:, untouched], atol=1e-5)
    assert silence_behind(processor, clip, None).shape == (80, 3000)


@pytest.mark.parametrize("seconds", [0.5, 3.0, 12.3])
def test_activity_in_features_is_that_in_samples(model, seconds):
    waveform = speech_like(seconds)
    (segment,) = segment_audio([waveform], EnergyDetector(16000), 16000, 28.0)
    (clip,) = model.processor.extract_clips([waveform])
    assert active_seconds(model.processor, clip) == pytest.approx(segment.active_s, abs=0.1 + 0.02 * seconds)


@pytest.mark.parametrize("waveform", [np.zeros(32000), tiny.noise(2, 1) * 1e-5], ids=["zeros", "rounding noise"])
def test_silence_is_not_active(model, waveform):
    (clip,) = model.processor.extract_clips([waveform.astype(np.float32)])
    assert active_seconds(model.processor, clip) == 0.0


@pytest.mark.parametrize("encoder", ["whisper", "wav2vec2", "wav2vec2-bert", "parakeet_encoder"])
def test_halves_are_split_at_the_quietest_place_that_is_not_near_an_end(encoder):
    processor = tiny.model(encoder).processor
    parts = [np.zeros(8000), tiny.noise(2, 0), np.zeros(6400), tiny.noise(1.1, 1)]
    (clip,) = processor.extract_clips([np.concatenate(parts).astype(np.float32)])
    (left, right), share = halves(processor, clip)
    assert left.shape[processor.time_axis] + right.shape[processor.time_axis] == clip.shape[processor.time_axis]
    assert share == pytest.approx(2.7 / 4.0, abs=0.06)


def test_features_that_are_zero_at_the_end_are_padding():
    features = torch.ones(3, 80, 5)
    features[0, :, 3:], features[1, :, 1], features[2] = 0.0, 0.0, 0.0
    expected = [[1, 1, 1, 0, 0], [1] * 5, [1] * 5]
    assert feature_mask(features, 2).tolist() == feature_mask(features.transpose(1, 2), 1).tolist() == expected
    assert feature_mask(torch.zeros(2, 4), 1).tolist() == [[1] * 4] * 2
