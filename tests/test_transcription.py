"""`transcribe` from end to end with a tiny random model; joining segments; word confidence."""

import copy
import json
import math
import os
import pickle

import numpy as np
import pytest
import soundfile
import torch

from tests import tiny
from voxlm_hf import audio_voxlm
from voxlm_hf.confidence_voxlm import probability_logit, word_confidence
from voxlm_hf.decoding_voxlm import DecodedText
from voxlm_hf.transcription_voxlm import (
    Segment,
    join_point,
    join_segments,
    merge_segments,
    shift_into_order,
    trim_overlap,
    word_scores,
)


@pytest.fixture(scope="module")
def model():
    return tiny.model(llm="qwen3")  # a random model that does not stop at once


def texts_of(results):
    return [result.text for result in results]


# Words and batches


@pytest.fixture(scope="module")
def long(model):
    """The result for 7.3 seconds in segments of at most 2."""
    return model.transcribe(tiny.noise(7.3), chunk_length_s=2, max_new_tokens=8)


def test_a_long_recording_is_transcribed_to_its_end(long):
    assert long.duration == 7.3 and len(long.segments) >= 4
    assert any(word["start"] > 6 for word in long.words)


def test_words_are_ordered_and_inside_the_recording(long):
    times = [time for word in long.words for time in (word["start"], word["end"])]
    assert len(times) > 6 and times == sorted(times) and times[0] >= 0 and times[-1] <= 7.3


def test_words_are_those_of_the_text(long):
    assert " ".join(word["word"] for word in long.words).split() == long.text.split()
    assert all(0 <= word["confidence"] <= 1 for word in long.words)


def test_a_text_that_the_budget_ended_is_truncated(long):
    assert long.truncated


def test_segments_say_everything_about_themselves(long):
    for segment in long.segments:
        assert set(segment) == {"start", "end", "text", "mean_logprob", "gates", "fallback", "rejected"}


CLIPS = [tiny.noise(seconds, seed) for seed, seconds in enumerate((2.0, 0.5, 1.3))]


@pytest.fixture(scope="module")
def together(model):
    results = model.transcribe(CLIPS, max_new_tokens=6)
    assert any(result.words for result in results)
    return results


def test_the_text_does_not_depend_on_the_batch(model, together):
    assert [model.transcribe(clip, max_new_tokens=6).text for clip in CLIPS] == texts_of(together)
    assert texts_of(model.transcribe(CLIPS, max_new_tokens=6, batch_size=1)) == texts_of(together)


def test_the_text_does_not_depend_on_the_order(model, together):
    assert texts_of(model.transcribe(CLIPS[::-1], max_new_tokens=6)) == texts_of(together)[::-1]


def test_word_times_do_not_depend_on_the_batch(model, together):
    for clip, result in zip(CLIPS, together):
        alone = model.transcribe(clip, max_new_tokens=6)
        for first, second in zip(alone.words, result.words, strict=True):
            assert first["word"] == second["word"]
            assert first["start"] == pytest.approx(second["start"], abs=0.021)
            assert first["confidence"] == pytest.approx(second["confidence"], abs=1e-3)


def test_the_text_does_not_depend_on_timestamps(model, together):
    plain = model.transcribe(CLIPS, max_new_tokens=6, return_timestamps=False)
    assert texts_of(plain) == texts_of(together)
    assert all(result.words == [] and result.word_scores == [] for result in plain)


def test_word_confidence_is_the_probability_of_its_tokens(model):
    """Against the scores that stock `generate` returns."""
    clip = tiny.noise(1.5, 3)
    result = model.transcribe(clip, max_new_tokens=6)
    inputs = model.processor.apply_transcription_request(clip)
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logprobs = [float(torch.log_softmax(step[0], -1)[token]) for step, token in zip(output.logits, ids)]
    words = model.processor.split_words(ids)
    assert [word.text for word in words] == [word["word"] for word in result.words] != []
    for word, timed in zip(words, result.words):
        assert timed["confidence"] == pytest.approx(np.exp(sum(logprobs[token] for token in word.tokens)), abs=2e-4)


def test_words_of_a_model_on_the_full_window_end_with_the_recording():
    model = tiny.model(llm="qwen3", pad_audio_to_window=True)
    result = model.transcribe(tiny.noise(1.5), max_new_tokens=6)
    assert result.duration == 1.5 and result.words
    assert all(0 <= word["start"] < word["end"] <= 1.5 for word in result.words)


