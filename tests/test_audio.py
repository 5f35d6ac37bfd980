"""Audio in: every kind of recording to mono float32, bad audio refused, files as a stream of blocks."""

import array
import io
import itertools
import os
import re
import types

import datasets
import numpy as np
import pytest
import soundfile
import soxr
import torch

from tests import tiny
from voxlm_hf import audio_voxlm
from voxlm_hf.audio_voxlm import BLOCK_S, file_duration_s, is_batch, read_audio, stream_audio, to_mono, to_waveform
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
    "bytes in memory": lambda tone, path: io.BytesIO(path.read_bytes()),
    "open file": lambda tone, path: open(path, "rb"),
    "array": lambda tone, path: tone,
    "array in 64 bits": lambda tone, path: tone.astype(np.float64),
    "tensor": lambda tone, path: torch.from_numpy(tone),
    "list": lambda tone, path: tone.tolist(),
    "array of Python": lambda tone, path: array.array("f", tone),
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


SOUND = tiny.noise(12)
FORMATS = {
    "WAV": "PCM_16",
    "WAVEX": "FLOAT",
    "W64": "PCM_24",
    "RF64": "PCM_16",
    "AIFF": "PCM_16",
    "AU": "ULAW",
    "FLAC": "PCM_16",
    "MP3": "MPEG_LAYER_III",
    "OGG": "VORBIS",
}


