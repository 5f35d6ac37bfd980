"""Word times: the alignment head, its target and loss, and the monotonic decoder that turns scores into word spans."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .projector_voxlm import VoxLMConvNeXtBlock


# Word edges in the target are ramps of this length: nobody hears them sharper, and no label is.
RAMP_S = 0.03
# Words less than this apart are taken as joined in the middle, in the target as in the result. Aligners and synthesisers put
# short pauses between words by habit, and do not agree where (CrisperWhisper splits gaps of up to 160 ms).
CLOSED_GAP_S = 0.1
# A word has at least this much time for each of its letters and figures; fast speech has three times as much.
SHORTEST_CHARACTER_S = 0.02
# How far tokens are put on one level: one that looks strong everywhere must not take the time of those that look weak everywhere.
LEVELLING = 0.25
# Frames on either side of an edge whose posteriors say where within a frame it lies.
EDGE_CONTEXT = 2


class VoxLMAlignmentHead(nn.Module):
    """
    Scores every encoder frame against every text token, against a pause, and for being the first of a word.

    A token's query is the LLM's hidden state that predicted it (so the pass that generated the text can be used) plus the
    embedding of the token itself. Keys are the encoder's own frames (50 Hz for Whisper, whose states carry their position),
    with convolutions that show each frame its neighbours.
    """

    frames_per_key = 1
    # A token's state is the one that predicted it, not the one at it.
    states_at_tokens = False

    def __init__(self, text_size: int, audio_size: int, hidden_size: int, num_blocks: int):
        super().__init__()
        self.state_norm = nn.LayerNorm(text_size)
        self.state_proj = nn.Linear(text_size, hidden_size)
        self.token_proj = nn.Linear(text_size, hidden_size, bias=False)
        self.frame_norm = nn.LayerNorm(audio_size)
        self.frame_proj = nn.Linear(audio_size, hidden_size)
        self.blocks = nn.ModuleList([VoxLMConvNeXtBlock(hidden_size, 9, 2) for _ in range(num_blocks)])
        self.key_norm = nn.LayerNorm(hidden_size)
        self.frame_scores = nn.Linear(hidden_size, 2)

    def keys_of(self, audio):
        """Frames and their mask that `forward` takes, of a [`VoxLMAudioOutput`]: the encoder's."""
        return audio.last_hidden_state, audio.frame_mask

    def forward(self, text_states, token_embeds, frames, frame_mask):
        """
        Args:
            text_states (`torch.Tensor` of shape `(batch, tokens, text_size)`): last hidden states that predicted the tokens.
            token_embeds (`torch.Tensor` of shape `(batch, tokens, text_size)`): input embeddings of the tokens.
            frames (`torch.Tensor` of shape `(batch, frames, audio_size)`): encoder states.
            frame_mask (`torch.Tensor` of shape `(batch, frames)`): 1 for real frames.

        Returns:
            [`AlignmentScores`], unnormalised and in float32.
        """
        dtype = self.state_proj.weight.dtype
        queries = self.state_proj(self.state_norm(text_states.to(dtype)))
        queries = queries + self.token_proj(nn.functional.normalize(token_embeds.to(dtype), dim=-1))
        mask = frame_mask.unsqueeze(-1).to(dtype)
        keys = self.frame_proj(self.frame_norm(frames.to(dtype)))
        for block in self.blocks:
            keys = block(keys, mask)
        keys = self.key_norm(keys)
        tokens = queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        pause, onset = self.frame_scores(keys).float().unbind(-1)
        return AlignmentScores(tokens.float(), pause, onset)


