"""Segmentation: which stretches of a recording may be speech, and where long recordings are split."""

import copy
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch


# Both detectors judge frames of 32 ms, for which Silero was made.
FRAME_S = 0.032
# Below this level (dB of full scale) is digital silence or the noise of a converter. Chosen by hand, above the rounding
# noise of 16 bits (-98 dB).
SILENCE_DB = -70.0
# Louder than the background by this much is activity; but what lies within RANGE_DB of the loudest frames is never called
# silence, since speech over music or noise is not far above its background. Chosen by hand.
ABOVE_BACKGROUND_DB, RANGE_DB = 6.0, 20.0
# Levels that stay within EVEN_DB for EVEN_FROM_S are stationary noise: speech is never that even. Chosen by hand.
EVEN_DB, EVEN_FROM_S = 3.0, 1.0
# How far back the background is measured, in seconds, and by which percentiles of the levels background and loudest frames
# are measured. Chosen by hand.
HISTORY_S, BACKGROUND_PERCENTILE, LOUD_PERCENTILE = 30.0, 10, 95
# Silero's probabilities at which speech begins and ends: its own defaults.
SILERO_BEGINS, SILERO_ENDS = 0.5, 0.35

# A pause of at least this length (seconds) always ends a segment, and PAUSE_KEPT_S of it stays on either side. Chosen by hand.
PAUSE_ENDS_S, PAUSE_KEPT_S = 2.0, 0.3
# The shortest pause that a long recording is split at without overlap: three frames. Chosen by hand.
SHORTEST_PAUSE_S = 0.09
# Where a split has to fall into speech, both segments contain this much around it, but at most a quarter of a segment.
# Chosen by hand: a few words, so that the same words can be found on both sides.
OVERLAP_S = 2.0
# The quietest place is the middle of the quietest window of this length, in steps of QUIET_STEP_S. Chosen by hand.
QUIET_WINDOW_S, QUIET_STEP_S = 0.1, 0.01


class EnergyDetector:
    """
    Voice activity by level: louder than the background of the last 30 seconds.

    Conservative about silence: it finds pauses and skips what surely contains no speech (digital silence, even noise). Music
    counts as activity; the model decides what it means. A constant offset (DC) has no level. Where the level is even, as
    under the hum of a power line, the level of the differences between samples decides, in which low frequencies hardly
    count.

    Args:
        rate (`int`): sampling rate in Hz.
    """

    def __init__(self, rate: int):
        self.frame = round(FRAME_S * rate)
        self.histories = [np.zeros(0), np.zeros(0)]

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """
        Args:
            samples (`np.ndarray` of shape `(frames * self.frame,)`): following those of the last call.

        Returns:
            `(frames,)` of bool, true for activity.
        """
        frames = samples.reshape(-1, self.frame).astype(np.float64)
        both_levels = [_levels_db(frames), _levels_db(np.diff(frames, axis=1))]
        recent = max(len(frames), round(HISTORY_S / FRAME_S))
        self.histories = [np.append(*parts)[-recent:] for parts in zip(self.histories, both_levels)]
        return active_frames(both_levels, self.histories, FRAME_S)


def active_frames(both_levels: list[np.ndarray], histories: list[np.ndarray], frame_s: float) -> np.ndarray:
    """
    Which frames are louder than their background; see [`EnergyDetector`].

    Args:
        both_levels (`list[np.ndarray]` of shape `(frames,)`): levels in dB of full scale, of the samples and of the
            differences between samples.
        histories (`list[np.ndarray]`): the same of the last `HISTORY_S`, these frames included.
        frame_s (`float`): length of a frame in seconds.
    """
    for levels, history in zip(both_levels, histories):
        background, loud = np.percentile(history, [BACKGROUND_PERCENTILE, LOUD_PERCENTILE])
        if loud - background >= EVEN_DB or len(history) * frame_s < EVEN_FROM_S:
            return levels > max(SILENCE_DB, min(background + ABOVE_BACKGROUND_DB, loud - RANGE_DB))
    return np.zeros(len(both_levels[0]), dtype=bool)


def _levels_db(frames: np.ndarray) -> np.ndarray:
    """Level of each row of samples around their mean, in dB of full scale."""
    return 10 * np.log10(frames.var(axis=1) + 1e-12)