def test_the_token_budget_is_each_recordings_own():
    """A model that never stops is cut at the same place alone and in a batch, and says so."""
    model = tiny.model(llm="phi3")
    model.generation_config.eos_token_id = None
    clips = [tiny.noise(0.3), tiny.noise(1.0)]
    together = model.transcribe(clips, return_timestamps=False)
    assert all(result.text and result.truncated for result in together)
    assert model.transcribe(clips[0], return_timestamps=False).text == together[0].text
    assert len(together[0].text) < len(together[1].text)


# Beams and sampling


def total_logprob(result):
    return sum(score["logprob"] for score in result.word_scores)


def test_beams_find_a_text_at_least_as_likely_as_greedy(model):
    """By the model's own scores of the words; texts of eight tokens, none of which ends."""
    clip, options = tiny.noise(1, 2), {"max_new_tokens": 8, "length_penalty": 0.0}
    greedy, beams = (model.transcribe(clip, num_beams=count, **options) for count in (1, 6))
    assert greedy.words and beams.words and greedy.truncated and beams.truncated
    assert total_logprob(beams) >= total_logprob(greedy) - 1e-3


def test_one_beam_is_greedy(model):
    clip = tiny.noise(1, 2)
    assert model.transcribe(clip, num_beams=1, max_new_tokens=6) == model.transcribe(clip, max_new_tokens=6)


def test_samples_follow_the_seed_and_the_temperature(model):
    def sample(seed, temperature):
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": 8}
        return model.transcribe(tiny.noise(1), **options).text

    assert sample(0, 2.0) == sample(0, 2.0) != sample(1, 2.0)
    assert sample(0, 1e-4) == model.transcribe(tiny.noise(1), max_new_tokens=8).text


def test_words_of_beams_cost_a_second_pass_and_their_text_none(model):
    passes, counts = [], []
    hook = model.language_model.register_forward_hook(lambda *_: passes.append(1))
    for times in (False, "word"):
        passes.clear()
        model.transcribe(tiny.noise(1), num_beams=2, max_new_tokens=4, return_timestamps=times)
        counts.append(len(passes))
    hook.remove()
    assert counts[1] == counts[0] + 1


def test_words_of_greedy_search_cost_no_pass(model):
    passes, counts = [], []
    hook = model.language_model.register_forward_hook(lambda *_: passes.append(1))
    for times in (False, "word"):
        passes.clear()
        model.transcribe(tiny.noise(1), max_new_tokens=4, return_timestamps=times)
        counts.append(len(passes))
    hook.remove()
    assert counts[0] == counts[1] > 0


# Recordings good and bad


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"chunk_length_s": 0.5}, "chunk_length_s"),
        ({"prompt": ["a", "b"]}, "2 prompts for 1 recordings"),
        ({"max_new_tokenz": 3}, "max_new_tokenz"),
        ({"vad": "loud"}, "`vad` must be one of"),
    ],
)
def test_arguments_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.transcribe(tiny.noise(1), **options)


NAN = np.where(np.arange(16000) == 500, np.nan, 0.1)


@pytest.fixture
def bad(tmp_path):
    """What cannot be read, the error when it is the only recording, and what it says."""
    (tmp_path / "text.wav").write_text("this is no audio")
    return [
        (tmp_path / "text.wav", ValueError, "Cannot read"),
        (NAN, ValueError, "NaN"),
        (tmp_path / "missing.wav", FileNotFoundError, "No such audio file"),
    ]


def test_a_bad_recording_spoils_no_other(model, bad):
    clip = tiny.noise(1.2, 4)
    first, *others, last = model.transcribe([clip, *(item for item, _, _ in bad), clip], max_new_tokens=6)
    assert first == last == model.transcribe(clip, max_new_tokens=6) and first.error is None
    for result, (_, _, message) in zip(others, bad, strict=True):
        assert message in result.error and (result.text, result.words) == ("", [])


def test_a_bad_recording_by_itself_is_an_error(model, bad):
    for item, error, message in bad:
        with pytest.raises(error, match=message):
            model.transcribe(item)


