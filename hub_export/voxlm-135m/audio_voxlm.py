"""Audio in: any kind of recording to mono float32 waveforms at one rate, as a whole or as a stream of blocks."""

import array
import io
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

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
# Sampling rates in Hz from the lowest that holds any speech to the highest that converters have. At others, resampling a
# second of audio could take any amount of memory.
RATES = (1_000, 384_000)
# Around damage, files are decoded in packets of this length in seconds. Chosen by hand: two frames of MP3.
PACKET_S = 0.05
# Streams that cannot be rewound go to a temporary file; if these first bytes are no known format, the rest is not waited for.
PROBE_BYTES = 2**24
# Missing audio of less than this many seconds is not worth a warning.
NEGLIGIBLE_S = 0.01
# A header without a length announces about 2**63 samples.
ENDLESS = 2**62

_RAW_FILES = (bytes, bytearray, memoryview)
# How a file's size of audio data appears in libsndfile's log: announced, then, where it disagrees, the true one.
_DATA_SIZE = re.compile(r"^ *(?:data|SSND|BODY|Data [Ss]ize) *: *(\d+)(?: \(should be (\d+)\))?", re.M)
_FILE_SIZE = re.compile(r"^Length *: *(\d+)", re.M)
_CUT_OFF = re.compile(r"lacks an end-of-stream bit|Junk after the last page|truncated file")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def read_audio(audio, sampling_rate: int | None = None) -> tuple[np.ndarray, int | None]:
    """
    Decode any supported kind of audio.

    Args:
        audio: a path of a regular file; the bytes of an audio file; a binary file object (if it can be rewound, it is read
            from its start, wherever it stands); samples as numpy array, torch tensor, list of numbers or anything with
            `__array__`, mono or `(channels, samples)`; a dict with "array" or "raw" and "sampling_rate", or with "path" or
            "bytes"; the decoder object of a `datasets` Audio column (`get_all_samples`).
        sampling_rate: rate of bare samples in Hz; ignored for inputs that carry their own.

    Returns:
        samples as `(samples,)` or `(channels, samples)` in their own dtype, and their rate in Hz, `None` when it is not known.
        Of a damaged file, what can be decoded; a warning says how much that is.

    Raises:
        FileNotFoundError: for a missing file.
        OSError: for a file that cannot be opened.
        ValueError: for what cannot be decoded as audio, and for a rate outside of `RATES`.
    """
    if sampling_rate is not None:
        check_rate(sampling_rate)
    if hasattr(audio, "get_all_samples"):
        try:
            samples = audio.get_all_samples()
        except RuntimeError as error:
            raise ValueError(f"{type(audio).__name__} cannot decode the audio: {error}") from None
        return _as_array(samples.data), check_rate(samples.sample_rate)
    if isinstance(audio, Mapping):
        for key in ("array", "raw"):
            if audio.get(key) is not None:
                if audio.get("sampling_rate") is None:
                    raise ValueError(
                        f"An audio dict with {key!r} also needs 'sampling_rate'; got keys {sorted(map(str, audio))}"
                    )
                return read_audio(audio[key], audio["sampling_rate"])
        return read_audio(_file_of(audio), sampling_rate)
    if _is_file(audio):
        blocks = list(_file_blocks(audio, BLOCK_S))
        return np.concatenate([block for block, _ in blocks], axis=1), blocks[0][1]
    return _as_array(audio), sampling_rate


def _file_of(audio: Mapping):
    """The bytes or the path in an audio dict."""
    for key in ("bytes", "path"):
        if audio.get(key) is not None:
            return audio[key]
    raise ValueError(f"An audio dict needs 'array', 'raw', 'bytes' or 'path'; got keys {sorted(map(str, audio))}")


def _is_file(audio) -> bool:
    """Whether `audio` is a path, a file's bytes or a file object."""
    return isinstance(audio, (str, os.PathLike, *_RAW_FILES)) or hasattr(audio, "read")


def _as_array(audio) -> np.ndarray:
    """Samples in any container as a numpy array of their own dtype."""
    if isinstance(audio, torch.Tensor):
        try:
            audio = audio.detach().cpu().resolve_conj().resolve_neg()
            if audio.is_floating_point() and audio.dtype not in (torch.float64, torch.float32, torch.float16):
                audio = audio.float()
            return audio.numpy()
        except (RuntimeError, TypeError):  # sparse, meta, quantized, nested, ...
            kind = f"{audio.layout}, {audio.dtype}, on {audio.device}"
            raise ValueError(f"Audio must be a dense tensor of numbers, got {kind}") from None
    if not isinstance(audio, (list, tuple, array.array)) and not hasattr(audio, "__array__"):
        raise ValueError(
            f"Cannot read audio from {type(audio).__name__}; pass a path, bytes, a binary file, an array, or a dict with "
            "'array' and 'sampling_rate'"
        )
    try:
        return np.asarray(audio)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"A list of samples must be rectangular numbers: {error}") from None


