"""Training batches: what the model's `forward` takes, and the word times that the alignment head learns from."""

import math

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf.collator_voxlm import word_targets


@pytest.fixture(scope="module")
def processor():
    return tiny.model().processor


def word(text, start, end):
    return {"word": text, "start": start, "end": end}


def row(text="the fox", seconds=1.0, **fields):
    return {"audio": tiny.noise(seconds), "text": text, **fields}


# Batches


def test_a_batch_is_what_apply_transcription_request_makes(processor):
    rows = [row("the fox", 1.0), row("over the lazy dog", 0.6)]
    batch = processor.collate(rows)
    expected = processor.apply_transcription_request(
        [item["audio"] for item in rows], text=[item["text"] for item in rows]
    )
    assert set(batch) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


def test_rows_may_hold_encoder_states(processor):
    states = [torch.randn(50, 16), torch.randn(23, 16)]
    batch = processor.collate([{"states": item, "text": "the fox"} for item in states])
    assert batch["audio_states"].shape == (2, 50, 16)
    assert batch["audio_states_mask"].sum(-1).tolist() == [50, 23]
    for number, item in enumerate(states):
        assert torch.equal(batch["audio_states"][number, : len(item)], item)
    placeholders = (batch["input_ids"] == processor.audio_token_id).sum(-1)
    assert placeholders.tolist() == [13, 6]  # one for four states


def test_states_give_the_loss_of_the_audio_they_come_from():
    model = tiny.model()
    rows = [row("the fox", 1.0), row("dog", 0.6)]
    batch = model.processor.collate(rows)
    with torch.no_grad():
        encoded = model.encode_audio(batch["input_features"], batch["input_features_mask"])
        stored = [states[mask.bool()] for states, mask in zip(encoded.last_hidden_state, encoded.frame_mask)]
        again = model.processor.collate([{"states": s, "text": r["text"]} for s, r in zip(stored, rows)])
        assert float(model(**again).loss) == pytest.approx(float(model(**batch).loss), abs=1e-5)


def test_without_word_times_there_are_no_targets(processor):
    assert not {"token_words", "word_times", "frame_times"} & set(processor.collate([row(), row(words=[])]))


@pytest.fixture(scope="module")
def timed(processor):
    """A row with word times and one without."""
    words = [word("the", 0.2, 0.4), word("fox", 0.4, 0.9)]
    return processor.collate([row("the fox", words=words), row("dog")])


def test_each_text_token_has_its_word(processor, timed):
    labels, words = timed["labels"][0], timed["token_words"][0]
    for number, text in enumerate(("the", "fox")):
        assert processor.tokenizer.decode(labels[words == number]).strip() == text
    assert (words[labels == -100] == -100).all() and words[-1] == -100  # neither prompt nor eos is a word


def test_words_have_their_times_and_padding_has_none(timed):
    torch.testing.assert_close(timed["word_times"][0], torch.tensor([[0.2, 0.4], [0.4, 0.9]]))
    assert timed["word_times"][1].isnan().all() and timed["frame_times"][1].isnan().all()


def test_frame_times_are_the_centres_of_the_encoders_frames(timed):
    times = timed["frame_times"][0]
    assert len(times) == 95  # until a second after the last word, at 20 ms
    torch.testing.assert_close(times[:3], torch.tensor([0.01, 0.03, 0.05]))


# Word targets, with frames of 0.1 s: their centres are 0.05, 0.15, ...


def targets(timed, words):
    times, frames = word_targets(timed, words.split(), 0.1)
    known = [number for number, time in enumerate(frames.tolist()) if not math.isnan(time)]
    return times.tolist(), known


def test_a_word_for_each_word():
    times, known = targets([word("a", 0.2, 0.5), word("b", 0.8, 1.0)], "a b")
    np.testing.assert_allclose(times, [[0.2, 0.5], [0.8, 1.0]], atol=1e-6)
    assert known == list(range(20))  # to 1.0 s and a second of pause


def test_short_gaps_are_closed_as_in_results():
    times, _ = targets([word("a", 0.2, 0.5), word("b", 0.56, 1.0)], "a b")
    np.testing.assert_allclose(times, [[0.2, 0.53], [0.53, 1.0]], atol=1e-6)


def test_words_are_matched_by_their_spelling():
    times, _ = targets([word("mister", 0.2, 0.5), word("fox", 0.5, 1.0)], "Mister, fox")
    np.testing.assert_allclose(times, [[0.2, 0.5], [0.5, 1.0]], atol=1e-6)


def test_around_a_word_without_a_time_nothing_is_known():
    times, known = targets([word("quick", 0.2, 0.5), word("jumps", 0.9, 1.2)], "quick fox jumps")
    assert math.isnan(times[1][0])
    assert known == [*range(5), *range(9, 22)]  # unknown from 0.5 to 0.9 s


def test_before_a_first_word_without_a_time_nothing_is_known():
    _, known = targets([word("jumps", 0.9, 1.2)], "fox jumps")
    assert known == list(range(9, 22))


def test_behind_a_last_word_without_a_time_nothing_is_known():
    _, known = targets([word("quick", 0.2, 0.5)], "quick fox")
    assert known == list(range(5))


def test_where_a_word_is_said_that_the_transcript_lacks_nothing_is_known():
    times, known = targets([word("quick", 0.2, 0.5), word("um", 0.5, 0.7), word("fox", 0.7, 1.0)], "quick fox")
    np.testing.assert_allclose(times, [[0.2, 0.5], [0.7, 1.0]], atol=1e-6)
    assert known == [*range(5), *range(7, 20)]


def test_no_word_is_shorter_than_half_a_frame():
    times, _ = targets([word("a", 0.5, 0.5)], "a")
    np.testing.assert_allclose(times, [[0.5, 0.55]], atol=1e-6)


@pytest.mark.parametrize("timed", [None, []])
def test_without_times_nothing_is_known(timed):
    times, known = targets(timed, "a b")
    assert np.isnan(times).all() and known == []
