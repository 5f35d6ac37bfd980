"""The monotonic decoder and the loss of the alignment head, on hand-made scores."""

import itertools

import numpy as np
import pytest
import torch

from voxlm_hf.alignment_voxlm import (
    LEVELLING,
    RAMP_S,
    AlignmentScores,
    WordSpan,
    alignment_loss,
    alignment_targets,
    close_gaps,
    decode_spans,
    level_tokens,
    shortest_spans,
    span_edges,
    word_log_posteriors,
    word_seconds,
)


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


def brute_force(log_posteriors, onsets, penalty, shortest):
    """The best monotonic path by trying all."""
    num_words, num_frames = log_posteriors.shape[0] - 1, log_posteriors.shape[1]
    best, best_spans = -np.inf, None
    for edges in itertools.combinations_with_replacement(range(num_frames + 1), 2 * num_words):
        spans = list(zip(edges[::2], edges[1::2]))
        if any(end - start < least for (start, end), least in zip(spans, shortest)):
            continue
        row = np.full(num_frames, num_words)
        for word, (start, end) in enumerate(spans):
            row[start:end] = word
        score = log_posteriors[row, np.arange(num_frames)].sum()
        score -= penalty * sum(spans[i][1] < spans[i + 1][0] for i in range(num_words - 1))
        score += sum(onsets[start] for start, _ in spans if start > 0)
        if score > best + 1e-12:
            best, best_spans = score, spans
    return best, best_spans


@pytest.mark.parametrize("seed", range(24))
def test_viterbi_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(1 + rng.integers(1, 4), rng.integers(4, 8)))
    scores -= np.logaddexp.reduce(scores, axis=0)
    onsets = rng.normal(size=scores.shape[1]) * (seed % 2)
    shortest = np.ones(len(scores) - 1, dtype=int)
    if seed % 3 == 0:
        shortest[rng.integers(len(shortest))] += scores.shape[1] - len(shortest)
    expected, spans = brute_force(scores, onsets, 2.0, shortest)
    options = {"shortest": shortest} if seed % 3 == 0 else {}
    found = [(span.start, span.end) for span in decode_spans(scores, onsets if seed % 2 else None, **options)]
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


def test_a_word_said_again_starts_where_its_onset_is():
    scores = np.log(np.full((4, 30), 1e-3))
    scores[:3] = np.log(1 / 3)  # three times the same word: every frame may be any of them
    onsets = np.full(30, -4.0)
    onsets[[0, 7, 19]] = 4.0
    assert [(span.start, span.end) for span in decode_spans(scores, onsets)] == [(0, 7), (7, 19), (19, 30)]


def test_edges_lie_where_posteriors_cross():
    """A frame that a word covers by a share has that posterior; the edge is found again, between words and at pauses."""
    edges = np.array([[2.3, 6.75], [6.75, 10.0], [14.6, 17.2]])
    frames = np.arange(20)
    shares = np.clip(edges[:, 1:] - frames, 0, 1) - np.clip(edges[:, :1] - frames, 0, 1)
    scores = np.log(np.vstack([shares, 1 - shares.sum(0)]).clip(1e-12))
    found = span_edges(decode_spans(scores), scores)
    np.testing.assert_allclose(found, edges, atol=0.06)


def test_edges_never_cross():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = 3 * rng.normal(size=(1 + rng.integers(1, 5), rng.integers(5, 12)))
        scores -= np.logaddexp.reduce(scores, axis=0)
        edges = span_edges(decode_spans(scores), scores).ravel()
        assert (np.diff(edges)[::2] > 0).all() and (np.diff(edges) >= -1e-12).all()


def test_long_words_get_some_time_where_there_is_any():
    assert shortest_spans(["a", "fox,", "antidisestablish", "..."], 0.02, 100).tolist() == [1, 3, 16, 1]
    assert shortest_spans(["你", "1999"], 0.08, 100).tolist() == [1, 1]
    tight = shortest_spans(["word"] * 10, 0.02, 25)
    assert (tight >= 1).all() and tight.sum() <= 25
    assert shortest_spans(["word"] * 3, 0.02, 2).tolist() == [1, 1, 1] and shortest_spans([], 0.02, 2).tolist() == []
    # The first word looks better than the second everywhere, yet the second has its three frames.
    scores = np.log([[0.8] * 10, [0.1] * 10, [0.1] * 10])
    assert [span.end - span.start for span in decode_spans(scores, shortest=np.array([1, 3]))] == [7, 3]


