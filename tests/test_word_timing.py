"""Word timing: targets, loss and the monotonic decoder, on scores made by hand."""

import itertools

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf.alignment_voxlm import VoxLMSpellingAlignmentHead, spell_words
from voxlm_hf.timing_voxlm import (
    RAMP_S,
    AlignmentScores,
    alignment_loss,
    alignment_targets,
    close_gaps,
    decode_spans,
    level_tokens,
    shortest_spans,
    span_edges,
    word_log_posteriors,
    word_seconds,
    word_times,
)


def scores_from(path, num_words, margin=5.0):
    """Log-posteriors that say at each frame which word is spoken (-1 for a pause)."""
    scores = np.zeros((num_words + 1, len(path)))
    for frame, word in enumerate(path):
        scores[word, frame] = margin
    return scores - np.logaddexp.reduce(scores, axis=0)


def test_words_are_spelt_without_what_nobody_says():
    ids, owners = spell_words(["“Well-known,", "café?"])
    assert bytes(ids).decode() == "well known café"
    assert owners == [0] * 10 + [-1] + [1] * 5  # "é" is two bytes
    assert spell_words([]) == ([], [])


def test_padding_of_text_and_audio_does_not_change_the_scores_of_a_spelling_head():
    torch.manual_seed(0)
    head = VoxLMSpellingAlignmentHead(8, 16, 2)
    text, frames = torch.tensor([list(b"the fox")]), torch.randn(1, 12, 8)
    alone = head(text, frames, torch.ones(1, 12))
    padded_frames = torch.cat([frames, torch.randn(1, 5, 8)], dim=1)
    mask = (torch.arange(17) < 12).long().unsqueeze(0)
    padded = head(torch.nn.functional.pad(text, (0, 3)), padded_frames, mask)
    assert alone.tokens.shape == (1, 7, 12) and alone.tokens.std() > 0.01
    torch.testing.assert_close(padded.tokens[:, :7, :12], alone.tokens)
    torch.testing.assert_close(padded.pause[:, :12], alone.pause)
    torch.testing.assert_close(padded.onset[:, :12], alone.onset)


def spoken(text, voice, rng):
    """Frames in which each letter sounds for three frames of noise around its vector, and word times at 20 ms a frame."""
    frames, times = [], []
    for word in text.split():
        frames += [voice[0]] * int(rng.integers(0, 12))  # a pause
        start = len(frames)
        frames += [voice[ord(letter) - 96] for letter in word for _ in range(3)]
        times.append((0.02 * start, 0.02 * len(frames)))
    frames += [voice[0]] * 5
    noise = 0.5 * torch.randn(len(frames), len(voice[0]))
    return torch.stack(frames) + noise, torch.tensor(times)


def test_a_spelling_head_learns_letters_and_aligns_words_that_it_has_never_seen():
    torch.manual_seed(0)
    rng, voice = np.random.default_rng(0), list(torch.randn(27, 12))
    texts = ["".join(rng.choice(list("abcdefghij "), 30)).split() for _ in range(24)]
    head = VoxLMSpellingAlignmentHead(12, 32, 1).apply(tiny.model()._init_weights)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    for step in range(120):
        words = texts[step % 20]
        frames, times = spoken(" ".join(words), voice, rng)
        ids, owners = (torch.tensor([part]) for part in spell_words(words))
        centres = (torch.arange(len(frames)).unsqueeze(0) + 0.5) * 0.02
        scores = head(ids, frames.unsqueeze(0), torch.ones(1, len(frames)))
        optimiser.zero_grad()
        alignment_loss(scores, owners.masked_fill(owners < 0, -100), times.unsqueeze(0), centres).sum().backward()
        optimiser.step()
    for words in texts[20:]:
        frames, times = spoken(" ".join(words), voice, rng)
        ids, owners = spell_words(words)
        with torch.no_grad():
            scores = head(torch.tensor([ids]), frames.unsqueeze(0), torch.ones(1, len(frames)))
        found = word_times(scores, 0, np.array(owners), len(frames), 0.02, words=words)
        expected = close_gaps(times.numpy().astype(float))
        assert np.abs(np.array(found) - expected).mean() < 0.02


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


@pytest.mark.parametrize(
    "words, frame_s, num_frames, expected",
    [
        (["a", "fox,", "antidisestablish", "..."], 0.02, 100, [1, 3, 16, 1]),  # 20 ms for each letter
        (["你", "1999"], 0.08, 100, [1, 1]),
        (["word"] * 3, 0.02, 2, [1, 1, 1]),  # fewer frames than words
        ([], 0.02, 2, []),
    ],
)
def test_long_words_get_some_time(words, frame_s, num_frames, expected):
    assert shortest_spans(words, frame_s, num_frames).tolist() == expected


def test_shortest_spans_fit_into_the_recording():
    spans = shortest_spans(["word"] * 10, 0.02, 25)
    assert (spans >= 1).all() and spans.sum() <= 25


def test_a_weak_word_keeps_its_shortest_span():
    """The first word looks better than the second everywhere, yet the second has its three frames."""
    scores = np.log([[0.8] * 10, [0.1] * 10, [0.1] * 10])
    assert [span.end - span.start for span in decode_spans(scores, shortest=np.array([1, 3]))] == [7, 3]


