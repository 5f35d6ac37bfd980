"""Audio in: every kind of recording to mono float32, bad audio refused, files as a stream of blocks."""

import io
import types

import numpy as np
import pytest
import soundfile
import soxr
import torch

from tests import tiny
from voxlm_hf.audio_voxlm import BLOCK_S, is_batch, read_audio, stream_audio, to_mono, to_waveform
from voxlm_hf.processing_voxlm import one_for_each


@pytest.fixture(scope="module")
def processor():
    return tiny.model().processor


@pytest.fixture
def tone():
    """One second of a 440 Hz tone at 16 kHz."""
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)


KINDS = {
    "path as text": lambda tone, path: str(path),
    "path": lambda tone, path: path,
    "bytes": lambda tone, path: path.read_bytes(),
    "array": lambda tone, path: tone,
    "array in 64 bits": lambda tone, path: tone.astype(np.float64),
    "tensor": lambda tone, path: torch.from_numpy(tone),
    "list": lambda tone, path: tone.tolist(),
    "dict with array": lambda tone, path: {"array": tone, "sampling_rate": 16000},
    "dict with raw": lambda tone, path: {"raw": tone, "sampling_rate": 16000},
    "dict with path": lambda tone, path: {"path": str(path), "bytes": None},
    "dict with bytes": lambda tone, path: {"path": None, "bytes": path.read_bytes()},
    "decoder of datasets": lambda tone, path: types.SimpleNamespace(
        get_all_samples=lambda: types.SimpleNamespace(data=torch.from_numpy(tone)[None], sample_rate=16000)
    ),
    "stereo": lambda tone, path: np.stack([tone, tone]),
    "one channel": lambda tone, path: tone[None],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_gives_the_same_waveform(kind, processor, tone, tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone, 16000, subtype="FLOAT")
    audio = KINDS[kind](tone, tmp_path / "tone.wav")
    np.testing.assert_allclose(processor.load_audio(audio), tone, atol=1e-6)
    streamed = np.concatenate(list(stream_audio(audio, 16000)))
    np.testing.assert_allclose(streamed, tone, atol=1e-6)


@pytest.mark.parametrize(
    "audio, expected",
    [
        ([0.1, 0.2], False),
        ([np.float32(0.1)], False),
        (np.zeros((2, 100)), False),
        ("a.wav", False),
        (["a.wav", "b.wav"], True),
        ((np.zeros(10),), True),
        ([], True),
    ],
)
def test_a_list_of_anything_but_numbers_is_a_batch(audio, expected):
    assert is_batch(audio) == expected


@pytest.mark.parametrize("prompt, expected", [(None, [None, None]), ("a", ["a", "a"]), (["a", None], ["a", None])])
def test_one_prompt_for_each_recording(prompt, expected):
    assert one_for_each(prompt, 2) == expected


def test_a_rate_that_is_not_known_stays_unknown(tone):
    assert read_audio(tone)[1] is None and read_audio(tone, 8000)[1] == 8000
    assert read_audio({"array": tone, "sampling_rate": 44100}, 8000)[1] == 44100


@pytest.mark.parametrize(
    "samples, expected",
    [
        (np.array([0, 16384, -32768], np.int16), [0, 0.5, -1]),
        (np.array([0, 2**30, -(2**31)], np.int32), [0, 0.5, -1]),
        (np.array([128, 192, 0], np.uint8), [0, 0.5, -1]),
        (np.array([0, 16384, -32767], np.int64), [0, 0.5, -32767 / 32768]),  # 16 bits in Python's integers
        (np.array([[1.0, 0.5], [0.0, -0.5]]), [0.5, 0.0]),  # channels are averaged
    ],
    ids=["int16", "int32", "uint8", "int64", "channels"],
)
def test_samples_are_scaled_by_their_full_scale(samples, expected):
    mono = to_mono(samples)
    assert mono.dtype == np.float32
    np.testing.assert_allclose(mono, expected, atol=1e-7)


def test_resampling_is_soxrs(processor):
    low = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32)
    kept = processor.load_audio({"array": low, "sampling_rate": 44100})
    np.testing.assert_allclose(kept, soxr.resample(low, 44100, 16000), atol=1e-6)


