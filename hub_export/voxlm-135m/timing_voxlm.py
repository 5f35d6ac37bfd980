"""Word timing: the alignment target and loss, and the monotonic decoder that turns frame scores into word times."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


# Word edges in the target are ramps of this length. Chosen by hand: one and a half of Whisper's frames, since no label of
# a word edge is sharper.
RAMP_S = 0.03
# Gaps shorter than this between words are closed in the middle, in the target and in the result. Aligners and
# synthesisers put short pauses between words by habit, and do not agree where; CrisperWhisper (Wagner et al. 2024)
# splits gaps of up to 160 ms. Chosen by hand below that.
CLOSED_GAP_S = 0.1
# A word lasts at least this long for each of its letters and digits, far less than in fast speech. Chosen on
# 80 synthetic sentences: mean error 24.1 ms (Piper voice) and 15.2 ms (festival) with it, 25.3 and 15.7 ms without.
SHORTEST_CHARACTER_S = 0.02
# How far the tokens' total scores over time are levelled, so that a token that looks strong everywhere does not take
# the time of tokens that look weak everywhere. Chosen on the same sentences: 25.9 / 16.5 ms without (0), 25.3 / 15.7 ms
# at 0.25, 25.4 / 22.5 ms at 1.
LEVELLING = 0.25
# Cost in nats of entering a pause between two words, so that one doubtful frame makes none. Chosen by hand.
PAUSE_PENALTY = 2.0
# Frames on either side of an edge whose posteriors place it within its frame, and how far it may move, in frames: less
# than half a frame, so that words stay in order and none becomes empty.
EDGE_CONTEXT, EDGE_SHIFT = 2, 0.45
# Below every real score, but finite: a word without tokens of its own stays possible on the path.
SCORE_FLOOR = -1e4


@dataclass
class AlignmentScores:
    """
    Scores of the alignment head for a batch.

    Args:
        tokens (`torch.Tensor` of shape `(batch, tokens, frames)`): of each token at each frame.
        pause (`torch.Tensor` of shape `(batch, frames)`): of a pause, on the same scale.
        onset (`torch.Tensor` of shape `(batch, frames)`): log-odds that a word starts in the frame.
    """

    tokens: torch.Tensor
    pause: torch.Tensor
    onset: torch.Tensor


def close_gaps(times: np.ndarray, longest_s: float = CLOSED_GAP_S) -> np.ndarray:
    """
    Close gaps between neighbouring words that are shorter than `longest_s`, in their middle.

    Args:
        times (`np.ndarray` of shape `(words, 2)`): starts and ends in seconds, in order.
    """
    times = times.copy()
    gaps = times[1:, 0] - times[:-1, 1]
    close = (gaps > 0) & (gaps < longest_s)
    middles = (times[1:, 0] + times[:-1, 1]) / 2
    times[1:, 0] = np.where(close, middles, times[1:, 0])
    times[:-1, 1] = np.where(close, middles, times[:-1, 1])
    return times


def alignment_targets(word_times: torch.Tensor, frame_times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How much of each frame belongs to each word, with edges that are ramps of `RAMP_S`.

    Args:
        word_times (`torch.Tensor` of shape `(batch, words, 2)`): starts and ends in seconds, in order; NaN for padding.
        frame_times (`torch.Tensor` of shape `(batch, frames)`): centres of the frames in seconds.

    Returns:
        shares `(batch, words, frames)` in 0..1, and onsets `(batch, frames)`: 1 for a frame in which a word starts, less
        for its neighbours.
    """
    centres = frame_times.unsqueeze(1)
    starts, ends = word_times[..., :1], word_times[..., 1:]
    shares = ((centres - starts) / RAMP_S + 0.5).clamp(0, 1) - ((centres - ends) / RAMP_S + 0.5).clamp(0, 1)
    onsets = (1 - (centres - starts).abs() / RAMP_S).clamp(min=0)
    return shares.nan_to_num(), onsets.nan_to_num().amax(1)


def key_times(frame_times: torch.Tensor, key_mask: torch.Tensor, frames_per_key: int) -> torch.Tensor:
    """
    The centres of the alignment head's frames in seconds, `(batch, keys)`, NaN where the target is unknown: behind the last
    known encoder frame, and for padding.

    Args:
        frame_times (`torch.Tensor` of shape `(batch, frames)`): of the encoder's frames; see `alignment_loss`.
        key_mask (`torch.Tensor` of shape `(batch, keys)`): 1 for the head's real frames, each of `frames_per_key` of the
            encoder's.
    """
    missing = key_mask.shape[1] * frames_per_key - frame_times.shape[1]
    padded = nn.functional.pad(frame_times, (0, missing), value=torch.nan)
    return padded.unflatten(-1, (-1, frames_per_key)).mean(-1).masked_fill(key_mask == 0, torch.nan)


