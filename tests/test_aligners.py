"""Other people's aligners."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests import tiny
from voxlm_training import aligners
from voxlm_training.aligners import agreed_words, original_words, own_words, spelt_phones, sphinx_words, tightened
from voxlm_training.label_words import agreeing_words


DATA = Path(__file__).parent / "data"


def test_pocketsphinx_finds_the_words_of_a_recording():
    waveform = tiny.model().processor.load_audio(DATA / "austen-0880.flac")
    words = sphinx_words(waveform, "He was not an ill-disposed young man")
    assert [word["word"] for word in words] == "he was not an ill disposed young man".split()
    # Read off a spectrogram: "he" begins at 0.1 s, "young" is between 1.4 and 2.2 s.
    assert 0 <= words[0]["start"] < 0.3 and 1.2 < words[6]["start"] < words[6]["end"] < 2.6
    assert all(one["end"] <= two["start"] for one, two in zip(words, words[1:]))
    assert sphinx_words(waveform, "...") is None


@pytest.mark.parametrize("printed, known", [("pau y ah ng g ax pau \n", True), ("pau \n", False), (None, False)])
def test_words_outside_pocketsphinxs_dictionary_are_pronounced_by_flite(printed, known, monkeypatch):
    """A stand-in for flite, which need not be installed (`None`)."""
    monkeypatch.setattr(aligners.shutil, "which", lambda name: None if printed is None else name)
    monkeypatch.setattr(aligners.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=printed))
    waveform = tiny.model().processor.load_audio(DATA / "austen-0880.flac")
    # A word of its own for each case, since the decoder keeps what it has learnt.
    word = f"qwrtz{'abc'[len(printed or '') % 3]}{'x' if known else ''}"
    words = sphinx_words(waveform, f"he was not an ill disposed {word} man")
    assert (words is not None) == known
    if known:
        assert spelt_phones(word) == "Y AH NG G AH"
        assert words[6]["word"] == word and 1.2 < words[6]["start"] < words[6]["end"] < 2.6


def test_a_head_that_reads_the_spelling_aligns_without_the_llm(monkeypatch):
    toy = tiny.model(alignment_kind="spelling")
    monkeypatch.setattr(toy.language_model, "forward", None)
    words = own_words(toy, tiny.noise(2.0), "the quick brown fox")
    assert [word["word"] for word in words] == "the quick brown fox".split()
    assert 0 <= words[0]["start"] and words[-1]["end"] <= 2.0
    assert all(one["start"] < one["end"] <= two["start"] for one, two in zip(words, words[1:]))


def test_only_words_on_which_two_agree_are_kept():
    ours = [{"word": "a", "start": 0.0, "end": 0.2}, {"word": "b", "start": 0.2, "end": 0.5}]
    theirs = [{"word": "a", "start": 0.04, "end": 0.2}, {"word": "b", "start": 0.2, "end": 0.56}]
    assert agreed_words(ours, theirs) == [{"word": "a", "start": 0.02, "end": 0.2}]
    assert agreed_words(ours, None) == [] and agreed_words(ours, theirs[:1]) == []


def test_pocketsphinx_takes_parts_of_pauses_that_are_given_back():
    words = [("a", 0.5, 0.7), ("b", 0.7, 0.9), ("c", 1.0, 1.02), ("d", 1.2, 1.4)]
    found = tightened([{"word": word, "start": start, "end": end} for word, start, end in words])
    expected = [(0.513, 0.7), (0.7, 0.876), (1.01, 1.02), (1.213, 1.376)]
    assert [word["word"] for word in found] == list("abcd")
    for word, edges in zip(found, expected):
        assert (word["start"], word["end"]) == pytest.approx(edges)
    assert tightened([]) == []


def test_the_originals_recipe_has_its_grid_and_its_first_word_at_zero():
    toy = tiny.model(llm="qwen3")
    words = original_words(toy, tiny.noise(2.0), "the quick brown fox")
    edges = [edge for word in words for edge in (word["start"], word["end"])]
    assert [word["word"] for word in words] == "the quick brown fox".split() and words[0]["start"] == 0
    assert np.mod(np.round(np.array(edges) * 1000), 80) == pytest.approx(0) and edges == sorted(edges)


def test_labels_are_made_where_the_model_agrees_with_pocketsphinx():
    """A stand-in for the model, which is off at one word; words that go into no dictionary leave the row without labels."""
    processor, path = tiny.model().processor, str(DATA / "austen-0880.flac")
    text = "He was not an ill-disposed young man"
    theirs = sphinx_words(processor.load_audio(path), text)
    ours = [{**word, "start": word["start"] + (0.2 if word["word"] == "young" else 0.02)} for word in theirs]
    model = SimpleNamespace(
        get_processor=lambda: processor,
        align=lambda waveform, text: SimpleNamespace(words=ours),
        alignment=SimpleNamespace(from_spelling=False),
    )
    found = agreeing_words(model, path, text)
    assert [word["word"] for word in found] == "he was not an ill disposed man".split()
    inside = next(place for place in range(1, 6) if theirs[place]["start"] == theirs[place - 1]["end"])
    assert found[inside]["start"] == pytest.approx(theirs[inside]["start"] + 0.01)
    assert agreeing_words(model, path, "...") is None