class VoxLMCrossAttentionLayer(nn.Module):
    """Post-norm cross-attention and feed-forward layer that also returns its attention weights."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden_states, frames, frame_mask):
        """States `(batch, tokens, size)` and attention weights `(batch, heads, tokens, frames)`."""
        queries, keys, values = (
            projection(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, source in (
                (self.q_proj, hidden_states),
                (self.k_proj, frames),
                (self.v_proj, frames),
            )
        )
        scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])
        weights = scores.masked_fill(frame_mask[:, None, None] == 0, -torch.inf).softmax(-1)
        hidden_states = self.norm1(hidden_states + self.out_proj((weights @ values).transpose(1, 2).flatten(2)))
        return self.norm2(hidden_states + self.down(nn.functional.gelu(self.up(hidden_states)))), weights


class VoxLMCrossAttentionHead(nn.Module):
    """The alignment head of the original VoxLM: the mean attention weights of cross-attention layers over projected frames."""

    states_at_tokens = True

    def __init__(self, text_size: int, num_layers: int, num_heads: int, frames_per_key: int):
        super().__init__()
        self.frames_per_key = frames_per_key
        self.query_proj = nn.Linear(text_size, text_size)
        self.layers = nn.ModuleList([VoxLMCrossAttentionLayer(text_size, num_heads) for _ in range(num_layers)])

    def keys_of(self, audio):
        """Frames and their mask that `forward` takes: projected ones, without the learned vectors around them."""
        return audio.pooler_output[:, 1:-1], audio.audio_embeds_mask[:, 1:-1]

    def forward(self, text_states, token_embeds, frames, frame_mask):
        """
        As [`VoxLMAlignmentHead.forward`], on projected frames; the tokens' embeddings are not used.

        Token scores are log attention weights. A pause scores as a token would that attends to all frames evenly, so that
        frames which no token looks at more than that belong to none; onsets are not known.
        """
        dtype = self.query_proj.weight.dtype
        hidden_states, frames = self.query_proj(text_states.to(dtype)), frames.to(dtype)
        attentions = []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, frames, frame_mask)
            attentions.append(weights)
        tokens = torch.stack(attentions).mean((0, 2)).float().clamp(min=1e-10).log()
        pause = -frame_mask.sum(-1, keepdim=True).log().expand(frame_mask.shape)
        return AlignmentScores(tokens, pause.float(), torch.zeros_like(pause, dtype=torch.float))


def make_alignment_head(config) -> nn.Module:
    """The alignment head that `config.alignment_kind` ([`VoxLMConfig`]) names."""
    text_size, num_blocks = config.text_config.hidden_size, config.alignment_num_blocks
    if config.alignment_kind == "cross_attention":
        return VoxLMCrossAttentionHead(text_size, num_blocks, config.alignment_num_heads, config.projector_stride)
    return VoxLMAlignmentHead(text_size, config.audio_hidden_size, config.alignment_hidden_size, num_blocks)


@dataclass
class AlignmentScores:
    """
    What the alignment head says of a batch.

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
    Join neighbouring words that are less than `longest_s` apart, in the middle between them.

    Args:
        times: `(words, 2)` starts and ends in seconds, in order.
    """
    times = times.copy()
    gaps = times[1:, 0] - times[:-1, 1]
    close = (gaps > 0) & (gaps < longest_s)
    middles = (times[1:, 0] + times[:-1, 1]) / 2
    times[1:, 0] = np.where(close, middles, times[1:, 0])
    times[:-1, 1] = np.where(close, middles, times[:-1, 1])
    return times


def alignment_targets(word_times, frame_times):
    """
    How much of each frame belongs to each word, with edges that are ramps of `RAMP_S`.

    Args:
        word_times (`torch.Tensor` of shape `(batch, words, 2)`): starts and ends in seconds, in order; NaN for padding.
        frame_times (`torch.Tensor` of shape `(batch, frames)`): middles of the frames in seconds.

    Returns:
        shares `(batch, words, frames)` in 0..1, and `(batch, frames)`, 1 for a frame in which a word starts (less for those
        beside it).
    """
    middles = frame_times.unsqueeze(1)
    starts, ends = word_times[..., :1], word_times[..., 1:]
    shares = ((middles - starts) / RAMP_S + 0.5).clamp(0, 1) - ((middles - ends) / RAMP_S + 0.5).clamp(0, 1)
    onsets = (1 - (middles - starts).abs() / RAMP_S).clamp(min=0)
    return shares.nan_to_num(), onsets.nan_to_num().amax(1)


def alignment_loss(scores: AlignmentScores, token_words, word_times, frame_times):
    """
    Cross-entropy of "which word, or a pause, does this frame belong to", plus that of "does a word start here".

    Args:
        scores ([`AlignmentScores`])
        token_words (`torch.LongTensor` of shape `(batch, tokens)`): the word of each token, -100 for tokens of no word. The
            tokens of a word share its span.
        word_times (`torch.Tensor` of shape `(batch, words, 2)`): start and end in seconds of each word, in order; NaN for
            words whose times are not known, and for padding.
        frame_times (`torch.Tensor` of shape `(batch, frames)`): middles of the frames in seconds, NaN for frames of which it
            is not known what is said in them, and for padding.

    Returns:
        `(batch,)` means over the frames of each row that have a target, 0 for rows without.
    """
    shares, onsets = alignment_targets(word_times, frame_times)
    known = ~frame_times.isnan()
    no_word = (token_words == -100).unsqueeze(-1)
    tokens = scores.tokens.masked_fill(no_word, -torch.inf)
    total = torch.logsumexp(torch.cat([tokens, scores.pause.unsqueeze(1)], dim=1), dim=1)
    # The logsumexp of each word over its tokens; far below everything for a word without any.
    index = token_words.clamp(min=0).unsqueeze(-1).expand_as(tokens)
    highest = torch.full_like(shares, -1e4).scatter_reduce(1, index, tokens.detach(), "amax")
    sums = torch.zeros_like(shares).scatter_add(1, index, (tokens - highest.gather(1, index)).exp())
    words = sums.clamp(min=1e-9).log() + highest
    pause_shares = (1 - shares.sum(1)).clamp(0, 1)
    losses = (shares * (total.unsqueeze(1) - words)).sum(1) + pause_shares * (total - scores.pause)
    losses = losses + nn.functional.binary_cross_entropy_with_logits(scores.onset, onsets, reduction="none")
    return torch.where(known, losses, 0.0).sum(-1) / known.sum(-1).clamp(min=1)


def word_log_posteriors(token_scores: np.ndarray, pause_scores: np.ndarray, token_words: np.ndarray) -> np.ndarray:
    """
    Log-probability of each word, and of a pause, at each frame.

    Args:
        token_scores: `(tokens, frames)` scores; pause_scores: `(frames,)`; token_words: `(tokens,)` index of each token's
            word, negative for tokens of no word (special tokens, eos).

    Returns:
        `(words + 1, frames)` log-probabilities; the last row is the pause.
    """
    num_words = int(token_words.max(initial=-1)) + 1
    rows = [np.logaddexp.reduce(token_scores[token_words == word], axis=0) for word in range(num_words)]
    # The floor keeps a word without tokens of its own (they all belong to its neighbours) on the path.
    scores = np.maximum(np.stack([*rows, pause_scores]).astype(np.float64), -1e4)
    return scores - np.logaddexp.reduce(scores, axis=0, keepdims=True)


def level_tokens(token_scores: np.ndarray, token_words: np.ndarray) -> np.ndarray:
    """
    Scores with `LEVELLING` of what sets each token's sum over time apart from that of the others taken off (a step towards the
    normalisation over time of Zeyer et al. 2026).

    Args:
        token_scores: `(tokens, frames)`; token_words: as for `word_log_posteriors`.
    """
    if not (token_words >= 0).any():
        return token_scores
    levels = np.logaddexp.reduce(token_scores, axis=1, keepdims=True)
    return token_scores - LEVELLING * (levels - np.median(levels[token_words >= 0]))


def shortest_spans(words: list[str], frame_s: float, num_frames: int) -> np.ndarray:
    """
    Least frames of each word, `(words,)`, by `SHORTEST_CHARACTER_S`; where they do not fit together, less, and at least 1.

    Args:
        words: as written; frame_s: seconds of a frame; num_frames: of the recording.
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
    pause_penalty: float = 2.0,
    shortest: np.ndarray | None = None,
) -> list[WordSpan]:
    """
    Best monotonic path through pause, word 0, pause, word 1, ..., pause; every pause may be skipped, no word may.

    Viterbi with one vectorised step per frame (the topology of RWTH's and CrisperWhisper's aligners, see PEERS in the project's
    notes: blanks between words only).

    Args:
        log_posteriors: `(words + 1, frames)`, the last row being the pause, as `word_log_posteriors` returns.
        onset_scores: `(frames,)` log-odds that a word starts in the frame: tells a word from the same word said again.
        pause_penalty: cost of entering a pause between two words, in nats, so that a single doubtful frame makes none.
        shortest: `(words,)` least frames of each word, together no more than there are; by default 1.

    Returns:
        One non-empty span per word, in order and without overlap. With fewer frames than words no such path exists; then
        the words share the frames evenly and spans may be empty.
    """
    num_words, num_frames = log_posteriors.shape[0] - 1, log_posteriors.shape[1]
    if num_words == 0:
        return []
    if num_frames < num_words:
        edges = np.linspace(0, num_frames, num_words + 1).astype(int)
        return [WordSpan(int(start), int(end)) for start, end in zip(edges[:-1], edges[1:])]

    least = np.ones(num_words, dtype=int) if shortest is None else shortest
    pauses, emissions = log_posteriors[-1], np.ascontiguousarray(log_posteriors[:-1].T)
    # What a word scores in its shortest span, its onset included, by the frame in which that ends.
    summed = np.concatenate([np.zeros((1, num_words)), emissions.cumsum(0)])
    first = np.arange(1, num_frames + 1)[:, None] - least
    begins = np.maximum(first, 0)
    spans = np.where(first >= 0, summed[1:] - np.take_along_axis(summed, begins, axis=0), -np.inf)
    if onset_scores is not None:
        spans += np.where(begins > 0, onset_scores[begins], 0.0)
    places = begins * num_words + np.arange(num_words)
    penalty = np.full(num_words, pause_penalty)
    penalty[-1] = 0.0
    # Best scores of paths: about to start a word in a frame; after it in a word that has had its shortest span; in a pause.
    starts, words = np.empty((num_frames, num_words)), np.empty((num_frames + 1, num_words))
    gaps = np.empty((num_frames + 1, num_words + 1))
    words[0], gaps[0] = -np.inf, -np.inf
    gaps[0, 0] = 0.0
    for frame in range(num_frames):
        word, gap, start = words[frame], gaps[frame], starts[frame]
        start[0] = gap[0]
        np.maximum(word[:-1], gap[1:-1], out=start[1:])
        following = gaps[frame + 1]
        following[0] = gap[0]
        np.maximum(word - penalty, gap[1:], out=following[1:])
        following += pauses[frame]
        np.maximum(starts.take(places[frame]) + spans[frame], word + emissions[frame], out=words[frame + 1])
    # Where they came from: over a skipped pause, from a word, from its shortest span a moment ago.
    skipped, ended = words[:-1, :-1] > gaps[:-1, 1:-1], words[:-1] - penalty > gaps[:-1, 1:]
    ripened = starts.ravel()[places] + spans > words[:-1] + emissions

    return _walk_back(skipped, ended, ripened, first, in_pause=bool(gaps[-1, -1] > words[-1, -1]))


