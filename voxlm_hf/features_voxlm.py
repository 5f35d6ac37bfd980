"""
What can be done to a clip's input features without its samples: silence behind it, halves of it, how much of it is active.

`transcribe` has the samples, `generate` has the features alone; both go through here, so that they write the same text.
"""

import numpy as np
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from .processing_voxlm import VoxLMProcessor
from .segmentation_voxlm import HISTORY_S, QUIET_WINDOW_S, active_frames, quietest


# Whisper's log-mel features: decades of power, at least MEL_FLOOR and at most MEL_RANGE below the clip's loudest, of which
# MEL_SCALE are one unit and -MEL_SCALE are 0.
MEL_FLOOR, MEL_RANGE, MEL_SCALE = -10.0, 8.0, 4.0
# Power of a 25 ms Hann window's spectrum over that of its samples: the sum of the window's squares, times its length, of
# which the mel bands have half (no negative frequencies).
WINDOW_SIZE, WINDOW_POWER = 400, 150.0
# Features (of 10 ms) in one level, about the length of the voice activity detector's frames.
FEATURES_PER_LEVEL = 3


def is_log_mel(processor: VoxLMProcessor) -> bool:
    """Whether features are Whisper's, whose scale is known; those of others are normalised over the clip."""
    return processor.time_axis == 1


def silence_behind(processor: VoxLMProcessor, clip: np.ndarray, seconds: float | None) -> np.ndarray:
    """
    A clip `(mels, time)` of Whisper's features with silence behind it, as the extractor makes it of the samples with zeros
    behind them, except for the clip's last two features, whose windows reach beyond its end.

    Args:
        seconds (`float`, *optional*): of silence; by default up to the encoder's window.
    """
    missing = round((processor.audio_window_s if seconds is None else seconds) * processor.sampling_rate)
    missing = missing // processor.samples_per_feature - (clip.shape[1] if seconds is None else 0)
    quietest_value = max((MEL_FLOOR + MEL_SCALE) / MEL_SCALE, float(clip.max()) - MEL_RANGE / MEL_SCALE)
    return np.pad(clip, ((0, 0), (0, missing)), constant_values=quietest_value)


def halves(processor: VoxLMProcessor, clip: np.ndarray) -> tuple[list[np.ndarray], float]:
    """A clip in two, split at the quietest place between its first and its last quarter, and the share of the first part."""
    size = clip.shape[processor.time_axis]
    middle = _quietest_feature(processor, clip, size // 4, size - size // 4)
    return np.split(clip, [middle], axis=processor.time_axis), middle / size


def _quietest_feature(processor: VoxLMProcessor, clip: np.ndarray, first: int, last: int) -> int:
    """The middle of the quietest `QUIET_WINDOW_S` of features `first` to `last`."""
    if clip.ndim == 1:
        return quietest(clip, first, last, processor.sampling_rate)
    loudness = clip.mean(1 - processor.time_axis)[first:last]
    step_s = processor.samples_per_feature / processor.sampling_rate
    width = min(max(1, round(QUIET_WINDOW_S / step_s)), len(loudness))
    smooth = np.convolve(loudness, np.ones(width) / width, mode="valid")
    return first + int(smooth.argmin()) + width // 2


def active_seconds(processor: VoxLMProcessor, clip: np.ndarray) -> float:
    """
    Seconds of a clip that may be speech, as [`EnergyDetector`] finds them in its samples, within a few percent. Features that
    are normalised have lost their level; there, all of the clip counts as active.
    """
    seconds = clip.shape[processor.time_axis] * processor.samples_per_feature / processor.sampling_rate
    if not is_log_mel(processor):
        return seconds
    mels, time = clip.shape
    missing = -time % FEATURES_PER_LEVEL
    power = 10.0 ** (MEL_SCALE * clip.astype(np.float64) - MEL_SCALE)
    power = np.pad(power, ((0, 0), (0, missing)), mode="edge").reshape(mels, -1, FEATURES_PER_LEVEL).mean(2)
    edges = mel_to_hertz(np.linspace(0, hertz_to_mel(processor.sampling_rate / 2, "slaney"), mels + 2), "slaney")
    # Slaney's bands have an area of 1 Hz each; weighted by their widths they add up to the spectrum.
    widths = (edges[2:] - edges[:-2]) / 2
    # What is left of a frequency in the differences between samples.
    differences = 4 * np.sin(np.pi * edges[1:-1] / processor.sampling_rate) ** 2
    scale = 2 / (WINDOW_POWER * WINDOW_SIZE)
    levels = [10 * np.log10(scale * weights @ power + 1e-12) for weights in (widths, widths * differences)]
    level_s = FEATURES_PER_LEVEL * processor.samples_per_feature / processor.sampling_rate
    recent = max(1, round(HISTORY_S / level_s))
    active = active_frames(levels, [level[-recent:] for level in levels], level_s)
    return min(seconds, float(active.sum()) * level_s)
