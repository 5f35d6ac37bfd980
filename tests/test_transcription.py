"""Long audio, batches and words, with a tiny random model."""

import numpy as np
import pytest
import soundfile
import torch

from tests import tiny
from voxlm_hf import transcription_voxlm
from voxlm_hf.transcription_voxlm import VoxLMTranscription, _as_one, prompt_with_audio, word_confidence


@pytest.fixture(scope="module")
def model():
    return tiny.model(llm="qwen3")  # a random model that does not stop at once


def test_words_are_ordered_and_inside_a_long_recording(model):
    result = model.transcribe(tiny.noise(7.3), chunk_length_s=2, max_new_tokens=8)
    assert result.duration == 7.3 and result.truncated
    assert len(result.words) > 3
    assert " ".join(word["word"] for word in result.words).split() == result.text.split()
    times = [time for word in result.words for time in (word["start"], word["end"])]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 7.3
    assert all(0 <= word["confidence"] <= 1 for word in result.words)
    assert any(word["start"] > 4 for word in result.words)


def test_the_text_does_not_depend_on_times_batch_or_order(model):
    clips = [tiny.noise(seconds, seed) for seed, seconds in enumerate((2.0, 0.5, 1.3))]
    together = model.transcribe(clips, max_new_tokens=6)
    assert [result.text for result in model.transcribe(clips, max_new_tokens=6, return_timestamps=False)] == [
        result.text for result in together
    ]
    for clip, result in zip(clips, together):
        alone = model.transcribe(clip, max_new_tokens=6)
        assert alone.text == result.text
        for first, second in zip(alone.words, result.words):
            assert first["word"] == second["word"]
            assert first["start"] == pytest.approx(second["start"], abs=0.021)
            assert first["confidence"] == pytest.approx(second["confidence"], abs=1e-3)
    assert model.transcribe(clips, max_new_tokens=6, return_timestamps=False)[0].words == []
    small = model.transcribe(clips, max_new_tokens=6, batch_size=1)
    assert [result.text for result in small] == [result.text for result in together]


def test_word_confidence_is_the_probability_of_its_tokens(model):
    """Against the scores that stock `generate` returns."""
    import torch

    clip = tiny.noise(1.5, 3)
    result = model.transcribe(clip, max_new_tokens=6)
    inputs = model.processor.apply_transcription_request(clip)
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logprobs = [float(torch.log_softmax(step[0], -1)[token]) for step, token in zip(output.logits, ids)]
    words = model.processor.split_words(ids)
    assert [word.text for word in words] == [word["word"] for word in result.words]
    for word, timed in zip(words, result.words):
        assert timed["confidence"] == pytest.approx(np.exp(sum(logprobs[token] for token in word.tokens)), abs=2e-4)


def test_words_of_a_model_on_the_full_window_end_with_the_recording():
    model = tiny.model(llm="qwen3", pad_audio_to_window=True)
    result = model.transcribe(tiny.noise(1.5), max_new_tokens=6)
    assert result.duration == 1.5 and result.words
    assert all(0 <= word["start"] < word["end"] <= 1.5 for word in result.words)


def test_beams_and_sampling_go_through(model):
    beams = model.transcribe(tiny.noise(1), num_beams=2, max_new_tokens=4)
    sampled = model.transcribe(tiny.noise(1), do_sample=True, temperature=2.0, max_new_tokens=4)
    assert beams.words is not None and sampled.words is not None


def test_only_word_times_cost_a_second_pass(model):
    passes, counts = [], []
    hook = model.language_model.register_forward_hook(lambda *_: passes.append(1))
    for times in (False, "word"):
        passes.clear()
        model.transcribe(tiny.noise(1), num_beams=2, max_new_tokens=4, return_timestamps=times)
        counts.append(len(passes))
    hook.remove()
    assert counts[1] == counts[0] + 1


def test_the_token_budget_is_each_recordings_own():
    """A model that never stops is cut at the same place alone and in a batch, and says so."""
    model = tiny.model(llm="phi3")
    model.generation_config.eos_token_id = None
    clips = [tiny.noise(0.3), tiny.noise(1.0)]
    together = model.transcribe(clips, return_timestamps=False)
    assert [len(result.text) > 0 and result.truncated for result in together] == [True, True]
    assert model.transcribe(clips[0], return_timestamps=False).text == together[0].text
    assert len(together[0].text) < len(together[1].text)


