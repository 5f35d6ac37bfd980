"""Audio in: any kind of recording to mono float32 waveforms at one rate, as a whole or as a stream of blocks."""

import io
import os
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr
import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Float samples above this were meant as integers: full scale is 1, and no recording is ten times as loud. Chosen by hand.
MAX_AMPLITUDE = 10.0
# Length in seconds of the blocks in which files are decoded: 640 kB at 16 kHz. Chosen by hand.
BLOCK_S = 10.0


def read_audio(audio, sampling_rate: int | None = None) -> tuple[np.ndarray, int | None]:
    """
    Decode any supported kind of audio.

    Args:
        audio: a path; the bytes of an audio file; samples as numpy array, torch tensor or list of numbers, mono or
            `(channels, samples)`; a dict with "array" or "raw" and "sampling_rate", or with "path" or "bytes"; the decoder
            object of a `datasets` Audio column (`get_all_samples`).
        sampling_rate: rate of bare samples in Hz; ignored for inputs that carry their own.

    Returns:
        samples as `(samples,)` or `(channels, samples)` in their own dtype, and their rate in Hz, `None` when it is not known.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for what cannot be decoded as audio.
    """
    if hasattr(audio, "get_all_samples"):
        samples = audio.get_all_samples()
        return np.asarray(samples.data), int(samples.sample_rate)
    if isinstance(audio, dict):
        for key in ("array", "raw"):
            if audio.get(key) is not None:
                if audio.get("sampling_rate") is None:
                    raise ValueError(f"An audio dict with {key!r} also needs 'sampling_rate'; got keys {sorted(audio)}")
                return read_audio(audio[key], audio["sampling_rate"])
        for key in ("bytes", "path"):
            if audio.get(key) is not None:
                return read_audio(audio[key], sampling_rate)
        raise ValueError(f"An audio dict needs 'array', 'raw', 'bytes' or 'path'; got keys {sorted(map(str, audio))}")
    if isinstance(audio, (str, os.PathLike, bytes, bytearray, memoryview)):
        blocks = list(_file_blocks(audio, BLOCK_S))
        return np.concatenate([block for block, _ in blocks], axis=1), blocks[0][1]
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.dtype == torch.bfloat16 else audio).numpy()
    if isinstance(audio, (list, tuple)):
        try:
            audio = np.asarray(audio)
        except ValueError as error:
            raise ValueError(f"A list of samples must be rectangular numbers: {error}") from None
    if isinstance(audio, np.ndarray):
        return audio, sampling_rate
    raise ValueError(
        f"Cannot read audio from {type(audio).__name__}; pass a path, bytes, an array, or a dict with 'array' and "
        "'sampling_rate'"
    )


def _file_blocks(audio, block_s: float) -> Iterator[tuple[np.ndarray, int]]:
    """Float32 blocks `(channels, samples)` of a file, given by its path or bytes, and its rate in Hz."""
    name = f"{len(audio)} bytes" if isinstance(audio, (bytes, bytearray, memoryview)) else os.fspath(audio)
    if isinstance(name, str) and name.startswith(("http://", "https://")):
        raise ValueError(f"{name} is a URL; download it and pass the file or its bytes")
    if not isinstance(audio, (str, os.PathLike)):
        audio = io.BytesIO(audio)
    elif os.path.isdir(name):
        raise ValueError(f"{name} is a folder, not an audio file")
    elif not os.path.exists(name):
        raise FileNotFoundError(f"No such audio file: {name}")
    try:
        with soundfile.SoundFile(audio) as file:
            rate, promised, read = file.samplerate, file.frames, 0
            while len(block := file.read(max(1, int(block_s * rate)), dtype="float32", always_2d=True)):
                read += len(block)
                yield block.T, rate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = getattr(error, "error_string", error)
        raise ValueError(f"Cannot read {name} as audio: {reason}") from None
    if read == 0:
        raise ValueError(f"The audio is empty: {name} holds no samples")
    # Formats without a length in their header promise next to endless files.
    if read < promised < 2**62:
        logger.warning(f"{name} ends after {read / rate:.2f} s, but its header promises {promised / rate:.2f} s")


