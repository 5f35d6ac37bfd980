"""Scoring."""

import pytest

from training.evaluate import word_errors
from training.text import normalise, strip_punctuation


def test_normalisation():
    assert normalise("Mr. Brown’s well-known “hat”—lost!") == "mister brown's well known hat lost"
    assert normalise("'Tis Dr. O'Neill's") == "tis doctor o'neill's"
    assert strip_punctuation("Hello, World! It's 5.") == "hello world it's 5"


def test_word_errors_are_pooled():
    result = word_errors(["a b c", "d"], ["a x c", ""])
    assert (result.substitutions, result.deletions, result.insertions) == (1, 1, 0)
    assert result.wer == pytest.approx(2 / 4)