def test_resampling_is_band_limited():
    """15 kHz cannot exist at a rate of 16 kHz: linear interpolation would fold it to an audible 1 kHz."""
    high = np.sin(2 * np.pi * 15000 * np.arange(44100) / 44100).astype(np.float32)
    assert np.abs(to_waveform(high, 44100, 16000)[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("rate", [16000, 44100])
def test_the_blocks_of_a_file_are_together_the_whole(tmp_path, rate):
    samples = tiny.noise(25)  # three blocks of ten seconds and less
    soundfile.write(tmp_path / "long.wav", samples, rate, subtype="FLOAT")
    blocks = list(stream_audio(tmp_path / "long.wav", 16000))
    whole = to_waveform(samples, rate, 16000)
    assert len(blocks) > 25 * 16000 / rate // BLOCK_S
    assert abs(sum(map(len, blocks)) - len(whole)) <= 1
    streamed = np.concatenate(blocks)[: len(whole)]
    np.testing.assert_allclose(streamed, whole[: len(streamed)], atol=1e-4)


def test_a_bad_block_is_named_by_its_second(tmp_path):
    samples = tiny.noise(25)
    samples[15 * 16000] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 16000, subtype="FLOAT")
    stream = stream_audio(tmp_path / "nan.wav", 16000)
    assert len(next(stream)) == 160000
    with pytest.raises(ValueError, match="From second 10 on: 1 of 160000 audio samples are NaN"):
        next(stream)


BAD_AUDIO = {
    "empty": (np.zeros(0, np.float32), "empty"),
    "empty channel": (np.zeros((2, 0), np.float32), "empty"),
    "NaN": (np.full(16000, np.nan, np.float32), "16000 of 16000 audio samples are NaN"),
    "infinite": (np.full(16000, np.inf, np.float32), "NaN or infinite"),
    "integers as floats": (np.full(16000, 20000.0, np.float32), "reach 20000"),
    "too short": (np.zeros(100, np.float32), "0.006 s long; at least"),
    "complex": (np.zeros(16000, np.complex64), "dtype complex64"),
    "booleans": (np.zeros(16000, bool), "dtype bool"),
    "text": (np.array(["a", "b"]), "dtype"),
    "samples first": (np.zeros((16000, 2), np.float32), "transpose"),
    "three axes": (np.zeros((1, 2, 16000), np.float32), "shape"),
    "no rate": ({"array": np.zeros(16000)}, "sampling_rate"),
    "rate 0": ({"array": np.zeros(16000), "sampling_rate": 0}, "sampling_rate"),
    "rate as text": ({"array": np.zeros(16000), "sampling_rate": "16k"}, "sampling_rate"),
    "other dict": ({"samples": 1}, "needs 'array'"),
    "nothing": (None, "NoneType"),
    "number": (3.0, "float"),
    "object": (object(), "object"),
    "bytes of text": (b"this is no audio at all", "Cannot read 23 bytes"),
    "no bytes": (b"", "Cannot read"),
    "url": ("https://example.org/a.wav", "URL"),
    "ragged": ([[0.1, 0.2], [0.3]], None),
    "empty list": ([], "empty"),
    "longer than the window": (np.zeros(31 * 16000, np.float32), "31.0 s long.*30.0 s.*transcribe"),
}


@pytest.mark.parametrize("name", BAD_AUDIO)
def test_bad_audio_is_one_clear_value_error(processor, name):
    audio, message = BAD_AUDIO[name]
    with pytest.raises(ValueError, match=message):
        processor.apply_transcription_request(audio)


def test_a_text_file_is_no_audio(processor, tmp_path):
    (tmp_path / "text.wav").write_text("this is a text file")
    with pytest.raises(ValueError, match="Cannot read .*text.wav"):
        processor.load_audio(tmp_path / "text.wav")


def test_a_missing_file_is_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        processor.load_audio(tmp_path / "missing.wav")


def test_a_folder_is_no_audio(processor, tmp_path):
    with pytest.raises(ValueError, match="folder"):
        processor.load_audio(tmp_path)


def test_the_first_bytes_of_a_file_are_no_audio(processor, tone):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone, 16000, format="FLAC")
    with pytest.raises(ValueError, match="Cannot read"):
        processor.load_audio(buffer.getvalue()[:30])