def alignment_loss(
    scores: AlignmentScores, token_words: torch.Tensor, word_times: torch.Tensor, frame_times: torch.Tensor
) -> torch.Tensor:
    """
    Cross-entropy of "which word, or a pause, does this frame belong to", plus that of "does a word start here".

    Args:
        scores ([`AlignmentScores`])
        token_words (`torch.LongTensor` of shape `(batch, tokens)`): index of each token's word, -100 for tokens of no
            word. The tokens of a word share its span.
        word_times (`torch.Tensor` of shape `(batch, words, 2)`): start and end of each word in seconds, in order; NaN
            for words whose times are unknown and for padding.
        frame_times (`torch.Tensor` of shape `(batch, frames)`): centres of the frames in seconds; NaN for frames whose
            target is unknown and for padding.

    Returns:
        `(batch,)` mean loss over the frames of each row that have a target, 0 for rows without any.
    """
    shares, onsets = alignment_targets(word_times, frame_times)
    known = ~frame_times.isnan()
    no_word = (token_words == -100).unsqueeze(-1)
    tokens = scores.tokens.masked_fill(no_word, -torch.inf)
    total = torch.logsumexp(torch.cat([tokens, scores.pause.unsqueeze(1)], dim=1), dim=1)
    # Each word's logsumexp over its tokens; the floor for a word without any.
    index = token_words.clamp(min=0).unsqueeze(-1).expand_as(tokens)
    highest = torch.full_like(shares, SCORE_FLOOR).scatter_reduce(1, index, tokens.detach(), "amax")
    sums = torch.zeros_like(shares).scatter_add(1, index, (tokens - highest.gather(1, index)).exp())
    words = sums.clamp(min=1e-9).log() + highest
    pause_shares = (1 - shares.sum(1)).clamp(0, 1)
    losses = (shares * (total.unsqueeze(1) - words)).sum(1) + pause_shares * (total - scores.pause)
    losses = losses + nn.functional.binary_cross_entropy_with_logits(scores.onset, onsets, reduction="none")
    return torch.where(known, losses, 0.0).sum(-1) / known.sum(-1).clamp(min=1)


def word_log_posteriors(token_scores: np.ndarray, pause_scores: np.ndarray, token_words: np.ndarray) -> np.ndarray:
    """
    Log-posterior of each word, and of a pause, at each frame.

    Args:
        token_scores (`np.ndarray` of shape `(tokens, frames)`)
        pause_scores (`np.ndarray` of shape `(frames,)`)
        token_words (`np.ndarray` of shape `(tokens,)`): index of each token's word, negative for tokens of no word.

    Returns:
        `(words + 1, frames)`; the last row is the pause.
    """
    num_words = int(token_words.max(initial=-1)) + 1
    rows = [np.logaddexp.reduce(token_scores[token_words == word], axis=0) for word in range(num_words)]
    scores = np.maximum(np.stack([*rows, pause_scores]).astype(np.float64), SCORE_FLOOR)
    return scores - np.logaddexp.reduce(scores, axis=0, keepdims=True)


def level_tokens(token_scores: np.ndarray, token_words: np.ndarray) -> np.ndarray:
    """
    Move each token's log-sum over time towards the median token's, by `LEVELLING` of the difference (a step towards the
    normalisation over time of Zeyer et al. 2026).

    Args:
        token_scores (`np.ndarray` of shape `(tokens, frames)`)
        token_words (`np.ndarray` of shape `(tokens,)`): as in `word_log_posteriors`.
    """
    if not (token_words >= 0).any():
        return token_scores
    levels = np.logaddexp.reduce(token_scores, axis=1, keepdims=True)
    return token_scores - LEVELLING * (levels - np.median(levels[token_words >= 0]))


def shortest_spans(words: list[str], frame_s: float, num_frames: int) -> np.ndarray:
    """
    Fewest frames of each word, `(words,)`, from `SHORTEST_CHARACTER_S`; fewer, but at least 1, when they would not fit
    into `num_frames` together.
    """
    characters = np.array([sum(char.isalnum() for char in word) for word in words])
    wanted = np.maximum(np.ceil(SHORTEST_CHARACTER_S * characters / frame_s - 1e-9).astype(int), 1)
    spare = num_frames - len(words)
    if wanted.sum() > num_frames:
        wanted = 1 + ((wanted - 1) * max(0, spare)) // max(1, (wanted - 1).sum())
    return wanted


