"""Voice activity, and splitting long recordings at pauses."""

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf.audio_voxlm import stream_audio
from voxlm_hf.segmentation_voxlm import (
    FRAME_S,
    AudioSegment,
    EnergyDetector,
    SileroDetector,
    quietest,
    segment_audio,
)


RATE = 16000
FRAME = round(FRAME_S * RATE)


def blocks(waveform, seconds=10):
    return (waveform[start : start + seconds * RATE] for start in range(0, len(waveform), seconds * RATE))


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def segments_of(waveform, longest_s=30.0, seconds=10):
    return list(segment_audio(blocks(waveform, seconds), EnergyDetector(RATE), RATE, longest_s))


def spans(segments):
    return [(segment.start_s, segment.start_s + segment.duration_s) for segment in segments]


def whole_frames(waveform):
    return waveform[: len(waveform) // FRAME * FRAME]


# Detectors


def test_energy_tells_a_loud_stretch_from_quiet_ones():
    """Ten frames at -60 dB, ten at -20 dB, ten at -60 dB."""
    tone = np.sqrt(2) * np.sin(np.arange(30 * FRAME) * 2 * np.pi / 16)
    levels_db = np.repeat([-60.0, -20.0, -60.0], 10 * FRAME)
    active = EnergyDetector(RATE)(tone * 10 ** (levels_db / 20))
    assert active.tolist() == [False] * 10 + [True] * 10 + [False] * 10


def test_energy_remembers_the_background_of_earlier_calls():
    """A quiet block is silence after a loud one, and even noise by itself."""
    generator = np.random.default_rng(0)
    quiet, loud = (level * generator.standard_normal(100 * FRAME) for level in (0.001, 0.1))
    detector = EnergyDetector(RATE)
    assert detector(np.concatenate([quiet, loud]))[100:].all()
    assert not detector(quiet).any()
    assert not EnergyDetector(RATE)(loud).any()  # even for three seconds: no speech


@pytest.fixture(scope="module")
def speech():
    return np.concatenate(list(stream_audio("tests/data/84-121123-0001.flac", RATE)))


def tone(seconds):
    return (0.3 * np.sin(np.arange(round(seconds * RATE)) * 0.3)).astype(np.float32)


@pytest.mark.parametrize("offset", [-0.6, 0.02, 0.1, 0.5])
def test_a_constant_offset_has_no_level(speech, offset):
    samples = whole_frames(speech)
    np.testing.assert_array_equal(EnergyDetector(RATE)(samples + offset), EnergyDetector(RATE)(samples))
    assert not EnergyDetector(RATE)(silence(3)[: 90 * FRAME] + offset).any()
    place = quietest(speech, 0, len(speech), RATE)
    assert quietest(speech + np.float32(offset), 0, len(speech), RATE) == place


def test_an_offset_that_drifts_hides_no_speech(speech):
    samples = whole_frames(speech)
    found = EnergyDetector(RATE)(samples + np.linspace(0, 0.5, len(samples)))
    assert found.mean() == pytest.approx(EnergyDetector(RATE)(samples).mean(), abs=0.02)


@pytest.mark.parametrize("hertz", [50, 60, 100])
def test_hum_hides_no_speech_and_is_none(speech, hertz):
    """Ten times as loud as the speech."""
    samples = whole_frames(speech)
    hum = 10 * samples.std() * np.sqrt(2) * np.sin(np.arange(len(samples)) * 2 * np.pi * hertz / RATE)
    clean = EnergyDetector(RATE)(samples)
    assert (EnergyDetector(RATE)(samples + hum) & clean).sum() > 0.3 * clean.sum()
    assert not EnergyDetector(RATE)(hum).any()


def test_silero_finds_speech(speech):
    assert 0.6 <= SileroDetector(RATE)(whole_frames(speech)).mean() <= 1


@pytest.mark.parametrize("waveform", [tone(3), silence(3)], ids=["tone", "silence"])
def test_silero_finds_no_speech_in_a_tone_or_silence(waveform):
    assert SileroDetector(RATE)(whole_frames(waveform)).mean() <= 0.1


def test_two_silero_detectors_share_no_memory(speech):
    one, other = SileroDetector(RATE), SileroDetector(RATE)
    first = one(speech[: 40 * FRAME])
    other(tone(2)[: 40 * FRAME])
    both = np.append(first, one(speech[40 * FRAME : 80 * FRAME]))
    np.testing.assert_array_equal(both, SileroDetector(RATE)(speech[: 80 * FRAME]))


def test_loading_silero_leaves_the_number_of_threads_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        SileroDetector(RATE)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_silero_knows_one_rate():
    with pytest.raises(ValueError, match="8000 Hz"):
        SileroDetector(8000)


# Segments


def test_start_and_duration_are_in_seconds():
    segment = AudioSegment(np.zeros(12000), 8000, start=4000)
    assert (segment.start_s, segment.duration_s) == (0.5, 1.5)


def test_the_quietest_place_is_the_middle_of_the_longest_dip():
    samples = np.tile([1.0, -1.0], RATE)
    samples[RATE : RATE + RATE // 5] = 0  # from 1.0 to 1.2 s
    assert quietest(samples, 0, len(samples), RATE) / RATE == pytest.approx(1.1, abs=0.06)


def test_long_recordings_are_split_at_pauses():
    recording = np.concatenate([tiny.noise(7, 0), silence(0.5), tiny.noise(6, 1), silence(0.5), tiny.noise(5, 2)])
    segments = segments_of(recording, 10.0)
    assert [end for _, end in spans(segments)] == [
        pytest.approx(7.25, abs=0.26),
        pytest.approx(13.75, abs=0.26),
        pytest.approx(19.0, abs=0.01),
    ]
    assert not any(segment.overlap for segment in segments)


@pytest.mark.parametrize("seconds, window", [(0.1, 30), (30.0, 30), (30.01, 30), (95.3, 30), (20, 1), (1.01, 1)])
def test_speech_is_never_lost(seconds, window):
    waveform = tiny.noise(seconds)
    segments = segments_of(waveform, window)
    assert segments[0].start == 0 and segments[-1].start + len(segments[-1].waveform) == len(waveform)
    for first, second in zip(segments, segments[1:]):
        assert first.start + len(first.waveform) == second.start + second.overlap
        assert first.continues == bool(second.overlap)
    assert all(len(segment.waveform) <= window * RATE for segment in segments)
    assert all(np.array_equal(s.waveform, waveform[s.start : s.start + len(s.waveform)]) for s in segments)


def test_segments_overlap_where_there_is_no_pause():
    # It swells by 10 dB and has no pause anywhere.
    steady = np.sin(np.arange(70 * RATE) * 0.1) * (0.4 + 0.3 * np.sin(np.arange(70 * RATE) * 1e-4))
    segments = segments_of(steady.astype(np.float32), 30.0)
    assert len(segments) > 2 and all(segment.overlap == pytest.approx(2 * RATE, abs=FRAME) for segment in segments[1:])


def test_long_pauses_are_left_out():
    recording = np.concatenate([silence(40), tiny.noise(5, 0), silence(60), tiny.noise(5, 1), silence(35)])
    first, second = spans(segments_of(recording))
    assert first == (pytest.approx(39.7, abs=0.1), pytest.approx(45.3, abs=0.1))
    assert second == (pytest.approx(104.7, abs=0.1), pytest.approx(110.3, abs=0.1))


def test_a_recording_that_fits_stays_whole():
    (segment,) = segments_of(np.concatenate([silence(10), tiny.noise(5, 0), silence(10)]))
    assert (segment.start_s, segment.duration_s) == (0.0, 25.0)
    assert segment.active_s == pytest.approx(5.0, abs=0.1)


@pytest.mark.parametrize(
    "level, seconds",
    [(level, seconds) for level in (0.0, 1e-5) for seconds in (0.5, 20, 100)]
    # Half a second of louder noise may be a fricative.
    + [(level, seconds) for level in (0.003, 0.3) for seconds in (20, 100)],
)
def test_silence_and_even_noise_make_no_segment(level, seconds):
    noise = level * np.random.default_rng(0).standard_normal(round(seconds * RATE))
    assert segments_of(noise.astype(np.float32)) == []


def test_segments_do_not_depend_on_the_blocks():
    recording = np.concatenate([tiny.noise(9, 0), silence(0.4), tiny.noise(14, 1), silence(3), tiny.noise(31, 2)])
    one, other = (np.array(spans(segments_of(recording, 20, seconds))) for seconds in (5, 10))
    np.testing.assert_allclose(one, other, atol=0.1)


def test_only_a_little_more_than_one_segment_is_read_ahead():
    read = 0

    def counted():
        nonlocal read
        for block in blocks(np.tile(np.concatenate([tiny.noise(8), silence(0.5)]), 60)):
            read += len(block) / RATE
            yield block

    for number, segment in enumerate(segment_audio(counted(), EnergyDetector(RATE), RATE, 20.0)):
        assert read <= segment.start_s + segment.duration_s + 30, number