@pytest.fixture
def paused(tmp_path):
    """A file with pauses at 3 to 3.5 s and 6.5 to 9.6 s."""
    parts = [tiny.noise(3, 0), np.zeros(8000), tiny.noise(3, 1), np.zeros(50000), tiny.noise(4, 2)]
    soundfile.write(tmp_path / "long.wav", np.concatenate(parts), 16000, subtype="FLOAT")
    return tmp_path / "long.wav"


OPTIONS = {"chunk_length_s": 4, "max_new_tokens": 5}


def test_a_stream_yields_the_segments_of_the_whole(model, paused):
    whole = model.transcribe(paused, **OPTIONS)
    segments = list(model.transcribe(paused, stream=True, batch_size=2, **OPTIONS))
    assert len(segments) == len(whole.segments) > 2
    assert texts_of(segments) == [segment["text"] for segment in whole.segments]
    assert [word["word"] for segment in segments for word in segment.words] == [word["word"] for word in whole.words]


def test_nothing_is_said_in_a_pause(model, paused):
    result = model.transcribe(paused, **OPTIONS)
    assert result.words and not any(6.8 < word["start"] < 9.3 for word in result.words)


def test_a_stream_of_a_list_yields_recordings(model, paused):
    samples, _ = soundfile.read(paused, dtype="float32")
    both = list(model.transcribe([samples, samples[:32000]], stream=True, **OPTIONS))
    assert texts_of(both) == texts_of(model.transcribe([samples, samples[:32000]], **OPTIONS))


def test_eight_channels_of_a_file_are_mixed(model, tmp_path):
    channels = np.stack([tiny.noise(1.5, seed) for seed in range(8)], axis=1)
    soundfile.write(tmp_path / "many.wav", channels, 16000, subtype="FLOAT")
    expected = model.transcribe(channels.mean(axis=1), max_new_tokens=5)
    assert model.transcribe(tmp_path / "many.wav", max_new_tokens=5).text == expected.text


@pytest.mark.parametrize("rate", [8000, 192000])
def test_a_file_is_resampled_like_an_array(model, tmp_path, rate):
    soundfile.write(tmp_path / "rate.wav", tiny.noise(25, 3), rate, subtype="FLOAT")
    samples, _ = soundfile.read(tmp_path / "rate.wav", dtype="float32")
    expected = model.transcribe({"array": samples, "sampling_rate": rate}, max_new_tokens=5)
    assert model.transcribe(tmp_path / "rate.wav", max_new_tokens=5).text == expected.text