def to_waveform(samples: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """
    Samples of any numeric dtype, `(samples,)` or `(channels, samples)`, to mono float32 at `target_rate`.

    The rate is changed by soxr (a band-limited filter).

    Raises:
        ValueError: for empty audio, NaN or infinite samples, wrong shapes, dtypes or rates.
    """
    _check_rate(source_rate)
    samples = to_mono(samples)
    if source_rate != target_rate:
        samples = soxr.resample(samples, source_rate, target_rate).astype(np.float32)
    return np.ascontiguousarray(samples)


def stream_audio(audio, target_rate: int, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
    """
    Any kind of audio that `read_audio` takes as mono float32 blocks of about `BLOCK_S` seconds at `target_rate`.

    Files are decoded once, block by block, and never held in memory as a whole; together the blocks are what `to_waveform`
    returns.

    Raises:
        ValueError, FileNotFoundError: as `read_audio` and `to_waveform`, when the bad block is reached.
    """
    if isinstance(audio, dict) and all(audio.get(key) is None for key in ("array", "raw")):
        audio = next((audio[key] for key in ("bytes", "path") if audio.get(key) is not None), audio)
    if not isinstance(audio, (str, os.PathLike, bytes, bytearray, memoryview)):
        samples, rate = read_audio(audio, sampling_rate)
        waveform = to_waveform(samples, target_rate if rate is None else rate, target_rate)
        size = int(BLOCK_S * target_rate)
        yield from (waveform[start : start + size] for start in range(0, len(waveform), size))
        return
    resampler, second = None, 0.0
    for block, rate in _file_blocks(audio, BLOCK_S):
        if resampler is None and rate != target_rate:
            _check_rate(rate)
            resampler = soxr.ResampleStream(rate, target_rate, 1, dtype="float32")
        try:
            mono = to_mono(block)
        except ValueError as error:
            raise ValueError(f"From second {second:.0f} on: {error}") from None
        second += len(mono) / rate
        yield mono if resampler is None else resampler.resample_chunk(mono)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def _check_rate(rate):
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.integer, np.floating)):
        raise ValueError(f"`sampling_rate` must be a number of Hz, got {rate!r}")
    if not 0 < rate < 10_000_000:
        raise ValueError(f"`sampling_rate` must be above 0 and below 10 MHz, got {rate}")


def to_mono(samples: np.ndarray) -> np.ndarray:
    """
    Samples of any numeric dtype, `(samples,)` or `(channels, samples)`, to `(samples,)` in float32.

    Integers are scaled by their full scale, channels averaged.

    Raises:
        ValueError: for empty audio, NaN or infinite samples, wrong shapes and dtypes.
    """
    if samples.ndim not in (1, 2):
        raise ValueError(f"Audio must be (samples,) or (channels, samples), got shape {samples.shape}")
    if samples.size == 0:
        raise ValueError(f"The audio is empty (shape {samples.shape})")
    if samples.ndim == 2 and samples.shape[0] > 32 and samples.shape[1] < samples.shape[0]:
        raise ValueError(
            f"Audio of shape {samples.shape} looks like (samples, channels); transpose it: channels come first"
        )
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.signedinteger):
        full_scale = float(2 ** (8 * min(samples.dtype.itemsize, 4) - 1))
        if samples.dtype.itemsize == 8 and np.abs(samples).max() < 2**15:
            full_scale = float(2**15)  # int64 is how Python lists and torch carry 16-bit samples
        samples = (samples / full_scale).astype(np.float32)
    elif np.issubdtype(samples.dtype, np.floating):
        samples = samples.astype(np.float32)
    else:
        raise ValueError(f"Audio samples must be integers or floats, got dtype {samples.dtype}")
    if samples.ndim == 2:
        samples = samples.mean(axis=0, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise ValueError(f"{int((~np.isfinite(samples)).sum())} of {samples.size} audio samples are NaN or infinite")
    peak = float(np.abs(samples).max())
    if peak > MAX_AMPLITUDE:
        raise ValueError(
            f"Audio samples reach {peak:.0f}; floats must lie in about -1..1. Divide by the full scale (32768 for 16 bits) or "
            "pass integers"
        )
    return samples


def is_batch(audio) -> bool:
    """Whether `audio` is several recordings: a list or tuple that does not hold bare numbers."""
    return isinstance(audio, (list, tuple)) and not (len(audio) > 0 and isinstance(audio[0], (int, float, np.number)))