@dataclass
class WordSpan:
    """Frames `[start, end)` of one word."""

    start: int
    end: int


def decode_spans(
    log_posteriors: np.ndarray,
    onset_scores: np.ndarray | None = None,
    pause_penalty: float = PAUSE_PENALTY,
    shortest: np.ndarray | None = None,
) -> list[WordSpan]:
    """
    Best monotonic path through pause, word 0, pause, word 1, ..., pause. Pauses may be skipped, words may not.

    A Viterbi search with one vectorised step per frame. Blanks between words only, as in the aligners of RWTH and
    CrisperWhisper.

    Args:
        log_posteriors (`np.ndarray` of shape `(words + 1, frames)`): of `word_log_posteriors`; the last row is the pause.
        onset_scores (`np.ndarray` of shape `(frames,)`, *optional*): log-odds that a word starts in the frame; they tell
            a word from the same word said again.
        pause_penalty (`float`): see `PAUSE_PENALTY`.
        shortest (`np.ndarray` of shape `(words,)`, *optional*): fewest frames of each word, together no more than there
            are; 1 by default.

    Returns:
        one non-empty [`WordSpan`] per word, in order and without overlap. With fewer frames than words there is no such
        path; the words then share the frames evenly, and spans may be empty.
    """
    num_words, num_frames = log_posteriors.shape[0] - 1, log_posteriors.shape[1]
    if num_words == 0:
        return []
    if num_frames < num_words:
        edges = np.linspace(0, num_frames, num_words + 1).astype(int)
        return [WordSpan(int(start), int(end)) for start, end in zip(edges[:-1], edges[1:])]
    least = np.ones(num_words, dtype=int) if shortest is None else shortest
    pauses, emissions = log_posteriors[-1], np.ascontiguousarray(log_posteriors[:-1].T)
    first, spans = _shortest_span_scores(emissions, onset_scores, least)
    places = np.maximum(first, 0) * num_words + np.arange(num_words)
    penalty = np.full(num_words, pause_penalty)
    penalty[-1] = 0.0
    # Best scores of paths: about to start a word in a frame; after the frame in a word that has had its shortest span;
    # after the frame in a pause.
    starts, words = np.empty((num_frames, num_words)), np.empty((num_frames + 1, num_words))
    gaps = np.empty((num_frames + 1, num_words + 1))
    words[0], gaps[0] = -np.inf, -np.inf
    gaps[0, 0] = 0.0
    for frame in range(num_frames):
        word, gap, start, following = words[frame], gaps[frame], starts[frame], gaps[frame + 1]
        start[0] = gap[0]
        np.maximum(word[:-1], gap[1:-1], out=start[1:])
        following[0] = gap[0]
        np.maximum(word - penalty, gap[1:], out=following[1:])
        following += pauses[frame]
        np.maximum(starts.take(places[frame]) + spans[frame], word + emissions[frame], out=words[frame + 1])
    # Where each state was reached from: over a skipped pause; from a word; from a word's shortest span.
    skipped, ended = words[:-1, :-1] > gaps[:-1, 1:-1], words[:-1] - penalty > gaps[:-1, 1:]
    from_shortest = starts.ravel()[places] + spans > words[:-1] + emissions
    return _trace_back(skipped, ended, from_shortest, first, in_pause=bool(gaps[-1, -1] > words[-1, -1]))


def _shortest_span_scores(emissions, onset_scores, least) -> tuple[np.ndarray, np.ndarray]:
    """
    For each frame and word, the first frame of the word's shortest span that ends there (negative when it would begin
    before the recording), and the span's score including its onset; both `(frames, words)`.
    """
    num_frames, num_words = emissions.shape
    summed = np.concatenate([np.zeros((1, num_words)), emissions.cumsum(0)])
    first = np.arange(1, num_frames + 1)[:, None] - least
    begins = np.maximum(first, 0)
    spans = np.where(first >= 0, summed[1:] - np.take_along_axis(summed, begins, axis=0), -np.inf)
    if onset_scores is not None:
        spans += np.where(begins > 0, onset_scores[begins], 0.0)
    return first, spans


