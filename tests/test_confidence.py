"""Measures of confidence and their calibration, on hand-made cases and against scikit-learn."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from voxlm_hf.confidence_voxlm import probability_logit, word_confidence, word_posteriors
from voxlm_training.confidence import (
    calibrate_stage,
    calibration_bins,
    cross_fitted,
    fit_calibration,
    plot_reliability,
    right_words,
    score_confidences,
)
from voxlm_training.data import Row, SpeechDataset


@pytest.mark.parametrize(
    "reference, words, right",
    [
        ("THE QUICK FOX", ["the", "thick", "fox"], [True, False, True]),
        ("the fox", ["um", "the", "fox", "fox"], [False, True, False, True]),
        ("mister well known", ["Mr.", "well-known"], [True, True]),
        ("mister well known", ["Mr.", "well-unknown"], [True, False]),
        ("he paid twenty five shillings", ["He", "paid", "25", "shillings", "..."], [True] * 5),
        ("he paid twenty five", ["he", "paid", "26"], [True, True, False]),
        ("in nineteen", ["19"], [True]),
        ("nineteen", ["4"], [False]),
        ("", ["ghost"], [False]),
        ("word", [], []),
    ],
)
def test_right_words_by_alignment(reference, words, right):
    assert right_words(reference, words).tolist() == right


CONFIDENCES, RIGHT = np.array([0.9, 0.9, 0.8, 0.3]), np.array([True, True, False, False])


def test_cross_entropy_and_calibration_error_counted_by_hand():
    scores = score_confidences(CONFIDENCES, RIGHT)
    entropy = -(2 * np.log(0.9) + np.log(0.2) + np.log(0.7)) / 4
    assert scores.nce == pytest.approx(1 - entropy / np.log(2))
    assert scores.ece == pytest.approx((2 * 0.1 + 0.8 + 0.3) / 4)
    assert calibration_bins(CONFIDENCES, RIGHT) == [(0.3, 0.0, 1), (0.8, 0.0, 1), (0.9, 1.0, 2)]


def test_right_words_above_all_wrong_ones_are_a_perfect_ranking():
    scores = score_confidences(CONFIDENCES, RIGHT)
    assert scores.auroc == 1.0 and scores.error_auprc == pytest.approx(1.0)


def test_the_share_of_right_words_as_confidence_is_calibrated_and_knows_nothing():
    always = score_confidences(np.full(4, 0.5), RIGHT)
    assert always.nce == pytest.approx(0) and always.ece == pytest.approx(0) and always.auroc == 0.5


def test_measures_need_right_and_wrong_words():
    with pytest.raises(ValueError, match="4 of 4 words are right"):
        score_confidences(CONFIDENCES, np.ones(4, dtype=bool))


def sample(count=4000, seed=0):
    rng = np.random.default_rng(seed)
    logprobs, entropies = np.log(rng.uniform(0.02, 0.99, count)), rng.uniform(0, 4, count)
    logits = np.array([probability_logit(value) for value in logprobs])
    right = rng.random(count) < 1 / (1 + np.exp(-(0.5 * logits - 0.4 * entropies + 0.7)))
    return [{"logprob": a, "entropy": b} for a, b in zip(logprobs, entropies)], logits, entropies, right


def test_the_fit_is_that_of_logistic_regression():
    scores, logits, entropies, right = sample()
    fitted = fit_calibration(scores, right)
    library = LogisticRegression(C=1e9).fit(np.stack([logits, -entropies], 1), right)
    expected = [*library.coef_[0], *library.intercept_]
    assert [fitted["scale"], fitted["entropy"], fitted["bias"]] == pytest.approx(expected, abs=0.01)
    calibrated = np.array([word_confidence(score, fitted) for score in scores])
    raw = np.exp([score["logprob"] for score in scores])
    assert score_confidences(calibrated, right).ece < 0.03 < score_confidences(raw, right).ece
    assert score_confidences(calibrated, right).nce > score_confidences(raw, right).nce


def test_what_no_word_has_gets_no_weight_and_what_some_have_does():
    scores, *_, right = sample()
    assert set(fit_calibration(scores, right)) == {"scale", "entropy", "bias"}
    telling = [{**score, "posterior": 0.9 if hit else 0.4} for score, hit in zip(scores, right)]
    fitted = fit_calibration(telling[:2000] + scores[2000:], right)
    assert set(fitted) == {"scale", "entropy", "posterior", "bias"} and fitted["posterior"] > 0.1


# The weights of the three hypotheses are 4/7, 2/7 and 1/7.
LIST = [["The", "well-known", "cat", "sat."], ["the", "well-known", "hat", "sat"], ["The", "cat", "sat"]]


@pytest.mark.parametrize(
    "best, expected",
    [(0, [7 / 7, 6 / 7, 5 / 7, 7 / 7]), (1, [7 / 7, 6 / 7, 2 / 7, 7 / 7]), (2, [7 / 7, 5 / 7, 7 / 7])],
)
def test_posteriors_are_the_share_of_the_list_with_the_word_in_its_place(best, expected):
    scores = (np.log([4, 2, 1]) - 300).tolist()
    assert word_posteriors(LIST, scores, best) == pytest.approx(expected)


def test_posteriors_of_lists_with_impossible_and_with_empty_texts():
    assert word_posteriors([["so"], []], [-5.0, -np.inf], 0) == [1.0]
    assert word_posteriors([["so"], []], [-5.0, -5.0], 0) == [0.5]
    assert word_posteriors([["so"], []], [-9.0, -5.0], 1) == []


def test_weights_never_turn_the_order_around():
    scores, *_, right = sample()
    fitted = fit_calibration(scores, ~right)  # as if the unlikely words were right
    assert fitted["scale"] == 0 and fitted["entropy"] == 0


class Talker:
    """A model that gets the word "right" right and says of every word how sure it is, of some speakers too much so."""

    def __init__(self, rows):
        self.config, self.rows, self.calls = SimpleNamespace(confidence_calibration=None), rows, 0

    def to(self, device):
        return self

    def eval(self):
        return self

    def transcribe(self, audio, batch_size):
        self.calls += 1
        rng, results = np.random.default_rng(0), []
        for row in self.rows:
            logits = rng.normal(1, 2, len(row.text.split()))
            good = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
            words = [{"word": "right" if hit else "wrong"} for hit in good]
            logprobs = -np.logaddexp(0, -3 * logits)  # three times as sure as it should be
            scores = [{"logprob": float(value), "entropy": 0.0} for value in logprobs]
            results.append(SimpleNamespace(words=words, word_scores=scores))
        return results


def test_a_stage_calibrates_on_speakers_kept_out_and_remembers(tmp_path, capsys):
    rows = [Row(str(number), "x.wav", " ".join(["right"] * 50), 3.0, speaker=f"s{number % 4}") for number in range(40)]
    talker, dev = Talker(rows), SpeechDataset(rows, None)
    calibrate_stage(talker, dev, tmp_path / "4-calibration", 0, use_cpu=True)
    found = talker.config.confidence_calibration
    assert found["scale"] == pytest.approx(1 / 3, abs=0.05) and found["bias"] == pytest.approx(0, abs=0.15)
    assert "calibrated on other speakers" in capsys.readouterr().out
    talker.config.confidence_calibration = None
    calibrate_stage(talker, dev, tmp_path / "4-calibration", 0, use_cpu=True)
    assert talker.config.confidence_calibration == found and talker.calls == 1
    with pytest.raises(ValueError, match="data.dev"):
        calibrate_stage(talker, None, tmp_path / "5-calibration", 0)


def test_a_speakers_confidences_come_from_the_others():
    """Speaker b's words are all wrong, whatever the scores say; what b's words get shows that only a's and c's counted."""
    scores = [{"logprob": np.log(0.5), "entropy": 0.0}] * 30
    speakers = ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    right = np.array([True, False] * 5 + [False] * 10 + [True] * 10)
    confidences = cross_fitted(scores, right, speakers)
    assert confidences[10:20] == pytest.approx(15 / 20, abs=0.01)
    assert confidences[:10] == pytest.approx(10 / 20, abs=0.01)


def test_the_plot_is_a_png(tmp_path):
    *_, right = sample()
    plot_reliability({"raw": (np.linspace(0, 1, len(right)), right)}, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
