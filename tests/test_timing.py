"""Word-time errors, on hand-made cases."""

import pytest

from training.data import Row
from training.timing import known_times, markdown, score_segmentation, score_times, segmentation, word_errors


def words(*items):
    return [{"word": word, "start": start, "end": end} for word, start, end in items]


ROW = Row("a", None, "the quick fox", words=words(("The", 0.0, 0.2), ("quick", 0.2, 0.5), ("fox.", 0.6, 0.9)))


def test_only_words_that_agree_are_compared():
    heard = words(("the", 0.05, 0.2), ("thick", 0.2, 0.5), ("fox", 0.58, 1.0))
    assert word_errors(ROW, heard) == {0: pytest.approx((0.05, 0.0)), 2: pytest.approx((-0.02, 0.1))}
    assert word_errors(ROW, words(("um", 0.0, 0.1), ("quick", 0.3, 0.5))) == {1: pytest.approx((0.1, 0.0))}
    assert word_errors(ROW, words(("the", 0.0, None))) == {}


def test_anchors_are_found_by_their_place():
    anchors = [
        {"word": "no", "start": 1.0, "end": 1.5, "index": 2},
        {"word": "on", "start": 0, "end": 1, "index": None},
    ]
    row = Row("a", None, "no no NO", anchors=anchors)
    assert known_times(row) == {2: (1.0, 1.5)}
    heard = words(("no", 0.0, 0.4), ("no", 0.5, 0.9), ("no", 1.1, 1.4))
    assert word_errors(row, heard) == {2: pytest.approx((0.1, -0.1))}
    assert score_segmentation([row], [heard], 0.05) is None


def test_scores_counted_by_hand():
    heard = words(("the", 0.05, 0.2), ("quick", 0.2, 0.5), ("fox", 0.58, 1.0))
    scores = score_times([ROW], [heard], "m", "d", "transcribed")
    assert (scores.matched, scores.known) == (3, 3)
    assert scores.mean_ms == pytest.approx((50 + 20 + 100) / 6)
    assert scores.start_mean_ms == pytest.approx(70 / 3) and scores.end_mean_ms == pytest.approx(100 / 3)
    assert scores.start_bias_ms == pytest.approx(10) and scores.end_bias_ms == pytest.approx(100 / 3)
    assert scores.within_50_ms == pytest.approx(5 / 6) and scores.median_ms == pytest.approx(10)
    assert (scores.within_20_ms, scores.within_200_ms) == (pytest.approx(4 / 6), 1.0)
    assert (scores.empty, scores.out_of_order) == (0, 0)
    assert "| m | d | transcribed | 28 ms | 10 ms |" in markdown([scores])
    bad = score_times([ROW], [words(("the", 0.0, 0.3), ("quick", 0.2, 0.2))], "m", "d", "transcribed")
    assert (bad.empty, bad.out_of_order) == (1, 1)
    assert score_times([ROW], [[]], "m", "d", "transcribed") is None


def test_segmentation_counted_by_hand():
    """A word is found within the collar at both edges, once, whatever the order; overlaps count for words found alone."""
    reference = words(("The", 0.0, 0.2), ("quick", 0.2, 0.5), ("fox.", 0.6, 0.9), ("fox", 1.0, 1.2))
    heard = words(("the", 0.04, 0.24), ("quick", 0.3, 0.5), ("fox", 1.0, 1.2), ("um", 1.3, 1.4))
    found, missed, extra, overlaps = segmentation(reference, heard, 0.05)
    assert (found, missed, extra) == (2, 2, 2)
    assert overlaps == [pytest.approx(0.16 / 0.24), pytest.approx(1.0)]
    assert segmentation(reference, heard, 0.2)[:3] == (3, 1, 1)
    row = Row("a", None, "the quick fox fox", words=reference)
    f1, iou = score_segmentation([row], [heard], 0.05)
    assert f1 == pytest.approx(0.5) and iou == pytest.approx((0.16 / 0.24 + 1) / 2)
