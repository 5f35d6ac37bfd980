"""`model.align`: times of a text that is given."""

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf.forced_alignment_voxlm import match_in_order, plain_words, share_words


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


def test_sequences_are_matched_as_cheaply_as_an_exhaustive_search_does():
    def cheapest(costs, gap):
        rows, columns = costs.shape
        best = {(row, column): gap * (row + column) for row in range(rows + 1) for column in range(columns + 1)}
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                ways = best[row - 1, column - 1] + costs[row - 1, column - 1], best[row - 1, column] + gap
                best[row, column] = min(*ways, best[row, column - 1] + gap)
        return best[rows, columns]

    generator = np.random.default_rng(0)
    for _ in range(50):
        costs = generator.integers(0, 4, size=generator.integers(0, 8, size=2)) / 2
        pairs = match_in_order(costs.__getitem__, *costs.shape, gap=0.7)
        assert all(one[0] < two[0] and one[1] < two[1] for one, two in zip(pairs, pairs[1:]))
        skipped = costs.shape[0] + costs.shape[1] - 2 * len(pairs)
        assert sum(costs[pair] for pair in pairs) + 0.7 * skipped == pytest.approx(cheapest(costs, 0.7))


def piece(start, end, *words):
    return {"start": start, "end": end}, [{"word": word, "start": s, "end": e} for word, s, e in words]


@pytest.mark.parametrize(
    "second, cut",
    [
        (piece(10, 20, ("Jumps", 10.2, 11)), 3),  # as it was said
        # another word at its place
        (piece(10, 20, ("lazy", 10.2, 11), ("over", 11, 12), ("dog", 12, 13)), 3),
        # "jumps" was not heard: it goes where there is more room
        (piece(10, 20, ("over", 10.2, 11), ("dog", 11, 12)), 4),
        (piece(10, 20, ("over", 19, 19.5), ("dog", 19.5, 20)), 3),
    ],
)
def test_a_text_is_shared_out_by_what_was_heard(second, cut):
    first = piece(0, 10, ("the", 1, 2), ("quick", 2, 3), ("fox.", 3, 8))
    silent = piece(5, 6)
    given = "The quick fox jumps over dog".split()
    assert share_words(given, [first, second]) == [0, cut, 6]
    assert share_words(given, [silent, first, silent, second, silent]) == [0, 0, cut, cut, 6, 6]
    assert share_words(given, [piece(0, 10), piece(10, 30)]) == [0, 2, 6]


def test_a_recording_longer_than_the_window(model):
    """Each piece is aligned as it would be by itself, and nothing is lost between them."""
    toy = tiny.model(llm="qwen3")
    waveform = np.concatenate([tiny.noise(20.0, 0), np.zeros(16000 * 4, np.float32), tiny.noise(18.0, 1)])
    words = [f"w{number}" for number in range(40)]
    result = toy.align(waveform, " ".join(words))
    check(result, words, 42.0)
    assert result.words[-1]["end"] > 24.0 and not any(20.4 < word["start"] < 23.5 for word in result.words)
    with pytest.raises(ValueError, match="2 words, but no speech is heard in 40.0 s"):
        toy.align(np.zeros(16000 * 40, np.float32), "the fox")