def test_tokens_that_are_strong_everywhere_are_levelled():
    """Sums over time of 3 e^0 and 3 e^4: each token moves by a quarter of its distance of 2 from the median."""
    levelled = level_tokens(np.array([[0.0, 0.0, 0.0], [4.0, 4.0, 4.0]]), np.array([0, 1]))
    np.testing.assert_allclose(levelled, [[0.5] * 3, [3.5] * 3])


def test_levelling_shifts_a_token_as_a_whole_and_ignores_tokens_of_no_word():
    scores = np.array([[5.0, 5.0, 4.0], [0.0, 0.0, 1.0], [9.0, 9.0, 9.0]])
    shifts = scores - level_tokens(scores, np.array([0, 1, -1]))
    np.testing.assert_allclose(shifts, shifts[:, :1].repeat(3, axis=1))
    assert shifts[0, 0] == pytest.approx(-shifts[1, 0])
    assert level_tokens(scores, np.array([-1, -1, -1])) is scores


def test_small_gaps_are_closed_in_the_middle():
    times = np.array([[0.0, 0.2], [0.26, 0.5], [0.5, 0.8], [0.95, 1.0]])
    np.testing.assert_allclose(close_gaps(times), [[0.0, 0.23], [0.23, 0.5], [0.5, 0.8], [0.95, 1.0]])
    assert times[0, 1] == 0.2  # the caller's times are left alone


@pytest.mark.parametrize(
    "path, num_words, duration_s, expected",
    [
        ([0, 0, 1, 1], 2, 0.07, [(0.0, 0.04), (0.04, 0.07)]),  # the recording ends within the last frame
        ([0, 1], 3, 0.04, [(0.0, 0.013), (0.013, 0.027), (0.027, 0.04)]),  # fewer frames than words
        ([-1, -1], 0, 0.04, []),
    ],
)
def test_seconds_stay_inside_the_audio(path, num_words, duration_s, expected):
    assert word_seconds(scores_from(path, num_words), None, 0.02, duration_s) == expected


def test_word_times_of_one_row_of_a_padded_batch():
    """Row 1: "ab" (tokens 0 and 1) in frames 2 to 5, "c" (token 2) in 8 to 10, of 13 real frames and 2 of padding."""
    tokens, pause = torch.full((2, 4, 15), -20.0), torch.full((2, 15), -20.0)
    tokens[1, 0, 2:4] = tokens[1, 1, 4:6] = tokens[1, 2, 8:11] = 20.0
    pause[1, [0, 1, 6, 7, 11, 12]] = 20.0
    tokens[1, 2, 13:] = 90.0  # what padding says does not count
    scores = AlignmentScores(tokens, pause, torch.zeros(2, 15))
    assert word_times(scores, 1, np.array([0, 0, 1]), num_frames=13, frame_s=0.1) == [(0.2, 0.6), (0.8, 1.1)]


def test_targets_are_ramps_in_seconds():
    times = torch.tensor([[[0.1, 0.2], [0.2, 0.3], [torch.nan, torch.nan]]])
    frames = torch.tensor([[0.0, 0.1, 0.1 + RAMP_S / 2, 0.15, 0.2, 0.4]])
    shares, onsets = alignment_targets(times, frames)
    expected = [[0, 0.5, 1, 1, 0.5, 0], [0, 0, 0, 0, 0.5, 0], [0, 0, 0, 0, 0, 0]]
    torch.testing.assert_close(shares[0], torch.tensor(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(onsets[0], torch.tensor([0, 1, 0.5, 0, 1, 0]), atol=1e-5, rtol=0)


# Three frames at 0.5, 1.5 and 2.5 s: words 0 (tokens 0 and 1) and 1 (token 2) are spoken in the first and in the last.
TOKENS = torch.log(torch.tensor([[[0.1, 0.2, 0.5], [0.3, 0.1, 0.2], [0.4, 0.2, 0.1]]]))
PAUSE = torch.log(torch.tensor([[0.2, 0.5, 0.2]]))
SURE, TORN = torch.full((1, 3), -50.0), torch.zeros(1, 3)


@pytest.mark.parametrize(
    "onset, frame_times, expected",
    [
        pytest.param(SURE, [0.5, 1.5, 2.5], -(np.log(0.4) + np.log(0.5) + np.log(0.1)) / 3, id="all frames"),
        pytest.param(SURE, [0.5, np.nan, np.nan], -np.log(0.4), id="one known frame"),
        pytest.param(TORN, [0.5, np.nan, np.nan], -np.log(0.4) + np.log(2), id="unsure of onsets"),
        pytest.param(SURE, [1.0, np.nan, np.nan], -(np.log(0.4) + np.log(0.2)) / 2, id="an edge in the frame"),
    ],
)
def test_loss_of_posteriors_by_hand(onset, frame_times, expected):
    words, times = torch.tensor([[0, 0, 1]]), torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    loss = alignment_loss(AlignmentScores(TOKENS, PAUSE, onset), words, times, torch.tensor([frame_times]))
    assert float(loss) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("token_words", [[[0, 0, 1]], [[-100, -100, -100]]])
def test_nothing_known_is_no_loss_and_no_gradient(token_words):
    tokens = torch.randn(1, 3, 4, requires_grad=True)
    scores = AlignmentScores(tokens, torch.zeros(1, 4), torch.zeros(1, 4))
    loss = alignment_loss(
        scores, torch.tensor(token_words), torch.full((1, 2, 2), torch.nan), torch.full((1, 4), torch.nan)
    )
    loss.backward()
    assert float(loss.detach()) == 0.0 and torch.equal(tokens.grad, torch.zeros_like(tokens))