def _walk_back(skipped, ended, ripened, first, in_pause: bool) -> list[WordSpan]:
    """The spans of the best path of `decode_spans`, from its last frame back; `first` is where each word's shortest span begins."""
    end, num_words = ripened.shape
    result: list[WordSpan] = []
    frame, number = end - 1, num_words - 1
    while number >= 0:
        if in_pause:
            # Behind word `number`, on the way back to its end.
            if ended[frame, number]:
                in_pause, end = False, frame
            frame -= 1
        elif ripened[frame, number]:
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

    Around the edge between two states the posterior of the right one against the left one rises from 0 to 1; where its sum says
    that it does, is the edge (what a frame half covered by a word gives half to). It moves by less than half a frame, so that
    words stay in order and none becomes empty.

    Args:
        spans: of `decode_spans`, none empty; log_posteriors: `(words + 1, frames)` that they were made from.
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
            edges[word, side] = min(max(edge, place - 0.45), place + 0.45)
    return edges


def word_times(
    scores: AlignmentScores,
    row: int,
    token_words: np.ndarray,
    num_frames: int,
    frame_s: float,
    duration_s: float = math.inf,
    words: list[str] | None = None,
    median_width: int | None = None,
) -> list[tuple[float, float]]:
    """
    `(start, end)` in seconds of each word of one row of a batch.

    Args:
        scores ([`AlignmentScores`]); row (`int`); token_words: `(tokens,)` the word of each token, negative for tokens of none;
        num_frames (`int`): real frames of the row; frame_s (`float`): seconds per frame.
        duration_s (`float`): of the recording, where it ends within the last frame.
        words (`list[str]`, *optional*): as written; long ones need some time.
        median_width (`int`, *optional*): `config.alignment_median_width`.
    """
    tokens = scores.tokens[row, : len(token_words), :num_frames].cpu().numpy()
    duration_s = min(duration_s, num_frames * frame_s)
    if median_width is not None:
        return dtw_word_times(np.exp(tokens), token_words, frame_s, duration_s, median_width)
    pause, onsets = (item[row, :num_frames].cpu().numpy() for item in (scores.pause, scores.onset))
    posteriors = word_log_posteriors(level_tokens(tokens, token_words), pause, token_words)
    shortest = None if words is None else shortest_spans(words, frame_s, num_frames)
    return word_seconds(posteriors, onsets, frame_s, duration_s, shortest)