def _trace_back(skipped, ended, from_shortest, first, in_pause: bool) -> list[WordSpan]:
    """The spans of the best path of `decode_spans`, from its last frame backwards."""
    end, num_words = from_shortest.shape
    result: list[WordSpan] = []
    frame, number = end - 1, num_words - 1
    while number >= 0:
        if in_pause:
            # After word `number`, on the way back to its end.
            if ended[frame, number]:
                in_pause, end = False, frame
            frame -= 1
        elif from_shortest[frame, number]:
            begin = int(first[frame, number])
            result.append(WordSpan(begin, end))
            number -= 1
            in_pause, end, frame = number < 0 or not skipped[begin, number], begin, begin - 1
        else:
            frame -= 1
    return result[::-1]


def span_edges(spans: list[WordSpan], log_posteriors: np.ndarray) -> np.ndarray:
    """
    Edges of spans within their frames, `(words, 2)` in frames.

    Around the edge between two states, the posterior of the right state against the left one rises from 0 to 1; its sum
    over the frames says where within a frame the edge lies.

    Args:
        spans (`list[WordSpan]`): of `decode_spans`, none empty.
        log_posteriors (`np.ndarray` of shape `(words + 1, frames)`): that they were decoded from.
    """
    pause, num_frames = len(spans), log_posteriors.shape[1]
    edges = np.array([[span.start, span.end] for span in spans], dtype=np.float64)
    for word, span in enumerate(spans):
        for side, place in enumerate((span.start, span.end)):
            if not 0 < place < num_frames:
                continue
            other = word - 1 if side == 0 else word + 1
            touches = 0 <= other < len(spans) and place == (spans[other].end if side == 0 else spans[other].start)
            left, right = (other if touches else pause, word) if side == 0 else (word, other if touches else pause)
            first, last = max(0, place - EDGE_CONTEXT), min(num_frames, place + EDGE_CONTEXT)
            odds = log_posteriors[right, first:last] - log_posteriors[left, first:last]
            edge = last - (1 / (1 + np.exp(-np.clip(odds, -50, 50)))).sum()
            edges[word, side] = min(max(edge, place - EDGE_SHIFT), place + EDGE_SHIFT)
    return edges


def word_times(
    scores: AlignmentScores,
    row: int,
    token_words: np.ndarray,
    num_frames: int,
    frame_s: float,
    duration_s: float = math.inf,
    words: list[str] | None = None,
) -> list[tuple[float, float]]:
    """
    `(start, end)` in seconds of each word of one row of a batch; see `word_seconds`.

    Args:
        scores ([`AlignmentScores`])
        row (`int`)
        token_words (`np.ndarray` of shape `(tokens,)`): index of each token's word, negative for tokens of no word.
        num_frames (`int`): real frames of the row.
        frame_s (`float`): seconds per frame.
        duration_s (`float`): of the recording, when it ends within the last frame.
        words (`list[str]`, *optional*): their spelling bounds their length from below.
    """
    tokens = scores.tokens[row, : len(token_words), :num_frames].cpu().numpy()
    pause, onsets = (item[row, :num_frames].cpu().numpy() for item in (scores.pause, scores.onset))
    posteriors = word_log_posteriors(level_tokens(tokens, token_words), pause, token_words)
    shortest = None if words is None else shortest_spans(words, frame_s, num_frames)
    return word_seconds(posteriors, onsets, frame_s, min(duration_s, num_frames * frame_s), shortest)


def word_seconds(
    log_posteriors: np.ndarray,
    onset_scores: np.ndarray | None,
    frame_s: float,
    duration_s: float,
    shortest: np.ndarray | None = None,
) -> list[tuple[float, float]]:
    """
    `(start, end)` of each word in seconds, rounded to milliseconds: in order, within `[0, duration_s]`, with short gaps
    closed. No word is empty unless there are fewer frames than words.

    Args:
        log_posteriors, onset_scores, shortest: see `decode_spans`.
        frame_s, duration_s (`float`): seconds per frame and of the recording.
    """
    spans = decode_spans(log_posteriors, onset_scores, shortest=shortest)
    if not spans:
        return []
    if log_posteriors.shape[1] < len(spans):
        times = np.linspace(0, duration_s, len(spans) + 1)
        times = np.stack([times[:-1], times[1:]], axis=1)
    else:
        times = close_gaps(np.clip(span_edges(spans, log_posteriors) * frame_s, 0, duration_s))
    return [(round(float(start), 3), round(float(end), 3)) for start, end in times]
