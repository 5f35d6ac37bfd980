"""`model.align`: times of a text that is given."""

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf.forced_alignment_voxlm import SPOKEN_FROM, divide_words, known_text, score_text
from voxlm_hf.transcription_voxlm import Segment


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def writing():
    """A random model that writes something."""
    return tiny.model(llm="qwen3")


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


def test_the_words_of_a_transcript_get_the_times_they_had():
    """
    The same tokens, the same states: alignment afterwards is the alignment of the transcription. The model may write words of
    a single token only, so its text is spelt with the very tokens that it wrote.
    """
    model = tiny.model(llm="qwen3")
    model.processor.text_prefix = " "
    vocabulary = tiny.tokenizer().get_vocab()
    words = {token for text, token in vocabulary.items() if text[0] == "Ġ" and len(text) > 2 and text[1:].isascii()}
    model.generation_config.suppress_tokens = [token for token in range(tiny.VOCAB_SIZE) if token not in words]
    clip = tiny.noise(3.0)
    result = model.transcribe(clip, max_new_tokens=8)
    assert len(result.words) == 8
    given = model.align(clip, result.text)
    for word, expected in zip(given.words, result.words, strict=True):
        assert word["word"] == expected["word"]
        times = expected["start"], expected["end"]
        assert (word["start"], word["end"]) == pytest.approx(times, abs=0.002)


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
        ("a <|audio|> b", r"special token '<\|audio\|>'"),
        ("word " * 200, "200 words, but the recording only"),
    ],
)
def test_text_that_cannot_be_aligned(model, text, message):
    with pytest.raises(ValueError, match=message):
        model.align(tiny.noise(1.0), text)


@pytest.mark.parametrize("text, message", [(["a"], "1 for 2 recordings"), ("a b", "one text for 2 recordings")])
def test_as_many_texts_as_recordings(model, text, message):
    with pytest.raises(ValueError, match=message):
        model.align([tiny.noise(1.0)] * 2, text)


@pytest.mark.parametrize(
    "audio, message",
    [
        (np.zeros(0, np.float32), "empty"),
        (np.full(16000, np.nan), "NaN"),
        (np.zeros(16000 * 40), "2 words, but there is no speech in the 40.0 s"),
    ],
    ids=["empty", "NaN", "long silence"],
)
def test_audio_that_cannot_be_aligned(model, audio, message):
    with pytest.raises(ValueError, match=message):
        model.align(audio, "the fox")


# Words that nobody said


@pytest.mark.parametrize("logprob, spoken", [(SPOKEN_FROM - 0.5, False), (SPOKEN_FROM + 0.5, True)])
def test_a_word_that_the_llm_does_not_believe_is_not_spoken(model, monkeypatch, logprob, spoken):
    """Log-probabilities by hand; those of the second word's tokens count together."""

    def teacher_force(model, prompt, texts):
        (text,) = texts
        second = torch.from_numpy(text.token_words == 1)
        text.states = torch.zeros(len(text.ids), model.config.text_config.hidden_size)
        text.logprobs = torch.where(second, logprob / int(second.sum()), -0.1)
        text.entropies = torch.ones(len(text.ids))

    monkeypatch.setattr("voxlm_hf.forced_alignment_voxlm.teacher_force", teacher_force)
    result = model.align(tiny.noise(2.0), "the unsaid fox")
    assert [word["spoken"] for word in result.words] == [True, spoken, True]


@pytest.mark.parametrize("plain_is_likelier", [True, False])
def test_a_text_is_scored_in_its_likelier_spelling(model, monkeypatch, plain_is_likelier):
    """As given and as a model without capitals and punctuation would write it; its words stay as given."""

    def teacher_force(model, prompt, texts):
        for text in texts:
            is_plain = model.processor.decode_text(text.ids) == "the fox"
            text.logprobs = torch.full((len(text.ids),), -1.0 if is_plain == plain_is_likelier else -2.0)

    monkeypatch.setattr("voxlm_hf.forced_alignment_voxlm.teacher_force", teacher_force)
    known = known_text(model.processor, "The FOX!")
    scored = score_text(model, model.processor, tiny.noise(1.0), known).decoded
    assert model.processor.decode_text(scored.ids) == ("the fox" if plain_is_likelier else "The FOX!")
    assert scored.words == ["The", "FOX!"]


# Long recordings


def segment(start, end, *words):
    """A transcribed segment whose words have these starts and ends."""
    timed = [{"word": word, "start": first, "end": last} for word, first, last in words]
    return Segment(start, end, words=timed)


FIRST = segment(0, 10, ("the", 1, 2), ("quick", 2, 3), ("fox.", 3, 8))
SECONDS = {
    "as it was said": (segment(10, 20, ("Jumps", 10.2, 11)), 3),
    "another word in its place": (segment(10, 20, ("lazy", 10.2, 11), ("over", 11, 12), ("dog", 12, 13)), 3),
    "left out, room in the first": (segment(10, 20, ("over", 10.2, 11), ("dog", 11, 12)), 4),
    "left out, room in the second": (segment(10, 20, ("over", 19, 19.5), ("dog", 19.5, 20)), 3),
}
GIVEN = "The quick fox jumps over dog".split()


@pytest.mark.parametrize("name", SECONDS)
def test_a_text_is_divided_by_what_was_transcribed(name):
    second, cut = SECONDS[name]
    assert divide_words(GIVEN, [FIRST, second]) == [0, cut, 6]


@pytest.mark.parametrize("name", SECONDS)
def test_segments_without_words_get_none(name):
    second, cut = SECONDS[name]
    silent = segment(5, 6)
    assert divide_words(GIVEN, [silent, FIRST, silent, second, silent]) == [0, 0, cut, cut, 6, 6]


def test_a_text_that_matches_nothing_is_divided_by_time():
    assert divide_words(GIVEN, [segment(0, 10), segment(10, 30)]) == [0, 2, 6]


def test_the_words_of_a_long_recording_lie_outside_its_pause(writing):
    waveform = np.concatenate([tiny.noise(20.0, 0), np.zeros(16000 * 4, np.float32), tiny.noise(18.0, 1)])
    words = [f"w{number}" for number in range(40)]
    result = writing.align(waveform, " ".join(words))
    check(result, words, 42.0)
    assert result.words[-1]["end"] > 24.0 and not any(20.4 < word["start"] < 23.5 for word in result.words)