def word_seconds(
    log_posteriors: np.ndarray,
    onset_scores: np.ndarray | None,
    frame_s: float,
    duration_s: float,
    shortest: np.ndarray | None = None,
) -> list[tuple[float, float]]:
    """
    `(start, end)` of each word in seconds, rounded to milliseconds: in order, within `[0, duration_s]`, neighbours joined by the
    rule of `close_gaps`. No word is empty unless there are fewer frames than words.

    Args:
        log_posteriors, onset_scores, shortest: see `decode_spans`; frame_s, duration_s: seconds of a frame and of the recording.
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


def dtw_word_times(
    weights: np.ndarray, token_words: np.ndarray, frame_s: float, duration_s: float, median_width: int
) -> list[tuple[float, float]]:
    """
    `(start, end)` of each word as the original VoxLM had it, from the frames of its tokens. There are no pauses, the first word
    starts at 0, and an end is the beginning of the last frame, so that a word within one frame is empty: kept for its
    configuration alone.

    Args:
        weights: `(tokens, frames)` attention weights; token_words: `(tokens,)` the word of each token, negative for tokens of none;
        frame_s, duration_s: seconds of a frame and of the recording; median_width: see `dtw_frames`.
    """
    if not len(token_words):
        return []
    frames = dtw_frames(weights, median_width)
    times: list[tuple[float, float]] = []
    for word in range(int(token_words.max()) + 1):
        tokens = np.flatnonzero(token_words == word)
        before = times[-1][1] if times else 0.0
        # A word whose tokens all belong to its neighbours is where the last one ended.
        edges = (frames[tokens[0], 0] * frame_s, frames[tokens[-1], 1] * frame_s) if len(tokens) else (before, before)
        start, end = (round(min(float(edge), duration_s), 3) for edge in edges)
        times.append((start, max(start, end)))
    return times


def dtw_frames(weights: np.ndarray, median_width: int) -> np.ndarray:
    """
    First and last frame of each token, `(tokens, 2)`, as the original VoxLM found them: a median filter along time, the z-score over
    the whole matrix, and plain dynamic time warping from the first token and frame to the last.

    Args:
        weights: `(tokens, frames)` attention weights; median_width: frames of the filter, odd.
    """
    half = min(median_width // 2, weights.shape[1] - 1)
    padded = np.pad(weights.astype(np.float32), ((0, 0), (half, half)), mode="reflect")
    scores = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, axis=1), axis=-1)
    costs = -(scores - scores.mean()) / max(float(scores.std()), 1e-9)
    num_tokens, num_frames = costs.shape
    total = np.full((num_tokens + 1, num_frames + 1), np.inf, dtype=np.float32)
    total[0, 0] = 0
    # Where a cell's path came from; of equally cheap ways the first of these.
    moves = ((1, 1), (1, 0), (0, 1))
    steps = np.zeros(total.shape, dtype=np.int8)
    for token in range(1, num_tokens + 1):
        for frame in range(1, num_frames + 1):
            ways = [total[token - up, frame - left] for up, left in moves]
            steps[token, frame] = step = ways.index(min(ways))
            total[token, frame] = costs[token - 1, frame - 1] + ways[step]
    frames = np.full((num_tokens, 2), -1)
    token, frame = num_tokens, num_frames
    while token and frame:
        frames[token - 1, 0] = frame - 1
        if frames[token - 1, 1] < 0:
            frames[token - 1, 1] = frame - 1
        up, left = moves[steps[token, frame]]
        token, frame = token - up, frame - left
    return frames
