"""`model.align`: times of a text that is given."""

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf.forced_alignment_voxlm import plain_words


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def check(result, words, duration_s):
    assert [word["word"] for word in result.words] == words
    edges = np.array([[word["start"], word["end"]] for word in result.words])
    assert (edges[:, 1] > edges[:, 0]).all() and (edges[1:, 0] >= edges[:-1, 1]).all()
    assert edges.min() >= 0 and edges.max() <= duration_s + 1e-9
    assert all(0 <= word["confidence"] <= 1 and word["spoken"] in (True, False) for word in result.words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("hello", ["hello"]),
        ("The quick, BROWN fox!", ["The", "quick,", "BROWN", "fox!"]),
        ("no no  no\nno", ["no", "no", "no", "no"]),
        ("it cost $3.50 on 1/2/1999 \U0001f600 ...", ["it", "cost", "$3.50", "on", "1/2/1999", "\U0001f600", "..."]),
        ("你好世界", ["你", "好", "世", "界"]),
        ("naïve café über", ["naïve", "café", "über"]),
    ],
)
def test_words_come_back_as_given_in_order_and_inside(model, text, words):
    check(model.align(tiny.noise(2.0), text), words, 2.0)


def test_three_hundred_words(model):
    words = [f"w{number}" for number in range(100)] * 3
    check(model.align(tiny.noise(9.0), " ".join(words)), words, 9.0)


def test_the_words_of_a_transcript_get_the_times_they_had(model):
    """The same tokens, the same states: alignment after the fact is the alignment of the transcription."""
    model = tiny.model(llm="qwen3")  # a random model that writes something
    waveform = tiny.noise(3.0)
    result = model.transcribe(waveform)
    ids = model.processor.tokenizer(model.processor.text_prefix + result.text, add_special_tokens=False)["input_ids"]
    if model.processor.decode_text(ids).strip() != result.text or not result.words:
        pytest.skip("the random text does not survive its own tokenizer")
    given = model.align(waveform, result.text)
    assert [word["word"] for word in given.words] == [word["word"] for word in result.words]


def test_lists_and_prompts(model):
    clips, texts = [tiny.noise(1.0, 0), tiny.noise(2.0, 1)], ["the fox", "over the dog"]
    both = model.align(clips, texts, prompt=["a", None])
    assert both[0] == model.align(clips[0], texts[0], prompt="a")
    assert both[1] == model.align(clips[1], texts[1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no words"),
        (" \n ", "no words"),
        (None, "must be a string, got NoneType"),
        (["a", "b"], "must be a string, got list"),
        ("a <|audio|> b", "special token '<|audio|>'"),
        ("word " * 200, "200 words, but the recording only"),
    ],
)
def test_text_that_cannot_be_aligned(model, text, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        model.align(tiny.noise(1.0), text)


def test_as_many_texts_as_recordings(model):
    with pytest.raises(ValueError, match="1 for 2 recordings"):
        model.align([tiny.noise(1.0)] * 2, ["a"])
    with pytest.raises(ValueError, match="one text for 2 recordings"):
        model.align([tiny.noise(1.0)] * 2, "a b")


@pytest.mark.parametrize("audio", [np.zeros(0, np.float32), np.full(16000, np.nan), np.zeros(16000 * 40)])
def test_audio_that_cannot_be_aligned(model, audio):
    with pytest.raises(ValueError):
        model.align(audio, "the fox")


def test_plain_words():
    assert plain_words(["Hello,", "O'Neill's", "“Yes”", "...", "3.50$"]) == ["hello", "o'neill's", "yes", "...", "3.50"]


def test_a_word_that_the_llm_does_not_believe_is_not_spoken(model, monkeypatch):
    """Log-probabilities by hand: tokens of the second word together are far too unlikely."""

    def states(model, prompt, text):
        (ids,) = text.ids
        words = model.processor.split_words(ids)
        text.states = torch.zeros(1, len(ids), model.config.text_config.hidden_size)
        text.logprobs = torch.full((1, len(ids)), -0.1)
        text.logprobs[0, words[1].tokens] = -9.0 / len(words[1].tokens)
        text.entropies = torch.ones(1, len(ids))

    monkeypatch.setattr("voxlm_hf.forced_alignment_voxlm.read_states", states)
    result = model.align(tiny.noise(2.0), "the unsaid fox")
    assert [word["spoken"] for word in result.words] == [True, False, True]