def encoded(kind, subtype, samples=SOUND):
    """The bytes of a file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture
def warned(monkeypatch):
    """What `audio_voxlm` warns of."""
    warnings = []
    monkeypatch.setattr(audio_voxlm.logger, "warning", warnings.append)
    return warnings


@pytest.mark.parametrize("kept", [0.95, 0.5])
@pytest.mark.parametrize("kind, subtype", [*FORMATS.items(), ("OGG", "OPUS"), ("WAV", "IMA_ADPCM")])
def test_a_cut_file_is_used_as_far_as_it_goes_with_one_warning(kind, subtype, kept, warned):
    content = encoded(kind, subtype)
    whole = np.concatenate(list(stream_audio(content, 16000)))
    assert not warned
    cut = np.concatenate(list(stream_audio(content[: int(kept * len(content))], 16000)))
    assert kept * 12 - 1.1 < len(cut) / 16000 < kept * 12 + 0.1
    np.testing.assert_allclose(cut[:-8000], whole[: len(cut) - 8000], atol=1e-3)
    (warning,) = warned
    seconds = re.findall(r"([\d.]+) s\b", warning)
    assert float(seconds[0]) == pytest.approx(len(cut) / 16000, abs=0.01)
    assert kind == "OGG" or float(seconds[1]) == pytest.approx(12, abs=0.1)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.85])
@pytest.mark.parametrize("kind, damaged", [("FLAC", 1), ("FLAC", 2000), ("MP3", 2000)])
def test_what_follows_damage_is_used_too_and_at_its_time(kind, where, damaged, warned):
    content = bytearray(encoded(kind, FORMATS[kind]))
    whole, first = read_audio(bytes(content))[0][0], int(where * len(content))
    content[first : first + damaged] = np.random.default_rng(0).bytes(damaged)
    samples = np.concatenate(list(stream_audio(bytes(content), 16000)))
    assert abs(len(samples) - len(whole)) < 16000 and np.abs(samples).max() < 10
    assert kind == "MP3" or len(warned) == 1
    # MP3 resumes at a frame that it guesses; loudness, not samples, tells that the time is right.
    level, expected = ([np.abs(part).mean() for part in np.array_split(item[-8000:], 4)] for item in (samples, whole))
    assert kind == "MP3" or np.allclose(level, expected, rtol=0.01)


REPLACEMENTS = {
    "removed": None,
    "text": b"this is no audio at all",
    "stereo": encoded("WAV", "PCM_16", np.stack([SOUND, SOUND], axis=1)),
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_a_damaged_file_that_changes_while_it_is_read_is_an_error_of_its_own(tmp_path, replacement):
    path, content = tmp_path / "cut.flac", encoded("FLAC", "PCM_16")
    path.write_bytes(content[: int(0.9 * len(content))])  # opened again at 10.8 s, in the second block
    blocks = stream_audio(path, 16000)
    assert len(next(blocks)) == 16000 * BLOCK_S
    path.unlink()
    if REPLACEMENTS[replacement] is not None:
        path.write_bytes(REPLACEMENTS[replacement])
    with pytest.raises(OSError, match="cut.flac was (removed or )?replaced while it was read"):
        list(blocks)


@pytest.mark.parametrize("value", [np.nan, np.inf, -3e38, 50.0])
def test_samples_of_a_file_that_no_recording_has_are_silence(value, warned):
    samples = SOUND.copy()
    samples[80000:80100] = value
    samples = np.concatenate(list(stream_audio(encoded("WAV", "FLOAT", samples), 16000)))
    np.testing.assert_array_equal(samples[80000:80100], 0)
    np.testing.assert_array_equal(samples[80100:], SOUND[80100:])
    (warning,) = warned
    assert "100 samples are NaN or out of range" in warning


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000])
def test_a_length_that_means_not_known_is_no_damage(size, warned):
    """What ffmpeg and sox write into a pipe."""
    content = bytearray(encoded("WAV", "PCM_16"))
    content[4:8] = content[40:44] = size.to_bytes(4, "little")
    assert read_audio(bytes(content))[0].shape == (1, len(SOUND)) and not warned


RATES = [0, 1, 999, 384_001, 10**9, -16000, float("nan"), float("inf"), "16000", True, [16000], np.bool_(True)]


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("audio", [np.zeros(16000), encoded("WAV", "PCM_16")], ids=["array", "file"])
def test_a_rate_that_no_audio_has_is_refused(audio, rate):
    for call in (read_audio, lambda *arguments: list(stream_audio(arguments[0], 16000, arguments[1]))):
        with pytest.raises(ValueError, match="`sampling_rate` must be"):
            call(audio, rate)


@pytest.mark.parametrize("rate", [1, 500, 400_000])
def test_a_rate_that_no_audio_has_is_refused_in_a_header(rate):
    content = bytearray(encoded("WAV", "PCM_16"))
    content[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(ValueError, match=f"says {rate} Hz"):
        next(stream_audio(bytes(content), 16000))


@pytest.mark.parametrize("rate", [16000.0, np.int32(16000), np.float32(16000), np.uint16(16000)], ids=repr)
def test_a_rate_may_be_any_number(processor, tone, rate):
    np.testing.assert_array_equal(processor.load_audio(tone, rate), tone)


TENSORS = {
    "sparse": lambda: torch.zeros(16000).to_sparse(),
    "meta": lambda: torch.zeros(16000, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(16000), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_tensors_without_plain_values_are_refused(processor, kind):
    with pytest.raises(ValueError, match="dense tensor"):
        processor.load_audio(TENSORS[kind]())


def test_what_is_no_regular_file_is_refused_at_once(processor, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "named pipe"), ("/dev/zero", "device"), (tmp_path, "folder")):
        for audio in (path, {"path": str(path)}):
            with pytest.raises(ValueError, match=kind):
                processor.load_audio(audio)
        assert file_duration_s(path) is None


class Pipe(io.RawIOBase):
    """A stream that cannot be rewound; `content` may be endless."""

    def __init__(self, content):
        self.content = iter(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        chunk = bytes(itertools.islice(self.content, len(buffer)))
        buffer[: len(chunk)] = chunk
        return len(chunk)


def test_a_stream_is_read_to_its_end(processor, tone):
    np.testing.assert_allclose(processor.load_audio(Pipe(encoded("FLAC", "PCM_16", tone))), tone, atol=1e-4)


def test_an_endless_stream_of_anything_is_given_up(processor, monkeypatch):
    monkeypatch.setattr(audio_voxlm, "PROBE_BYTES", 2**16)
    with pytest.raises(ValueError, match="Cannot read Pipe"):
        processor.load_audio(Pipe(itertools.repeat(ord("y"))))


def test_a_file_open_as_text_is_refused(processor, tmp_path, tone):
    soundfile.write(tmp_path / "tone.wav", tone, 16000)
    with open(tmp_path / "tone.wav") as file, pytest.raises(ValueError, match="binary mode"):
        processor.load_audio(file)


def test_a_name_that_is_no_text(processor, tmp_path, tone):
    path = os.path.join(os.fsencode(tmp_path), b"\xff.wav")
    soundfile.write(path, tone, 16000, format="WAV", subtype="FLOAT")
    np.testing.assert_allclose(processor.load_audio(os.fsdecode(path)), tone, atol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"\udcfe"):
        processor.load_audio(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xfe.wav")))


def test_a_column_of_datasets_is_a_batch(processor, tmp_path):
    column = datasets.Dataset.from_dict({"audio": [{"bytes": encoded("WAV", "PCM_16"), "path": None}] * 2})["audio"]
    assert is_batch(column) and [len(item) for item in processor.load_batch(column)] == [12 * 16000] * 2
    assert len(processor.apply_transcription_request(column)["input_ids"]) == 2


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


@pytest.mark.parametrize("kind", ["FLAC", "WAV", "OGG"])
def test_the_first_bytes_of_a_file_are_no_audio(processor, kind):
    with pytest.raises(ValueError, match="Cannot read|empty"):
        processor.load_audio(encoded(kind, FORMATS[kind])[:44])
