"""The monotonic decoder and the loss of the alignment head, on hand-made scores."""

import itertools

import numpy as np
import pytest
import torch

from voxlm_hf.alignment_voxlm import alignment_loss, decode_spans, spans_to_seconds, word_log_posteriors


def scores_from(path, num_words, margin=5.0):
    """Log-posteriors that say at each frame which word is spoken (-1 for a pause)."""
    scores = np.zeros((num_words + 1, len(path)))
    for frame, word in enumerate(path):
        scores[word, frame] = margin
    return scores - np.logaddexp.reduce(scores, axis=0)


def test_words_pauses_and_edges_are_found():
    path = [-1] * 5 + [0] * 4 + [1] * 3 + [-1] * 6 + [2] * 2 + [-1]
    spans = decode_spans(scores_from(path, 3))
    assert [(span.start, span.end) for span in spans] == [(5, 9), (9, 12), (18, 20)]


def brute_force(log_posteriors, penalty):
    """The best monotonic path by trying all."""
    num_words, num_frames = log_posteriors.shape[0] - 1, log_posteriors.shape[1]
    best, best_spans = -np.inf, None
    for edges in itertools.combinations_with_replacement(range(num_frames + 1), 2 * num_words):
        spans = list(zip(edges[::2], edges[1::2]))
        if any(start == end for start, end in spans):
            continue
        row = np.full(num_frames, num_words)
        for word, (start, end) in enumerate(spans):
            row[start:end] = word
        score = log_posteriors[row, np.arange(num_frames)].sum()
        score -= penalty * sum(spans[i][1] < spans[i + 1][0] for i in range(num_words - 1))
        if score > best + 1e-12:
            best, best_spans = score, spans
    return best, best_spans


@pytest.mark.parametrize("seed", range(12))
def test_viterbi_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(1 + rng.integers(1, 4), rng.integers(4, 8)))
    scores -= np.logaddexp.reduce(scores, axis=0)
    expected, spans = brute_force(scores, 2.0)
    found = [(span.start, span.end) for span in decode_spans(scores)]
    assert found == spans


@pytest.mark.parametrize("frames, words", [(0, 3), (2, 3), (3, 3), (1, 1), (50, 0)])
def test_few_frames(frames, words):
    rng = np.random.default_rng(0)
    spans = decode_spans(rng.normal(size=(words + 1, frames)))
    assert len(spans) == words
    assert all(0 <= span.start <= span.end <= frames for span in spans)
    assert all(first.end <= second.start for first, second in zip(spans, spans[1:]))
    if frames >= words:
        assert all(span.end > span.start for span in spans)


def test_many_words():
    path = [word for word in range(200) for _ in range(3)]
    spans = decode_spans(scores_from(path, 200))
    assert [(span.start, span.end) for span in spans] == [(3 * word, 3 * word + 3) for word in range(200)]


def test_word_scores_are_the_log_sum_of_their_tokens():
    tokens, pause = np.log([[0.1, 0.2], [0.3, 0.1], [0.4, 0.2]]), np.log([0.2, 0.5])
    posteriors = word_log_posteriors(tokens, pause, np.array([0, 0, 1]))
    np.testing.assert_allclose(np.exp(posteriors), [[0.4, 0.3], [0.4, 0.2], [0.2, 0.5]], atol=1e-9)
    without = word_log_posteriors(tokens, pause, np.array([0, 0, -1]))
    np.testing.assert_allclose(np.exp(without), [[2 / 3, 0.375], [1 / 3, 0.625]], atol=1e-9)


def test_seconds_stay_inside_the_audio():
    spans = decode_spans(scores_from([0, 0, 1, 1], 2))
    assert spans_to_seconds(spans, 0.02, 0.07) == [(0.0, 0.04), (0.04, 0.07)]


def test_loss_of_hand_made_posteriors():
    tokens = torch.log(torch.tensor([[[0.1, 0.2], [0.3, 0.1], [0.4, 0.2]]]))
    pause = torch.log(torch.tensor([[0.2, 0.5]]))
    words = torch.tensor([[0, 0, 1]])
    loss = alignment_loss(tokens, pause, words, torch.tensor([[0, -1]])).squeeze()
    assert float(loss) == pytest.approx(-(np.log(0.4) + np.log(0.5)) / 2, abs=1e-6)
    loss = alignment_loss(tokens, pause, words, torch.tensor([[1, -100]])).squeeze()
    assert float(loss) == pytest.approx(-np.log(0.4), abs=1e-6)
    nothing = torch.full((1, 2), -100)
    for token_words in (words, torch.full((1, 3), -100)):
        scores = tokens.clone().requires_grad_()
        loss = alignment_loss(scores, pause, token_words, nothing)
        loss.backward()
        assert float(loss.detach()) == 0.0 and torch.equal(scores.grad, torch.zeros_like(scores))