def _file_blocks(audio, block_s: float) -> Iterator[tuple[np.ndarray, int]]:
    """Float32 blocks `(channels, samples)` of a file, given by path, bytes or as a file object, and its rate in Hz."""
    with _openable(audio) as (source, name):
        try:
            decoder = _Decoder(source, name)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise ValueError(f"Cannot read {name} as audio: {getattr(error, 'error_string', error)}") from None
        with decoder:
            rate, silenced = decoder.rate, 0
            if not RATES[0] <= rate <= RATES[1]:
                raise ValueError(
                    f"The header of {name} says {rate} Hz; sampling rates from {RATES[0]} to {RATES[1]} Hz are accepted"
                )
            for block in decoder.blocks(block_s):
                block, count = _silence_out_of_range(block, decoder.subtype, name)
                silenced += count
                yield block.T, rate
            if decoder.decoded == 0 or silenced == decoder.decoded * decoder.channels:
                raise ValueError(
                    f"The audio is empty: {name} has no usable samples ({decoder.error or f'{silenced} are NaN'})"
                )
        damage = decoder.damage(silenced)
        if damage:
            logger.warning(f"{name}: {damage}")


@contextmanager
def _openable(audio) -> Iterator[tuple]:
    """What libsndfile can open, and a name of it for messages.

    Raises:
        FileNotFoundError, OSError: for a file that cannot be opened.
        ValueError: for a path that is no regular file, a URL, or a file that was opened as text.
    """
    if isinstance(audio, _RAW_FILES):
        yield io.BytesIO(audio), f"{len(audio)} bytes"
    elif hasattr(audio, "read") and not isinstance(audio, os.PathLike):
        name = str(getattr(audio, "name", type(audio).__name__))
        if not isinstance(audio.read(0), bytes):
            raise ValueError(f"{name} is open as text; open audio files in binary mode ('rb')")
        if hasattr(audio, "seekable") and audio.seekable():
            audio.seek(0)
            yield audio, name
        else:
            with tempfile.TemporaryFile() as copy:
                _copy_stream(audio, copy, name)
                yield copy, name
    else:
        name = os.fsdecode(audio)
        _check_regular(name)
        # As bytes: soundfile cannot encode names that are not valid text.
        yield (name if os.name == "nt" else os.fsencode(name)), name


def _check_regular(name: str):
    """
    Check that a path leads to a regular file that can be opened.

    Raises:
        FileNotFoundError: when there is nothing.
        OSError: when it cannot be opened.
        ValueError: for a URL, a folder, a pipe, a socket or a device.
    """
    if name.startswith(("http://", "https://")):
        raise ValueError(f"{name} is a URL; download it and pass the file or its bytes")
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"No such audio file: {name}") from None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        hint = "" if stat.S_ISDIR(mode) else "; open it and pass the file object (on the command line, pipe it to `-`)"
        raise ValueError(f"{name} is {kind}, not an audio file{hint}")
    with open(name, "rb"):  # libsndfile would say no more than "System error"
        pass


def _copy_stream(stream, copy, name: str):
    """Copy a stream that cannot be rewound to a file, as long as it can be audio."""
    probe = b""
    while len(probe) < PROBE_BYTES and (chunk := stream.read(PROBE_BYTES - len(probe))):
        probe += chunk
    if len(probe) == PROBE_BYTES:
        try:
            soundfile.SoundFile(io.BytesIO(probe)).close()
        except soundfile.LibsndfileError as error:
            if error.code == 1:  # SF_ERR_UNRECOGNISED_FORMAT
                raise ValueError(f"Cannot read {name} as audio: {error.error_string}") from None
    copy.write(probe)
    while chunk := stream.read(2**20):
        copy.write(chunk)
    copy.seek(0)


