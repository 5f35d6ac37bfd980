"""The processor: every kind of audio in, bad audio refused, ids to words."""

import io
import types

import numpy as np
import pytest
import soundfile
import soxr
import torch

from tests import tiny
from voxlm_hf import VoxLMProcessor
from voxlm_hf.audio_voxlm import to_waveform
from voxlm_hf.processing_voxlm import affine_lengths


@pytest.fixture(scope="module")
def processor():
    return tiny.model().processor


@pytest.fixture
def tone():
    """One second of a 440 Hz tone at 16 kHz."""
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)


def test_every_kind_of_input_gives_the_same_waveform(processor, tone, tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone, 16000, subtype="FLOAT")
    decoder = types.SimpleNamespace(
        get_all_samples=lambda: types.SimpleNamespace(data=torch.from_numpy(tone)[None], sample_rate=16000)
    )
    kinds = [
        str(path),
        path,
        path.read_bytes(),
        tone,
        tone.astype(np.float64),
        torch.from_numpy(tone),
        tone.tolist(),
        {"array": tone, "sampling_rate": 16000},
        {"raw": tone, "sampling_rate": 16000},
        {"path": str(path), "bytes": None},
        {"path": None, "bytes": path.read_bytes()},
        decoder,
        np.stack([tone, tone]),
        tone[None],
    ]
    for kind in kinds:
        np.testing.assert_allclose(processor.load_audio(kind), tone, atol=1e-6)
    assert len(processor.load_batch(kinds)) == len(kinds)
    assert len(processor.load_batch(tone.tolist())) == 1


def test_integers_are_scaled_by_their_full_scale(processor, tone):
    for dtype, scale in ((np.int16, 2**15), (np.int32, 2**31)):
        samples = (tone.astype(np.float64) * (scale - 1)).astype(dtype)
        np.testing.assert_allclose(processor.load_audio(samples), tone, atol=1e-4)
    unsigned = (tone * 127 + 128).astype(np.uint8)
    np.testing.assert_allclose(processor.load_audio(unsigned), tone, atol=2e-2)
    sixteen_bits = torch.from_numpy((tone * 32767).astype(np.int64))
    np.testing.assert_allclose(processor.load_audio(sixteen_bits), tone, atol=1e-4)


def test_resampling_is_band_limited(processor):
    time = np.arange(44100) / 44100
    low, high = (np.sin(2 * np.pi * hertz * time).astype(np.float32) for hertz in (440, 15000))
    kept = processor.load_audio({"array": low, "sampling_rate": 44100})
    np.testing.assert_allclose(kept, soxr.resample(low, 44100, 16000), atol=1e-6)
    # 15 kHz cannot exist at a rate of 16 kHz: linear interpolation would fold it to an audible 1 kHz.
    assert np.abs(processor.load_audio({"array": high, "sampling_rate": 44100})[1000:-1000]).max() < 1e-3


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


def test_bad_files(processor, tmp_path, tone):
    text = tmp_path / "text.wav"
    text.write_text("this is a text file")
    with pytest.raises(ValueError, match="Cannot read .*text.wav"):
        processor.load_audio(text)
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        processor.load_audio(tmp_path / "missing.wav")
    with pytest.raises(ValueError, match="folder"):
        processor.load_audio(tmp_path)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone, 16000, format="FLAC")
    with pytest.raises(ValueError, match="Cannot read"):
        processor.load_audio(buffer.getvalue()[:30])


def test_features_do_not_depend_on_the_batch(processor):
    clips = [tiny.noise(0.5137), tiny.noise(1.2)]
    batch = processor.apply_transcription_request(clips)
    alone = processor.apply_transcription_request(clips[0])
    length = alone["input_features"].shape[-1]
    assert torch.equal(batch["input_features"][0, :, :length], alone["input_features"][0])
    assert batch["input_features_mask"].sum(-1).tolist() == [length, 120]
    assert batch["input_features"].shape[-1] == 120, "only the real audio, padded to the longest"