def test_confidence_is_monotone_and_the_probability_by_default():
    values = [1e-4, 0.01, 0.3, 0.5, 0.99, 1 - 1e-4]

    def confidence(logprob, entropy, scale, weight, bias, **reader):
        calibration = {"scale": scale, "entropy": weight, "bias": bias, "reader": 0.3}
        return word_confidence({"logprob": logprob, "entropy": entropy, **reader}, calibration)

    plain = [confidence(np.log(value), 3.0, 1.0, 0.0, 0.0) for value in values]
    assert plain == pytest.approx(values, abs=1e-9)
    mapped = [confidence(np.log(value), 1.0, 0.6, 0.2, -0.5) for value in values]
    assert mapped == sorted(mapped) and mapped[0] >= 0 and mapped[-1] <= 1
    spread = [confidence(np.log(0.8), entropy, 0.6, 0.2, -0.5) for entropy in (0.0, 0.5, 3.0)]
    assert spread == sorted(spread, reverse=True)
    assert spread[1] == pytest.approx(1 / (1 + np.exp(-(0.6 * np.log(4) - 0.1 - 0.5))))  # by hand
    assert confidence(-1000.0, 8.0, 1.0, 1.0, 0.0) >= 0
    read = [confidence(np.log(0.8), 0.5, 0.6, 0.2, -0.5, reader=np.log(value)) for value in values]
    assert read == sorted(read)
    assert read[4] == pytest.approx(1 / (1 + np.exp(-(0.6 * np.log(4) + 0.3 * np.log(99) - 0.1 - 0.5))))  # by hand


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"chunk_length_s": 0.5}, "chunk_length_s"),
        ({"prompt": ["a", "b"]}, "2 prompts for 1 recordings"),
        ({"max_new_tokenz": 3}, "max_new_tokenz"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.transcribe(tiny.noise(1), **options)


def test_a_model_without_a_checkpoint_says_where_its_processor_should_come_from():
    model = tiny.model()
    model.processor, model.config._name_or_path = None, ""
    with pytest.raises(ValueError, match="model.processor"):
        model.transcribe(tiny.noise(1))


def test_a_bad_recording_spoils_no_other(model, tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio")
    clip = tiny.noise(1.2, 4)
    nan = np.where(np.arange(16000) == 500, np.nan, 0.1)
    results = model.transcribe([clip, tmp_path / "text.wav", nan, tmp_path / "missing.wav", clip], max_new_tokens=6)
    assert results[0].text == results[4].text == model.transcribe(clip, max_new_tokens=6).text
    assert [result.error is None for result in results] == [True, False, False, False, True]
    assert "Cannot read" in results[1].error and "NaN" in results[2].error and "No such audio file" in results[3].error
    assert results[1].text == "" and results[1].words == []
    for bad, error in ((tmp_path / "text.wav", ValueError), (nan, ValueError), (tmp_path / "missing.wav", OSError)):
        with pytest.raises(error):
            model.transcribe(bad)


def test_a_stream_yields_what_the_whole_holds(model, tmp_path):
    recording = np.concatenate(
        [tiny.noise(3, 0), np.zeros(8000, np.float32), tiny.noise(3, 1), np.zeros(50000, np.float32)]
    )
    recording = np.concatenate([recording, tiny.noise(4, 2)])
    soundfile.write(tmp_path / "long.wav", recording, 16000, subtype="FLOAT")
    options = {"chunk_length_s": 4, "max_new_tokens": 5}
    whole = model.transcribe(tmp_path / "long.wav", **options)
    segments = list(model.transcribe(tmp_path / "long.wav", stream=True, batch_size=2, **options))
    assert len(segments) == len(whole.segments) > 2
    assert [segment.text for segment in segments] == [segment["text"] for segment in whole.segments]
    assert [word["word"] for part in segments for word in part.words] == [word["word"] for word in whole.words]
    assert not any(6.8 < word["start"] < 9.3 for word in whole.words)  # the pause
    both = list(model.transcribe([recording, recording[:32000]], stream=True, **options))
    assert both[0].text == whole.text and len(both) == 2


def test_the_text_does_not_depend_on_the_rate_of_the_file(model, tmp_path):
    eight_channels = np.stack([tiny.noise(1.5, seed) for seed in range(8)], axis=1)
    soundfile.write(tmp_path / "many.wav", eight_channels, 16000, subtype="FLOAT")
    assert model.transcribe(tmp_path / "many.wav", max_new_tokens=5).text == (
        model.transcribe(eight_channels.T, max_new_tokens=5).text
    )
    for rate in (8000, 192000):
        soundfile.write(tmp_path / "rate.wav", tiny.noise(25, 3), rate, subtype="FLOAT")
        samples, _ = soundfile.read(tmp_path / "rate.wav", dtype="float32")
        array = {"array": samples, "sampling_rate": rate}
        assert model.transcribe(tmp_path / "rate.wav", max_new_tokens=5).text == (
            model.transcribe(array, max_new_tokens=5).text
        )


def test_a_file_that_ends_early_is_transcribed_with_a_warning(model, tmp_path, caplog):
    soundfile.write(tmp_path / "whole.wav", tiny.noise(4, 1), 16000)
    content = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[: len(content) // 2])
    result = model.transcribe(tmp_path / "cut.wav", max_new_tokens=5)
    assert result.duration == pytest.approx(2.0, abs=0.01)


def test_silence_gives_nothing(model):
    for waveform in (np.zeros(16000, np.float32), np.zeros(100 * 16000, np.float32)):
        result = model.transcribe(waveform)
        assert (result.text, result.words, result.segments) == ("", [], []) and result.duration == len(waveform) / 16000


def test_a_gate_that_fires_leads_to_a_fallback():
    """A random model never stops by itself, so the budget fires; its samples do not pass either."""
    fields = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3}
    gates = {"compression_ratio": 2.4, "mean_logprob": -100.0}
    model = tiny.model(llm="qwen3", quality_gates=gates, fallback_temperatures=[0.5], **fields)
    clips = [tiny.noise(1.5, seed) for seed in range(4)]
    texts = [model.transcribe(clip) for clip in clips]
    assert {result.segments[0]["fallback"] for result in texts} == {"projector"}
    assert not any(result.truncated for result in texts)
    assert [result.text for result in model.transcribe(clips)] == [result.text for result in texts]
    assert [result.text for result in model.transcribe(clips, return_timestamps=False)] == [
        result.text for result in texts
    ]
    plain = tiny.model(llm="qwen3", quality_gates={"mean_logprob": -0.5}, fallback_temperatures=[0.5, 1.0])
    first, again = plain.transcribe(clips[0]), plain.transcribe(clips)[0]
    assert first.text == again.text and "mean_logprob" in first.segments[0]["gates"]


def test_hidden_frames_are_left_out_without_a_difference():
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.5)
    clips = [tiny.noise(seconds, 5) for seconds in (2.0, 0.8)]
    inputs = model.processor.apply_transcription_request(clips)
    audio = model.get_audio_features(
        input_features=inputs["input_features"], input_features_mask=inputs["input_features_mask"]
    )
    prompt = prompt_with_audio(model, inputs, audio)
    assert prompt["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(model(**prompt).logits[:, -1], model(**inputs).logits[:, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options, message", [({"vad": "loud"}, "`vad` must be one of"), ({"batch_size": 0}, "batch_size")]
)
def test_arguments_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.transcribe(tiny.noise(1), **options)


def test_parts_that_were_rejected_are_no_part_of_the_whole():
    def part(start, text, gates, **more):
        segment = {"start": start, "end": start + 2.0, "text": text, "mean_logprob": -start, "gates": gates, **more}
        return VoxLMTranscription(text, [{"word": text}] if text else [], 2.0, False, [{}], [segment])

    music = part(0.0, "", ["no_speech"], rejected="you", fallback=None)
    whole = _as_one([music, part(2.0, "so", [], fallback=None), part(4.0, "be it", ["loop"], fallback=None)])
    assert (whole.text, whole.duration, [word["word"] for word in whole.words]) == ("so be it", 6.0, ["so", "be it"])
    assert whole.segments == [
        {"start": 0.0, "end": 6.0, "text": "so be it", "mean_logprob": -4.0, "gates": ["loop"], "fallback": None}
    ]
    assert _as_one([music]).segments[0]["rejected"] == "you"


def test_a_piece_of_which_something_was_left_out_is_read_in_halves(monkeypatch):
    """Three readings, of the whole and of both halves; the gate fires for the first one alone."""
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.3)
    gates = iter([["left_out"], [], []])
    monkeypatch.setattr(transcription_voxlm, "fired_gates", lambda *inputs: next(gates))
    clip = np.concatenate([tiny.noise(1.5, 1), np.zeros(8000, np.float32), tiny.noise(1.0, 2)])
    result = model.transcribe(clip)
    (segment,) = result.segments
    assert (segment["fallback"], segment["start"], segment["end"]) == ("halves", 0.0, 3.0)
    assert result.text and result.text == segment["text"] and result.duration == 3.0
    times = [time for word in result.words for time in (word["start"], word["end"])]
    assert times == sorted(times) and times[-1] <= 3.0 and len(result.word_scores) == len(result.words)
    assert any(end <= 2.0 for end in times[1::2]) and any(start >= 1.5 for start in times[::2])
    assert next(gates, None) is None
