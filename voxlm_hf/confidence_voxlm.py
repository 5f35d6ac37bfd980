"""Word confidences: what they are computed from, and the calibrated map."""

import math

import numpy as np

from .words_voxlm import EXTRA_WORD, OTHER_WORD, match_in_order, plain_words


# Probabilities are kept this far from 0 and 1, where their log-odds would be infinite. Chosen by hand.
LEAST_PROBABILITY = 1e-4


def word_posteriors(texts: list[list[str]], scores: list[float], best: int) -> list[float]:
    """
    For each word of the best hypothesis, the share of the list's probability that has the same word in its place: the
    posterior of a confusion network (Mangu et al. 2000) whose slots are the words of the best hypothesis.

    Args:
        texts (`list[list[str]]`): the words of each hypothesis; capitals and punctuation do not matter.
        scores (`list[float]`): its log-probability, up to a constant.
        best (`int`): index of the best hypothesis.
    """
    if not texts[best]:
        return []
    weights = np.exp(np.array(scores) - max(scores))
    plain = [plain_words(words) for words in texts]
    known: dict[str, int] = {}
    numbers = [np.array([known.setdefault(word, len(known)) for word in words], dtype=np.int64) for words in plain]
    mass = np.zeros(len(plain[best]))
    for words, weight in zip(numbers, weights):
        other = OTHER_WORD * (numbers[best][:, None] != words)
        for row, column in match_in_order(other.__getitem__, len(mass), len(words), EXTRA_WORD):
            mass[row] += weight * (words[column] == numbers[best][row])
    return (mass / weights.sum()).tolist()


def word_confidence(score: dict, calibration: dict) -> float:
    """
    How likely a word is to be right: `sigmoid(scale * logit(p) + reader * logit(q) + posterior * logit(r) - entropy * h + bias)`.

    Platt scaling of the LLM's probability p of the word, of the reader's q and the word's posterior r among the hypotheses if
    there is a reader and, since a distribution that is spread out says more about errors than its maximum does (Laptev and
    Ginsburg 2023), of the highest entropy h among the word's tokens. Monotone in each.

    Where the map was fitted with a reader and the word is not the reader's, as in `align` and in texts that the LLM writes alone,
    the confidence is p as it is.

    Args:
        score (`dict`): one of `word_scores` of [`VoxLMTranscription`].
        calibration (`dict`): `config.confidence_calibration`.
    """
    if "reader" in calibration and "reader" not in score:
        return 1 / (1 + math.exp(-probability_logit(score["logprob"])))
    terms = [calibration[name] * term(score) for name, term in CONFIDENCE_TERMS.items() if name in calibration]
    return 1 / (1 + math.exp(-sum(terms) - calibration["bias"]))


def probability_logit(logprob: float) -> float:
    """Log-odds of a probability given by its logarithm, with the probability kept within `LEAST_PROBABILITY` of 0 and 1."""
    probability = min(max(math.exp(logprob), LEAST_PROBABILITY), 1 - LEAST_PROBABILITY)
    return math.log(probability / (1 - probability))


# What each weight of `config.confidence_calibration` multiplies, from one of `word_scores`; 0 for a word without it.
CONFIDENCE_TERMS = {
    "scale": lambda score: probability_logit(score["logprob"]),
    "reader": lambda score: probability_logit(score["reader"]),
    "posterior": lambda score: (
        probability_logit(math.log(max(score["posterior"], LEAST_PROBABILITY))) if "posterior" in score else 0.0
    ),
    "entropy": lambda score: -score["entropy"],
}
