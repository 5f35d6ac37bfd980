"""Augmentation of waveforms: a simple room, noise, leading and trailing silence."""

import numpy as np
from numpy.random import Generator


def augment(waveform: np.ndarray, rng: Generator, sampling_rate: int = 16000) -> tuple[np.ndarray, float]:
    """
    A louder world around a clean recording, each part by chance.

    Args:
        waveform: `(samples,)` float32; rng: source of chance.

    Returns:
        the waveform as float32, peak at most 1, up to a second longer; and the seconds of silence put before it.
    """
    lead_s = 0.0
    if rng.random() < 0.3:
        waveform = reverberate(waveform, rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.5), rng, sampling_rate)
    if rng.random() < 0.6:
        waveform = add_noise(waveform, rng.uniform(8, 35), rng.choice([0.0, 0.3, 0.5]), rng)
    if rng.random() < 0.5:
        edges = [1e-4 * rng.standard_normal(int(rng.uniform(0, sampling_rate / 2))) for _ in range(2)]
        waveform = np.concatenate([edges[0], waveform, edges[1]])
        lead_s = len(edges[0]) / sampling_rate
    return (waveform / max(1.0, np.abs(waveform).max())).astype(np.float32), lead_s


def reverberate(waveform, decay_s: float, level: float, rng: Generator, sampling_rate: int) -> np.ndarray:
    """Convolve with an exponentially decaying noise tail of the given length and energy relative to the direct sound."""
    tail = rng.standard_normal(int(sampling_rate * decay_s))
    tail *= np.exp(-6.9 * np.arange(len(tail)) / len(tail))
    tail *= level / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    size = len(waveform) + len(tail)
    return np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(tail, size), size)[: len(waveform)]


def add_noise(waveform, snr_db: float, tilt: float, rng: Generator) -> np.ndarray:
    """Add Gaussian noise at a signal-to-noise ratio; `tilt` 0 is white, 0.5 pink."""
    spectrum = np.fft.rfft(rng.standard_normal(len(waveform)))
    spectrum /= np.maximum(1, np.arange(len(spectrum))) ** tilt
    noise = np.fft.irfft(spectrum, len(waveform))
    gain = np.sqrt((waveform**2).mean() / max((noise**2).mean(), 1e-12) / 10 ** (snr_db / 10))
    return waveform + gain * noise