class SileroDetector:
    """
    Voice activity by the Silero detector (Silero Team 2024), whose ONNX model comes with the package `silero-vad`.

    Args:
        rate (`int`): sampling rate in Hz, 16000.

    Raises:
        ImportError: without `silero-vad` and `onnxruntime`.
        ValueError: for another rate.
    """

    def __init__(self, rate: int):
        if rate != 16000:
            raise ValueError(f"`vad='silero'` needs audio at 16000 Hz, but this model's encoder works at {rate} Hz")
        # The network is loaded once; its state belongs to one recording.
        self.model = copy.copy(_load_silero())
        self.model.reset_states()
        self.frame = round(FRAME_S * rate)
        self.rate, self.speaking = rate, False

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """As `EnergyDetector.__call__`."""
        active = np.zeros(len(samples) // self.frame, dtype=bool)
        for number, frame in enumerate(torch.from_numpy(samples.astype(np.float32)).split(self.frame)):
            probability = float(self.model(frame, self.rate))
            self.speaking = probability >= (SILERO_ENDS if self.speaking else SILERO_BEGINS)
            active[number] = self.speaking
        return active


@functools.cache
def _load_silero():
    threads = torch.get_num_threads()
    try:
        from silero_vad import load_silero_vad

        return load_silero_vad(onnx=True)
    except ImportError as error:
        raise ImportError(
            f"`vad='silero'` needs silero-vad and onnxruntime: pip install 'voxlm-hf[vad]' ({error})"
        ) from None
    finally:
        torch.set_num_threads(threads)  # importing it sets one thread for the whole process


# The names that `transcribe` takes.
DETECTORS = {"energy": EnergyDetector, "silero": SileroDetector}


@dataclass
class SegmentSpan:
    """
    Where a segment lies in its recording.

    Args:
        start_s, duration_s (`float`): in seconds.
        active_s (`float`): seconds of it that may be speech.
    """

    start_s: float
    duration_s: float
    active_s: float

    def divided(self, share: float) -> list["SegmentSpan"]:
        """The two parts of the segment, of which the first has this share of it."""
        first_s, active_s = share * self.duration_s, share * self.active_s
        return [
            SegmentSpan(self.start_s, first_s, active_s),
            SegmentSpan(self.start_s + first_s, self.duration_s - first_s, self.active_s - active_s),
        ]


@dataclass
class AudioSegment:
    """
    A stretch of a recording that goes through the model at once.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`)
        sampling_rate (`int`): in Hz.
        start (`int`): its first sample in the recording.
        active_s (`float`): seconds of it that may be speech.
        overlap (`int`): samples that it shares with the segment before it, 0 where the split fell into a pause.
        continues (`bool`): whether the next segment overlaps this one.
    """

    waveform: np.ndarray = field(repr=False)
    sampling_rate: int
    start: int = 0
    active_s: float = 0.0
    overlap: int = 0
    continues: bool = False

    @property
    def start_s(self) -> float:
        """Where it begins in the recording, in seconds."""
        return self.start / self.sampling_rate

    @property
    def duration_s(self) -> float:
        """Its length in seconds."""
        return len(self.waveform) / self.sampling_rate

    @property
    def span(self) -> SegmentSpan:
        """Where it lies, without its samples."""
        return SegmentSpan(self.start_s, self.duration_s, self.active_s)


class _Buffer:
    """
    The part of a stream that is not segmented yet, and which of its frames are active.

    Args:
        blocks: of mono samples.
        detector: a new voice activity detector.
    """

    def __init__(self, blocks: Iterable[np.ndarray], detector):
        self.blocks, self.detector, self.frame = iter(blocks), detector, detector.frame
        self.start, self.samples, self.active = 0, np.zeros(0, dtype=np.float32), np.zeros(0, dtype=bool)
        self.ended = False

    def fill(self, size: int):
        """Read until there are more than `size` samples, or all."""
        while not self.ended and len(self.samples) <= size:
            block = next(self.blocks, None)
            self.ended = block is None
            if not self.ended:
                self.samples = np.concatenate([self.samples, block])
            new = self.samples[len(self.active) * self.frame :]
            # The last frame of a recording is padded with silence.
            missing = -len(new) % self.frame
            new = np.pad(new, (0, missing)) if self.ended else new[: len(new) // self.frame * self.frame]
            if len(new):
                self.active = np.append(self.active, self.detector(new))

    def drop(self, frames: int):
        """Forget the first frames."""
        self.samples, self.active = self.samples[frames * self.frame :], self.active[frames:]
        self.start += frames * self.frame


def segment_audio(blocks: Iterable[np.ndarray], detector, rate: int, longest_s: float) -> Iterator[AudioSegment]:
    """
    Split a stream of audio into segments of at most `longest_s`, at pauses where there are any.

    A recording that fits into one segment stays whole. Longer ones lose their pauses of more than two seconds. Where there
    is no pause, two segments share up to `OVERLAP_S` around the quietest tenth of a second. Stretches without activity make
    no segment. Little more than one segment is held in memory.

    Args:
        blocks: of mono samples, of any size.
        detector: a new voice activity detector.
        rate (`int`): sampling rate in Hz.
        longest_s (`float`): seconds.
    """
    buffer, longest = _Buffer(blocks, detector), int(longest_s * rate)
    frame, kept = buffer.frame, round(PAUSE_KEPT_S * rate / detector.frame)
    # A quarter more than a segment, so that no scrap too short to be understood is left over at the end.
    reserve = longest // 4
    buffer.fill(longest + reserve)
    if len(buffer.samples) <= longest:
        if buffer.active.any():
            yield AudioSegment(buffer.samples, rate, 0, float(buffer.active.sum()) * frame / rate)
        return
    overlap = 0
    while len(buffer.samples):
        if not overlap:
            silent = int(buffer.active.argmax()) if buffer.active.any() else len(buffer.active)
            buffer.drop(max(0, silent - kept))
        buffer.fill(longest + reserve)
        if not buffer.active.any():
            if buffer.ended:
                return
            continue
        room = len(buffer.samples)
        if room > longest:
            room = min(longest, room - reserve)
        end, shared = _end_of_segment(buffer, rate, room, min(OVERLAP_S, longest_s / 4))
        active = buffer.active[: -(-end // frame)]
        if active.any():
            used = end if shared else min(end, (len(active) - int(active[::-1].argmax()) + kept) * frame)
            active_s = float(active.sum()) * frame / rate
            yield AudioSegment(buffer.samples[:used], rate, buffer.start, active_s, overlap, continues=shared > 0)
        else:
            shared = 0
        buffer.drop(-(-(end - shared) // frame))
        overlap = shared


def _end_of_segment(buffer: _Buffer, rate: int, room: int, overlap_s: float) -> tuple[int, int]:
    """Where a segment of at most `room` samples ends, and how many samples of it the next one repeats."""
    frame = buffer.frame
    frames = room // frame
    pauses = [(first, last) for first, last in _runs(~buffer.active[:frames]) if first > 0]
    long = [(first, last) for first, last in pauses if (last - first) * frame >= PAUSE_ENDS_S * rate]
    if long:
        first, last = long[0]
        return (last - round(PAUSE_KEPT_S * rate / frame)) * frame, 0
    if room == len(buffer.samples):
        return room, 0
    # A long segment if there is a pause for it, else a shorter one.
    for earliest in (frames // 2, frames // 4):
        late = [(max(first, earliest), last) for first, last in pauses]
        late = [(first, last) for first, last in late if (last - first) * frame >= SHORTEST_PAUSE_S * rate]
        if late:
            first, last = max(late, key=lambda run: (run[1] - run[0], run[1]))
            return (first + last) // 2 * frame, 0
    half = round(overlap_s / 2 * rate / frame)
    middle = quietest(buffer.samples, room // 2, room - half * frame, rate) // frame
    return (middle + half) * frame, 2 * half * frame


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of `True`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def quietest(samples: np.ndarray, first: int, last: int, rate: int) -> int:
    """The middle of the quietest `QUIET_WINDOW_S` of `samples[first:last]`, as a sample number."""
    hop = max(1, int(rate * QUIET_STEP_S))
    centred = samples[first:last].astype(np.float64)
    centred -= centred.mean()  # an offset (DC) is no loudness
    energy = np.add.reduceat(centred**2, np.arange(0, last - first, hop))
    smooth = np.convolve(energy, np.ones(round(QUIET_WINDOW_S / QUIET_STEP_S)), mode="same")
    return first + int(smooth[:-1].argmin()) * hop + hop // 2