def test_prompts(processor):
    audio = tiny.noise(0.5)
    ids = processor.apply_transcription_request([audio, audio], prompt=["Names: Ada", None])["input_ids"]
    decoded = processor.tokenizer.batch_decode(ids)
    assert "Names: Ada" in decoded[0] and processor.prompt in decoded[1]
    with pytest.raises(ValueError, match="special token"):
        processor.render_prompt("a <|audio|> b")
    with pytest.raises(ValueError, match="must be a string"):
        processor.render_prompt(3)
    with pytest.raises(ValueError, match="3 prompts for 2 recordings"):
        processor.apply_transcription_request([audio, audio], prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="1 texts for 2 recordings"):
        processor.apply_transcription_request([audio, audio], text=["a"])


def test_text_and_audio_must_match(processor):
    with pytest.raises(ValueError, match="exactly one"):
        processor(text=["no placeholder"], audio=tiny.noise(0.5))
    with pytest.raises(ValueError, match="exactly one"):
        processor(text=["<|audio|>", "<|audio|>"], audio=[tiny.noise(0.5)])


def test_padding_sides(processor):
    clips = [tiny.noise(0.5), tiny.noise(1.0)]
    text = [processor.render_prompt()] * 2
    assert processor(text=text, audio=clips)["attention_mask"][0, 0] == 0
    assert processor(text=text, audio=clips, padding_side="right")["attention_mask"][0, -1] == 0


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = VoxLMProcessor.from_pretrained(tmp_path)
    first, second = (item.apply_transcription_request(tiny.noise(0.7)) for item in (processor, loaded))
    for name in first:
        assert torch.equal(first[name], second[name])
    assert loaded.to_dict() == processor.to_dict()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("he hoped there would", ["he", "hoped", "there", "would"]),
        (" leading and  double spaces ", ["leading", "and", "double", "spaces"]),
        ("naïve café", ["naïve", "café"]),
        ("it's well-known, isn't it?", ["it's", "well-known,", "isn't", "it?"]),
        ("new\nlines\tand tabs", ["new", "lines", "and", "tabs"]),
        ("👩‍🚀 spoke", ["👩‍🚀", "spoke"]),
        ("Привет мир", ["Привет", "мир"]),
        ("안녕 세계", ["안녕", "세계"]),
        ("", []),
        ("   ", []),
        ("1,000.5 $3", ["1,000.5", "$3"]),
    ],
)
def test_words_of_scripts_with_spaces(processor, text, expected):
    ids = processor.tokenizer(text)["input_ids"]
    words = processor.split_words(ids)
    assert [word.text for word in words] == expected
    # together the words' tokens are those of the text but for pure white space
    used = sorted({position for word in words for position in word.tokens})
    missing = [processor.tokenizer.decode([ids[position]]) for position in range(len(ids)) if position not in used]
    assert all(piece.isspace() for piece in missing)


@pytest.mark.parametrize("text", ["你好，世界。", "これはペンです", "สวัสดี", "我有3个apple。"])
def test_words_of_scripts_without_spaces(processor, text):
    words = processor.split_words(processor.tokenizer(text)["input_ids"])
    assert "".join(word.text for word in words) == text
    assert len(words) > 1 and not any("\ufffd" in word.text for word in words)
    assert not any(word.text[0] in "，。" for word in words)


def test_special_tokens_are_no_words(processor):
    tokenizer = processor.tokenizer
    ids = [0, *tokenizer(" the fox")["input_ids"], tokenizer.convert_tokens_to_ids("<|audio|>"), 2, 1]
    words = processor.split_words(ids)
    assert [word.text for word in words] == ["the", "fox"]
    assert words[0].tokens[0] == 1 and processor.decode_text(ids) == " the fox"


def test_split_utf8_at_the_end_is_kept_once(processor):
    ids = processor.tokenizer("the é")["input_ids"][:-1]
    assert [word.text for word in processor.split_words(ids)][0] == "the"


def test_affine_lengths_of_known_convolutions():
    def length_of(n):
        return (((n + 2 - 3) // 2 + 1) - 2) // 3 + 1  # kernel 3 stride 2 padding 1, then kernel 2 stride 3

    stride, offset = affine_lengths(length_of, 200)
    assert stride == 6
    for n in range(1, 200):
        assert max(0, (n + offset) // stride) == max(0, int(length_of(torch.tensor(n))))
    with pytest.raises(ValueError, match="affine"):
        affine_lengths(lambda n: n**2, 100)


def test_to_waveform_mixes_channels():
    stereo = np.stack([np.ones(1000, np.float32), np.zeros(1000, np.float32)])
    np.testing.assert_allclose(to_waveform(stereo, 16000, 16000), 0.5)