class _Decoder:
    """
    A sound file that is decoded from front to back, past damage where there is any.

    Args:
        source: path or seekable file object.
        name: of the source, for messages.

    Raises:
        soundfile.LibsndfileError, RuntimeError: when it is no sound file.
    """

    def __init__(self, source, name: str):
        self.source, self.name, self.file = source, name, soundfile.SoundFile(source)
        self.rate, self.channels, self.subtype = self.file.samplerate, self.file.channels, self.file.subtype
        self.log, self.decoded, self.position, self.error = self.file.extra_info, 0, 0, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def blocks(self, block_s: float) -> Iterator[np.ndarray]:
        """
        Blocks `(samples, channels)`; what cannot be decoded in between is silence, so that times stay right.

        Raises:
            OSError: when the file is removed or replaced meanwhile and has to be opened again.
        """
        block, packet = max(1, int(block_s * self.rate)), max(1, int(PACKET_S * self.rate))
        gap, skip, careful_until = 0, packet, 0
        while self.position < self.file.frames:
            size, samples = packet if self.position < careful_until else block, ()
            try:
                samples = self.file.read(size, dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:  # ValueError: it is beyond its end
                self.error = getattr(error, "error_string", error)
            if not len(samples):
                if self.file.frames >= ENDLESS and self.error is None:
                    return
                # Some decoders end at damage as if it were the end: from there on with care, and if that is of no use,
                # doubling the skip each time, so that the end of any file is reached quickly.
                careful_until = self.position + block
                if size == packet:
                    self.position, gap, skip = self.position + skip, gap + skip, 2 * skip
                while self.position < self.file.frames and not self._reopen():
                    self.position, gap, skip = self.position + skip, gap + skip, 2 * skip
                continue
            for start in range(0, gap, block):
                yield np.zeros((min(block, gap - start), self.channels), dtype=np.float32)
            yield samples
            self.position, self.decoded, gap, skip = (
                self.position + len(samples),
                self.decoded + len(samples),
                0,
                packet,
            )

    def _reopen(self) -> bool:
        """
        Start a new decoder at the position, since one that has failed is of no more use; whether that is possible.

        Raises:
            OSError: when the file is gone or another one by now.
        """
        self.file.close()
        if hasattr(self.source, "seek"):
            self.source.seek(0)
        try:
            self.file = soundfile.SoundFile(self.source)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            reason = getattr(error, "error_string", error)
            raise OSError(f"{self.name} was removed or replaced while it was read: {reason}") from None
        found, expected = (self.file.samplerate, self.file.channels), (self.rate, self.channels)
        if found != expected:
            raise OSError(
                f"{self.name} was replaced while it was read: it had {expected[1]} channels at {expected[0]} Hz and now has "
                f"{found[1]} at {found[0]} Hz"
            )
        try:
            self.file.seek(self.position)
        except (soundfile.LibsndfileError, RuntimeError):
            return False
        return True

    def damage(self, out_of_range: int) -> str:
        """
        What is wrong with the file, all of it decoded, with so many samples that are NaN or out of range; empty for a sound
        file.
        """
        decoded_s, announced_s, found = self.decoded / self.rate, self._announced() / self.rate, []
        if announced_s - decoded_s >= NEGLIGIBLE_S:
            found.append(f"only {decoded_s:.2f} s of the {announced_s:.2f} s that the header announces can be decoded")
        elif _CUT_OFF.search(self.log):
            found.append(f"ends without an end mark, so it may be cut off; {decoded_s:.2f} s can be decoded")
        if out_of_range:
            found.append(f"{out_of_range} samples are NaN or out of range and taken for silence")
        return "; ".join(found)

    def _announced(self) -> float:
        """Number of samples that the header announces, in each channel."""
        frames = self.file.frames
        if frames >= ENDLESS:
            return self.decoded
        size, length = _DATA_SIZE.search(self.log), _FILE_SIZE.search(self.log)
        if size is None:
            return frames
        announced = int(size[1])
        there = int(size[2]) if size[2] else min(announced, int(length[1]) if length else announced)
        # Programs that write to a pipe announce about as much as fits into 31 or 32 bits.
        endless = announced >= 2**32 - 2**16 or abs(announced - 2**31) <= 2**16
        return frames if endless or not there else max(frames, frames * announced / there)


def _silence_out_of_range(block: np.ndarray, subtype: str, name: str) -> tuple[np.ndarray, int]:
    """
    A file's block with silence in place of samples that no recording has, NaN or beyond `MAX_AMPLITUDE`, and their number.

    Raises:
        ValueError: when floating-point samples are really integers.
    """
    with np.errstate(invalid="ignore"):
        out_of_range = ~(np.abs(block) <= MAX_AMPLITUDE)
    count = int(out_of_range.sum())
    if not count:
        return block, 0
    if subtype in ("FLOAT", "DOUBLE"):
        levels = np.abs(block[np.isfinite(block) & (block != 0)].astype(np.float64))
        if len(levels) and np.median(levels) > MAX_AMPLITUDE:
            raise ValueError(
                f"The samples of {name} reach {levels.max():.0f}; floats must lie in about -1..1. Divide by the full scale "
                "(32768 for 16 bits), or write integers"
            )
    return np.where(out_of_range, np.float32(0), block), count


def to_waveform(samples: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """
    Samples of any numeric dtype, `(samples,)` or `(channels, samples)`, to mono float32 at `target_rate`.

    The rate is changed by soxr (a band-limited filter).

    Raises:
        ValueError: for empty audio, NaN or infinite samples, wrong shapes, dtypes or rates.
    """
    source_rate = check_rate(source_rate)
    try:
        samples = to_mono(samples)
    except MemoryError:
        raise ValueError(f"Audio of shape {samples.shape} does not fit into memory") from None
    if source_rate != target_rate:
        samples = soxr.resample(samples, source_rate, target_rate).astype(np.float32)
    return np.ascontiguousarray(samples)


def stream_audio(audio, target_rate: int, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
    """
    Any kind of audio that `read_audio` takes as mono float32 blocks of about `BLOCK_S` seconds at `target_rate`.

    Files are decoded once, block by block, and never held in memory as a whole; together the blocks are what `to_waveform`
    returns.

    Raises:
        ValueError, OSError: as `read_audio` and `to_waveform`, when the bad block is reached.
    """
    if sampling_rate is not None:
        check_rate(sampling_rate)
    if isinstance(audio, Mapping) and all(audio.get(key) is None for key in ("array", "raw")):
        audio = _file_of(audio)
    if not _is_file(audio):
        samples, rate = read_audio(audio, sampling_rate)
        waveform = to_waveform(samples, target_rate if rate is None else rate, target_rate)
        size = int(BLOCK_S * target_rate)
        yield from (waveform[start : start + size] for start in range(0, len(waveform), size))
        return
    resampler = None
    for block, rate in _file_blocks(audio, BLOCK_S):
        if resampler is None and rate != target_rate:
            resampler = soxr.ResampleStream(rate, target_rate, 1, dtype="float32")
        mono = to_mono(block)
        yield mono if resampler is None else resampler.resample_chunk(mono)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def file_duration_s(path) -> float | None:
    """Length of a sound file in seconds by its header, `None` where that does not say or nothing can be read at once."""
    if not os.path.isfile(path):
        return None
    try:
        info = soundfile.info(os.fsencode(path) if os.name != "nt" else os.fspath(path))
    except (soundfile.LibsndfileError, RuntimeError):
        return None
    return None if info.frames >= ENDLESS else info.frames / info.samplerate


def check_rate(rate) -> int | float:
    """
    A sampling rate in Hz as a plain number, `int` where it is whole.

    Raises:
        ValueError: for anything that is no number in `RATES`.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.integer, np.floating)):
        raise ValueError(f"`sampling_rate` must be a number of Hz, got {rate!r}")
    if not RATES[0] <= rate <= RATES[1]:  # false for NaN too
        raise ValueError(f"`sampling_rate` must be from {RATES[0]} to {RATES[1]} Hz, got {rate}")
    return int(rate) if math.floor(rate) == rate else float(rate)


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
    elif samples.dtype.kind == "i":
        full_scale = float(2 ** (8 * min(samples.dtype.itemsize, 4) - 1))
        if samples.dtype.itemsize == 8 and np.abs(samples).max() < 2**15:
            full_scale = float(2**15)  # int64 is how Python lists and torch carry 16-bit samples
        samples = (samples / full_scale).astype(np.float32)
    elif samples.dtype.kind == "f":
        samples = samples.astype(np.float32)
    else:
        raise ValueError(f"Audio samples must be signed integers, uint8 or floats, got dtype {samples.dtype}")
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
    """Whether `audio` is several recordings: any iterable, such as a list or a `datasets` column, but of bare numbers."""
    if not isinstance(audio, Iterable) or isinstance(audio, (Mapping, array.array)) or _is_file(audio):
        return False
    if isinstance(audio, (list, tuple)):
        return not (len(audio) > 0 and isinstance(audio[0], (int, float, np.number)))
    return not hasattr(audio, "__array__") and not hasattr(audio, "get_all_samples")