def first_half(path):
    """A file of four seconds without the second half of its bytes."""
    soundfile.write(path, tiny.noise(4, 1), 16000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize("name", ["cut.mp3", "cut.wav", "cut.flac"])
def test_a_file_that_ends_before_its_header_says_is_transcribed_with_a_warning(model, tmp_path, monkeypatch, name):
    warnings = []
    monkeypatch.setattr(audio_voxlm.logger, "warning", warnings.append)
    result = model.transcribe(first_half(tmp_path / name), max_new_tokens=5)
    assert result.duration == pytest.approx(2.0, abs=0.3) and result.text
    (warning,) = warnings
    assert f"{name}: only {result.duration:.2f} s of the 4.00 s that the header announces" in warning


def test_a_recording_that_is_none_spoils_no_other(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    bad = [
        torch.zeros(9).to_sparse(),
        torch.zeros(9, device="meta"),
        tmp_path / "pipe",
        "\0",
        {"array": [0.1]},
        object(),
    ]
    good = tiny.noise(1)
    results = model.transcribe([*bad, good], max_new_tokens=5)
    assert all(result["error"] for result in results[:-1])
    assert results[-1].text == model.transcribe(good, max_new_tokens=5).text


@pytest.mark.parametrize("seconds", [1, 100])
def test_silence_gives_nothing(model, seconds):
    result = model.transcribe(np.zeros(seconds * 16000, np.float32))
    assert (result.text, result.words, result.segments, result.duration) == ("", [], [], seconds)


# Joining segments


def timed(*items):
    """Words of 0.2 s from pairs of text and start."""
    return [{"word": word, "start": start, "end": start + 0.2} for word, start in items]


def test_overlapping_segments_are_joined_by_the_words_that_both_contain():
    left = timed(("we", 7.0), ("saw", 8.1), ("the", 8.5), ("river", 9.0), ("b", 9.8))
    right = timed(("he", 8.0), ("the", 8.52), ("river", 9.05), ("bank", 9.8), ("again", 10.4))
    assert join_point(left, right, 8.0, 10.0) == (4, 3)


def test_the_same_words_far_apart_are_a_repetition():
    left, right = timed(("no", 8.1)), timed(("no", 9.5))
    assert join_point(left, right, 8.0, 10.0) == (1, 0)


def test_overlapping_segments_without_a_word_in_common_are_joined_in_the_middle():
    left = timed(("one", 7.0), ("two", 8.2), ("tree", 9.4))
    right = timed(("too", 8.2), ("three", 9.4), ("four", 10.4))
    assert join_point(left, right, 8.0, 10.0) == (2, 1)
    assert join_point([], right, 8.0, 10.0) == (0, 1)
    assert join_point(left, [], 8.0, 10.0) == (2, 0)


def test_trimming_keeps_text_and_words_together():
    left = Segment(0.0, 3.0, "so, we saw the...", timed(("so,", 0.2), ("we", 1.0), ("saw", 2.2), ("the...", 2.6)))
    right = Segment(2.0, 5.0, "saw the fox", timed(("saw", 2.2), ("the", 2.6), ("fox", 3.4)))
    left.word_scores, right.word_scores = [{"n": n} for n in range(4)], [{"n": n} for n in range(3)]
    trim_overlap(left, right)
    assert (left.text, right.text) == ("so, we saw", "the fox")
    for segment in (left, right):
        assert " ".join(word["word"] for word in segment.words) == segment.text
        assert len(segment.word_scores) == len(segment.words)
    assert left.end == right.start


def test_words_that_overlap_make_room_for_one_another():
    words = [{"start": 1.0, "end": 1.5}, {"start": 1.2, "end": 1.3}, {"start": 2.0, "end": 2.5}]
    shift_into_order(words, 1.4)
    assert [(word["start"], word["end"]) for word in words] == [(1.4, 1.5), (1.5, 1.52), (2.0, 2.5)]


def part(start, text, gates=(), mean_logprob=-1.0, **fields):
    words = timed((text, start)) if text else []
    return Segment(start, start + 2, text, words, [{}] * len(words), mean_logprob, gates=list(gates), **fields)


def test_a_recording_is_the_sum_of_its_segments():
    whole = join_segments([part(0.0, "so"), part(2.0, "be it", truncated=True)], 4.00049)
    assert (whole.text, whole.duration, whole.truncated) == ("so be it", 4.0, True)
    assert [word["start"] for word in whole.words] == [0.0, 2.0]
    assert [(segment["start"], segment["end"], segment["text"]) for segment in whole.segments] == [
        (0.0, 2.0, "so"),
        (2.0, 4.0, "be it"),
    ]


def test_merged_segments_are_as_doubtful_as_the_most_doubtful():
    merged = merge_segments([part(0.0, "so", ["loop"], -0.5), part(2.0, "be it", ["mean_logprob"], -3.0)])
    assert (merged.start, merged.end, merged.text) == (0.0, 4.0, "so be it")
    assert (merged.gates, merged.mean_logprob) == (["loop", "mean_logprob"], -3.0)


def test_rejected_segments_do_not_count_unless_all_are():
    music = part(0.0, "", ["no_speech"], -9.0, rejected="you")
    merged = merge_segments([music, part(2.0, "so"), part(4.0, "be it", ["loop"])])
    assert (merged.start, merged.end, merged.text) == (0.0, 6.0, "so be it")
    assert (merged.gates, merged.mean_logprob, merged.rejected) == (["loop"], -1.0, None)
    assert merge_segments([music]).rejected == "you"


# Confidence

PLAIN = {"scale": 1.0, "entropy": 0.0, "bias": 0.0}
CALIBRATED = {"scale": 0.6, "entropy": 0.2, "bias": -0.5, "reader": 0.3, "posterior": 0.4}
PROBABILITIES = [1e-4, 0.01, 0.3, 0.5, 0.99, 1 - 1e-4]


def confidence(probability, entropy, calibration, **reader):
    return word_confidence({"logprob": math.log(probability), "entropy": entropy, **reader}, calibration)


def test_word_scores_are_sums_and_maxima_over_a_words_tokens():
    text = DecodedText(
        [7, 8, 9],
        True,
        logprobs=torch.tensor([-1.0, -0.5, -0.25]),
        entropies=torch.tensor([0.1, 2.0, 0.3]),
        words=["ab", "c"],
        token_words=np.array([0, 0, 1]),
        reader_logprobs=[-4.0, -5.0],
        posteriors=[0.75, 1.0],
    )
    assert word_scores(text) == [
        {"logprob": -1.5, "entropy": 2.0, "reader": -4.0, "posterior": 0.75},
        {"logprob": -0.25, "entropy": pytest.approx(0.3), "reader": -5.0, "posterior": 1.0},
    ]


def test_confidence_is_the_probability_by_default():
    assert [confidence(p, 3.0, PLAIN) for p in PROBABILITIES] == pytest.approx(PROBABILITIES, abs=1e-9)


def test_confidence_grows_with_the_llms_probability():
    mapped = [confidence(p, 1.0, CALIBRATED) for p in PROBABILITIES]
    assert mapped == sorted(set(mapped)) and mapped[0] >= 0 and mapped[-1] <= 1


def test_confidence_grows_with_the_readers_probability():
    mapped = [confidence(0.8, 0.5, CALIBRATED, reader=math.log(p)) for p in PROBABILITIES]
    assert mapped == sorted(set(mapped))


def test_confidence_falls_with_entropy():
    mapped = [confidence(0.8, entropy, CALIBRATED, reader=-0.5) for entropy in (0.0, 0.5, 3.0)]
    assert mapped == sorted(set(mapped), reverse=True)


@pytest.mark.parametrize(
    "reader, log_odds",
    [
        ({}, math.log(4)),  # the map is for the reader's words
        ({"reader": math.log(0.99)}, 0.6 * math.log(4) + 0.3 * math.log(99) - 0.6),
        ({"reader": math.log(0.99), "posterior": 0.8}, 1.0 * math.log(4) + 0.3 * math.log(99) - 0.6),
        ({"reader": math.log(0.5), "posterior": 0.0}, 0.6 * math.log(4) - 0.4 * math.log(9999) - 0.6),
        ({"reader": math.log(0.5), "posterior": 1.0}, 0.6 * math.log(4) + 0.4 * math.log(9999) - 0.6),
    ],
    ids=["LLM", "LLM and reader", "and list", "impossible", "certain"],
)
def test_confidence_by_hand(reader, log_odds):
    """p = 0.8, so odds of 4; q = 0.99, so odds of 99; entropy 0.5."""
    assert confidence(0.8, 0.5, CALIBRATED, **reader) == pytest.approx(1 / (1 + math.exp(-log_odds)))


@pytest.mark.parametrize("logprob, expected", [(-1000.0, math.log(1e-4 / (1 - 1e-4))), (0.0, math.log(9999))])
def test_log_odds_stay_finite(logprob, expected):
    assert probability_logit(logprob) == pytest.approx(expected)


def test_a_word_inside_another_words_token_has_that_tokens_score():
    """Two characters in one token, as in scripts without spaces."""
    logprobs, entropies = torch.tensor([-1.0, -2.0]), torch.tensor([0.1, 0.2])
    text = DecodedText([5, 6], True, logprobs=logprobs, entropies=entropies, words=["你", "好", "a"])
    text.token_words = np.array([1, 2])
    assert [score["logprob"] for score in word_scores(text)] == [-1.0, -1.0, -2.0]


def test_a_result_always_has_its_error():
    good, bad = join_segments([], 1.0), join_segments([], 1.0, "no such file")
    for result, error in ((good, None), (bad, "no such file")):
        assert "error" in result and result["error"] == result.get("error", 0) == result.error == error
        assert json.loads(json.dumps(result))["error"] == error
        assert copy.deepcopy(result) == result == pickle.loads(pickle.dumps(result))


def test_one_recording_that_cannot_be_aligned_leaves_the_others_alone():
    model, clip = tiny.model(llm="qwen3"), tiny.noise(1.0)
    results = model.align([clip, "no such.wav", clip, clip], ["the fox", "a", "", "dog"])
    assert [result["error"] is None for result in results] == [True, False, False, True]
    assert "no such.wav" in results[1].error and "no words" in results[2].error and results[1].words == []
    alone = model.align(clip, "dog")
    assert alone.error is None and results[3] == alone
    for audio, text, error in (("no such.wav", "a", FileNotFoundError), (clip, "", ValueError)):
        with pytest.raises(error):
            model.align(audio, text)
