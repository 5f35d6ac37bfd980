"""Cutting long recordings into pieces, voice activity, and joining what overlapping pieces heard."""

import numpy as np
import pytest

from tests import tiny
from voxlm_hf.activity_voxlm import EnergyActivity
from voxlm_hf.pieces_voxlm import Piece, cut, halves, stitch


RATE = 16000


def blocks(waveform, seconds=10):
    return (waveform[start : start + seconds * RATE] for start in range(0, len(waveform), seconds * RATE))


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def pieces_of(waveform, longest_s=30.0, seconds=10):
    return list(cut(blocks(waveform, seconds), EnergyActivity(RATE), RATE, longest_s))


def spans(pieces):
    return [(piece.start / RATE, (piece.start + len(piece.waveform)) / RATE) for piece in pieces]


def test_halves_part_at_the_quietest_place_that_is_not_near_an_end():
    waveform = np.concatenate([silence(0.5), tiny.noise(2, 0), silence(0.4), tiny.noise(1.1, 1)])
    left, right = halves(Piece(3 * RATE, waveform, active=3.0), RATE)
    assert left.start == 3 * RATE and right.start == left.start + len(left.waveform)
    assert np.array_equal(np.concatenate([left.waveform, right.waveform]), waveform)
    assert len(left.waveform) / RATE == pytest.approx(2.7, abs=0.21)
    assert left.active + right.active == pytest.approx(3.0) and left.active == pytest.approx(2.0, abs=0.2)


def test_cuts_fall_into_the_pauses():
    speech = np.concatenate([tiny.noise(7, 0), silence(0.5), tiny.noise(6, 1), silence(0.5), tiny.noise(5, 2)])
    pieces = pieces_of(speech, 10.0)
    assert [end for _, end in spans(pieces)] == [
        pytest.approx(7.25, abs=0.26),
        pytest.approx(13.75, abs=0.26),
        pytest.approx(19.0, abs=0.01),
    ]
    assert not any(piece.overlap for piece in pieces)


@pytest.mark.parametrize("seconds, window", [(0.1, 30), (30.0, 30), (30.01, 30), (95.3, 30), (20, 1), (1.01, 1)])
def test_speech_is_never_lost(seconds, window):
    waveform = tiny.noise(seconds)
    pieces = pieces_of(waveform, window)
    assert pieces[0].start == 0 and spans(pieces)[-1][1] == len(waveform) / RATE
    for first, second in zip(pieces, pieces[1:]):
        assert first.start + len(first.waveform) == second.start + second.overlap
        assert first.continues == bool(second.overlap)
    assert all(len(piece.waveform) <= window * RATE for piece in pieces)
    assert all(np.array_equal(p.waveform, waveform[p.start : p.start + len(p.waveform)]) for p in pieces)


def test_a_cut_in_speech_is_heard_by_both_sides():
    # It swells by 10 dB and has no pause anywhere.
    steady = np.sin(np.arange(70 * RATE) * 0.1) * (0.4 + 0.3 * np.sin(np.arange(70 * RATE) * 1e-4))
    pieces = pieces_of(steady.astype(np.float32), 30.0)
    assert len(pieces) > 2 and all(piece.overlap == pytest.approx(2 * RATE, abs=512) for piece in pieces[1:])


def test_long_pauses_are_left_out():
    recording = np.concatenate([silence(40), tiny.noise(5, 0), silence(60), tiny.noise(5, 1), silence(35)])
    first, second = spans(pieces_of(recording))
    assert first == (pytest.approx(39.7, abs=0.1), pytest.approx(45.3, abs=0.1))
    assert second == (pytest.approx(104.7, abs=0.1), pytest.approx(110.3, abs=0.1))


def test_a_recording_that_fits_stays_whole():
    recording = np.concatenate([silence(10), tiny.noise(5, 0), silence(10)])
    assert spans(pieces_of(recording)) == [(0.0, 25.0)]


@pytest.mark.parametrize("seconds", [0.5, 20, 100])
@pytest.mark.parametrize("level", [0.0, 1e-5, 0.003, 0.3])
def test_silence_and_even_noise_make_no_piece(seconds, level):
    noise = level * np.random.default_rng(0).standard_normal(round(seconds * RATE))
    if level > 0.001 and seconds < 1:
        pytest.skip("half a second of noise may be a fricative")
    assert pieces_of(noise.astype(np.float32)) == []


def test_the_pieces_do_not_depend_on_the_blocks():
    recording = np.concatenate([tiny.noise(9, 0), silence(0.4), tiny.noise(14, 1), silence(3), tiny.noise(31, 2)])
    one, other = (np.array(spans(pieces_of(recording, 20, seconds))) for seconds in (5, 10))
    np.testing.assert_allclose(one, other, atol=0.1)


def test_only_a_little_more_than_one_piece_is_read_ahead():
    read = 0

    def counted():
        nonlocal read
        for block in blocks(np.tile(np.concatenate([tiny.noise(8), silence(0.5)]), 60)):
            read += len(block) / RATE
            yield block

    for number, piece in enumerate(cut(counted(), EnergyActivity(RATE), RATE, 20.0)):
        assert read <= (piece.start + len(piece.waveform)) / RATE + 30, number


def words(*items):
    return [{"word": word, "start": start, "end": start + 0.2} for word, start in items]


def test_stitching_by_the_words_both_heard():
    left = words(("we", 7.0), ("saw", 8.1), ("the", 8.5), ("river", 9.0), ("b", 9.8))
    right = words(("he", 8.0), ("the", 8.52), ("river", 9.05), ("bank", 9.8), ("again", 10.4))
    assert stitch(left, right, 8.0, 10.0) == (4, 3)


def test_stitching_by_the_middle_where_nothing_is_alike():
    left = words(("one", 7.0), ("two", 8.2), ("tree", 9.4))
    right = words(("too", 8.2), ("three", 9.4), ("four", 10.4))
    assert stitch(left, right, 8.0, 10.0) == (2, 1)
    assert stitch([], right, 8.0, 10.0) == (0, 1)
    assert stitch(left, [], 8.0, 10.0) == (2, 0)


def test_silero_tells_speech_from_tones():
    pytest.importorskip("silero_vad")
    import torch

    from voxlm_hf.activity_voxlm import SileroActivity
    from voxlm_hf.audio_voxlm import stream_audio

    threads = torch.get_num_threads()
    speech = np.concatenate(list(stream_audio("tests/data/84-121123-0001.flac", RATE)))
    tone = (0.3 * np.sin(np.arange(3 * RATE) * 0.3)).astype(np.float32)
    assert torch.get_num_threads() == threads
    for waveform, share in ((speech, (0.6, 1.0)), (tone, (0.0, 0.1)), (silence(3), (0.0, 0.0))):
        active = SileroActivity(RATE)(waveform[: len(waveform) // 512 * 512])
        assert share[0] <= active.mean() <= share[1]
    # One recording's memory is no other's.
    one, other = SileroActivity(RATE), SileroActivity(RATE)
    block = speech[: 512 * 40]
    first = one(block)
    other(tone[: 512 * 40])
    np.testing.assert_array_equal(
        np.append(first, one(speech[512 * 40 : 512 * 80])), SileroActivity(RATE)(speech[: 512 * 80])
    )
    with pytest.raises(ValueError, match="8000 Hz"):
        SileroActivity(8000)
