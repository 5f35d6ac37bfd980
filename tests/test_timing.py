"""Word-time errors, on hand-made cases."""

import pytest

from voxlm_training.data import Row
from voxlm_training.timing import known_times, markdown, score_segmentation, score_times, segmentation, word_errors


def words(*items):
    return [{"word": word, "start": start, "end": end} for word, start, end in items]


ROW = Row("a", None, "the quick fox", words=words(("The", 0.0, 0.2), ("quick", 0.2, 0.5), ("fox.", 0.6, 0.9)))


def test_only_words_that_agree_are_compared():
    hypothesis = words(("the", 0.05, 0.2), ("thick", 0.2, 0.5), ("fox", 0.58, 1.0))
    assert word_errors(ROW, hypothesis) == {0: pytest.approx((0.05, 0.0)), 2: pytest.approx((-0.02, 0.1))}
    assert word_errors(ROW, words(("um", 0.0, 0.1), ("quick", 0.3, 0.5))) == {1: pytest.approx((0.1, 0.0))}
    assert word_errors(ROW, words(("the", 0.0, None))) == {}


def test_anchors_are_found_by_their_place():
    anchors = [
        {"word": "no", "start": 1.0, "end": 1.5, "index": 2},
        {"word": "on", "start": 0, "end": 1, "index": None},
    ]
    row = Row("a", None, "no no NO", anchors=anchors)
    assert known_times(row) == {2: (1.0, 1.5)}
    hypothesis = words(("no", 0.0, 0.4), ("no", 0.5, 0.9), ("no", 1.1, 1.4))
    assert word_errors(row, hypothesis) == {2: pytest.approx((0.1, -0.1))}
    assert score_segmentation([row], [hypothesis], 0.05) is None


HYPOTHESIS = words(("the", 0.05, 0.2), ("quick", 0.2, 0.5), ("fox", 0.58, 1.0))


@pytest.fixture(scope="module")
def scores():
    """Of `HYPOTHESIS`; its errors in ms are +50 and 0, 0 and 0, -20 and +100. All expected values are computed by hand."""
    return score_times([ROW], [HYPOTHESIS], "m", "d", "transcribed")


def test_all_words_are_compared(scores):
    assert (scores.matched, scores.known) == (3, 3)


def test_mean_errors(scores):
    assert scores.mean_ms == pytest.approx((50 + 20 + 100) / 6)
    assert scores.start_mean_ms == pytest.approx(70 / 3)
    assert scores.end_mean_ms == pytest.approx(100 / 3)


def test_biases_have_a_sign(scores):
    assert scores.start_bias_ms == pytest.approx((50 - 20) / 3)
    assert scores.end_bias_ms == pytest.approx(100 / 3)


def test_quantiles(scores):
    assert scores.median_ms == pytest.approx((0 + 20) / 2)
    assert scores.p95_ms == pytest.approx(50 + 0.75 * 50)  # a quarter of the way down from the largest to the next


def test_shares_include_the_limit_itself(scores):
    assert scores.within_20_ms == pytest.approx(4 / 6)
    assert scores.within_50_ms == pytest.approx(5 / 6)
    assert scores.within_100_ms == scores.within_200_ms == 1


def test_the_table_shows_the_scores(scores):
    assert "| m | d | transcribed | 28 ms | 10 ms | 88 ms | +10 / +33 ms | 67 / 83 / 100 / 100 % |" in markdown(
        [scores]
    )


def test_words_without_duration_or_out_of_order_are_counted(scores):
    assert (scores.empty, scores.out_of_order) == (0, 0)
    bad = score_times([ROW], [words(("the", 0.0, 0.3), ("quick", 0.2, 0.2))], "m", "d", "transcribed")
    assert (bad.empty, bad.out_of_order) == (1, 1)


def test_without_a_common_word_there_are_no_scores():
    assert score_times([ROW], [[]], "m", "d", "transcribed") is None


REFERENCE = words(("The", 0.0, 0.2), ("quick", 0.2, 0.5), ("fox.", 0.6, 0.9), ("fox", 1.0, 1.2))
SEGMENTED = words(("the", 0.04, 0.24), ("quick", 0.3, 0.5), ("fox", 1.0, 1.2), ("um", 1.3, 1.4))


@pytest.mark.parametrize("collar_s, counts", [(0.05, (2, 2, 2)), (0.2, (3, 1, 1))])
def test_a_word_is_found_within_the_collar_at_both_edges(collar_s, counts):
    assert segmentation(REFERENCE, SEGMENTED, collar_s)[:3] == counts
    assert segmentation(REFERENCE, SEGMENTED[::-1], collar_s)[:3] == counts  # whatever the order


def test_overlaps_are_those_of_the_words_found():
    assert segmentation(REFERENCE, SEGMENTED, 0.05)[3] == [pytest.approx(0.16 / 0.24), pytest.approx(1.0)]


def test_a_predicted_word_is_found_only_once():
    twice = words(("fox", 1.0, 1.2), ("fox", 1.01, 1.21))
    assert segmentation(twice, words(("fox", 1.0, 1.2)), 0.05)[:3] == (1, 1, 0)


def test_segmentation_scores_are_pooled():
    row = Row("a", None, "the quick fox fox", words=REFERENCE)
    f1, iou = score_segmentation([row], [SEGMENTED], 0.05)
    assert f1 == pytest.approx(0.5) and iou == pytest.approx((0.16 / 0.24 + 1) / 2)