def test_tokens_that_are_strong_everywhere_are_levelled():
    scores = np.array([[5.0, 5.0, 4.0], [0.0, 0.0, 1.0], [9.0, 9.0, 9.0]])
    levelled = level_tokens(scores, np.array([0, 1, -1]))
    shifts = scores - levelled
    np.testing.assert_allclose(shifts, shifts[:, :1].repeat(3, axis=1))  # each token as a whole
    apart = np.logaddexp.reduce(scores[0]) - np.logaddexp.reduce(scores[1])
    assert shifts[0, 0] - shifts[1, 0] == pytest.approx(LEVELLING * apart) and shifts[0, 0] == pytest.approx(
        -shifts[1, 0]
    )
    assert level_tokens(scores, np.array([-1, -1, -1])) is scores


def test_small_gaps_are_closed_in_the_middle():
    times = np.array([[0.0, 0.2], [0.26, 0.5], [0.5, 0.8], [0.95, 1.0]])
    np.testing.assert_allclose(close_gaps(times), [[0.0, 0.23], [0.23, 0.5], [0.5, 0.8], [0.95, 1.0]])
    assert times[0, 1] == 0.2  # the caller's times are left alone


def test_seconds_stay_inside_the_audio():
    assert word_seconds(scores_from([0, 0, 1, 1], 2), None, 0.02, 0.07) == [(0.0, 0.04), (0.04, 0.07)]
    assert word_seconds(scores_from([0, 1], 3), None, 0.02, 0.04) == [(0.0, 0.013), (0.013, 0.027), (0.027, 0.04)]
    assert word_seconds(np.zeros((1, 5)), None, 0.02, 0.1) == []
    assert WordSpan(0, 1) in decode_spans(scores_from([0, -1], 1))


def test_targets_are_ramps_in_seconds():
    times = torch.tensor([[[0.1, 0.2], [0.2, 0.3], [torch.nan, torch.nan]]])
    frames = torch.tensor([[0.0, 0.1, 0.1 + RAMP_S / 2, 0.15, 0.2, 0.4]])
    shares, onsets = alignment_targets(times, frames)
    expected = [[0, 0.5, 1, 1, 0.5, 0], [0, 0, 0, 0, 0.5, 0], [0, 0, 0, 0, 0, 0]]
    torch.testing.assert_close(shares[0], torch.tensor(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(onsets[0], torch.tensor([0, 1, 0.5, 0, 1, 0]), atol=1e-5, rtol=0)


def test_loss_of_hand_made_posteriors():
    """Words 0 (tokens 0, 1) and 1 (token 2) are spoken in frames 0 and 1; onsets are known for sure."""
    tokens = torch.log(torch.tensor([[[0.1, 0.2, 0.5], [0.3, 0.1, 0.2], [0.4, 0.2, 0.1]]]))
    pause = torch.log(torch.tensor([[0.2, 0.5, 0.2]]))
    words, times = torch.tensor([[0, 0, 1]]), torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    sure = torch.tensor([[-50.0, -50.0, -50.0]])
    loss = alignment_loss(AlignmentScores(tokens, pause, sure), words, times, torch.tensor([[0.5, 1.5, 2.5]]))
    assert float(loss) == pytest.approx(-(np.log(0.4) + np.log(0.5) + np.log(0.1)) / 3, abs=1e-6)
    unknown = torch.tensor([[0.5, torch.nan, torch.nan]])
    loss = alignment_loss(AlignmentScores(tokens, pause, sure), words, times, unknown)
    assert float(loss) == pytest.approx(-np.log(0.4), abs=1e-6)
    loss = alignment_loss(AlignmentScores(tokens, pause, torch.zeros(1, 3)), words, times, unknown)
    assert float(loss) == pytest.approx(-np.log(0.4) + np.log(2), abs=1e-6)
    # An edge in the middle of a frame: half of it is the word, half a pause.
    loss = alignment_loss(
        AlignmentScores(tokens, pause, sure * 0 - 50), words, times, torch.tensor([[1.0, torch.nan, torch.nan]])
    )
    assert float(loss) == pytest.approx(-(np.log(0.4) + np.log(0.2)) / 2, abs=1e-5)


@pytest.mark.parametrize("token_words", [[[0, 0, 1]], [[-100, -100, -100]]])
def test_nothing_known_is_no_loss_and_no_gradient(token_words):
    tokens = torch.randn(1, 3, 4, requires_grad=True)
    scores = AlignmentScores(tokens, torch.zeros(1, 4), torch.zeros(1, 4))
    loss = alignment_loss(
        scores, torch.tensor(token_words), torch.full((1, 2, 2), torch.nan), torch.full((1, 4), torch.nan)
    )
    loss.backward()
    assert float(loss.detach()) == 0.0 and torch.equal(tokens.grad, torch.zeros_like(tokens))
