"""Word times: the alignment head, its loss, and the monotonic decoder that turns scores into word spans."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


class VoxLMAlignmentHead(nn.Module):
    """
    Scores every encoder frame against every text token and against a pause.

    A token's query is the LLM's hidden state that predicted it (so the pass that generated the text can be used) plus the
    embedding of the token itself. Keys are the encoder's own frames (50 Hz for Whisper), with a depthwise convolution that
    shows each frame its neighbours.
    """

    def __init__(self, text_size: int, audio_size: int, hidden_size: int):
        super().__init__()
        self.state_proj = nn.Linear(text_size, hidden_size)
        self.token_proj = nn.Linear(text_size, hidden_size, bias=False)
        self.frame_proj = nn.Linear(audio_size, hidden_size)
        self.frame_conv = nn.Conv1d(hidden_size, hidden_size, kernel_size=9, padding=4, groups=hidden_size)
        self.state_norm = nn.LayerNorm(text_size)
        self.frame_norm = nn.LayerNorm(audio_size)
        self.pause_proj = nn.Linear(hidden_size, 1)

    def forward(self, text_states, token_embeds, frames, frame_mask):
        """
        Args:
            text_states (`torch.Tensor` of shape `(batch, tokens, text_size)`): last hidden states that predicted the tokens.
            token_embeds (`torch.Tensor` of shape `(batch, tokens, text_size)`): input embeddings of the tokens.
            frames (`torch.Tensor` of shape `(batch, frames, audio_size)`): encoder states.
            frame_mask (`torch.Tensor` of shape `(batch, frames)`): 1 for real frames.

        Returns:
            `(batch, tokens, frames)` token scores and `(batch, frames)` pause scores, both unnormalised and in float32.
        """
        dtype = self.state_proj.weight.dtype
        queries = self.state_proj(self.state_norm(text_states.to(dtype)))
        queries = queries + self.token_proj(nn.functional.normalize(token_embeds.to(dtype), dim=-1))
        keys = self.frame_proj(self.frame_norm(frames.to(dtype))) * frame_mask.unsqueeze(-1).to(dtype)
        keys = keys + nn.functional.gelu(self.frame_conv(keys.transpose(1, 2)).transpose(1, 2))
        scores = queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        return scores.float(), self.pause_proj(keys).squeeze(-1).float()


def alignment_loss(token_scores, pause_scores, token_words, frame_words):
    """
    Cross-entropy of "which word, or a pause, does this frame belong to".

    Args:
        token_scores (`torch.Tensor` of shape `(batch, tokens, frames)`), pause_scores (`(batch, frames)`): from the head.
        token_words (`torch.LongTensor` of shape `(batch, tokens)`): the word of each token, -100 for tokens of no word.
        frame_words (`torch.LongTensor` of shape `(batch, frames)`): the word of each frame, -1 for a pause, -100 for frames
            without a target.

    Returns:
        `(batch,)` means over the frames of each row that have a target, 0 for rows without.
    """
    scores = token_scores.masked_fill((token_words == -100).unsqueeze(-1), -torch.inf)
    total = torch.logsumexp(torch.cat([scores, pause_scores.unsqueeze(1)], dim=1), dim=1)
    same_word = token_words.unsqueeze(-1) == frame_words.unsqueeze(1)
    # A floor instead of -inf: a frame whose word has no token must not turn the whole loss into NaN.
    word_score = torch.logsumexp(scores.masked_fill(~same_word, -1e4), dim=1)
    target_score = torch.where(frame_words == -1, pause_scores, word_score)
    has_target = frame_words != -100
    losses = torch.where(has_target, total - target_score, 0.0)
    return losses.sum(-1) / has_target.sum(-1).clamp(min=1)


def word_log_posteriors(token_scores: np.ndarray, pause_scores: np.ndarray, token_words: np.ndarray) -> np.ndarray:
    """
    Log-probability of each word, and of a pause, at each frame.

    Args:
        token_scores: `(tokens, frames)` scores; pause_scores: `(frames,)`; token_words: `(tokens,)` index of each token's
            word, -1 for tokens of no word (special tokens, eos).

    Returns:
        `(words + 1, frames)` log-probabilities; the last row is the pause.
    """
    num_words = int(token_words.max(initial=-1)) + 1
    rows = [np.logaddexp.reduce(token_scores[token_words == word], axis=0) for word in range(num_words)]
    # The floor keeps a word without tokens of its own (they all belong to its neighbours) on the path.
    scores = np.maximum(np.stack([*rows, pause_scores]).astype(np.float64), -1e4)
    return scores - np.logaddexp.reduce(scores, axis=0, keepdims=True)


@dataclass
class WordSpan:
    """Frames `[start, end)` of one word."""

    start: int
    end: int


def decode_spans(log_posteriors: np.ndarray, pause_penalty: float = 2.0) -> list[WordSpan]:
    """
    Best monotonic path through pause, word 0, pause, word 1, ..., pause; every pause may be skipped, no word may.

    Viterbi over 2 * words + 1 states, one vectorised step per frame (the topology of RWTH's and CrisperWhisper's
    aligners, see PEERS in the project's notes: blanks between words only).

    Args:
        log_posteriors: `(words + 1, frames)`, the last row being the pause, as `word_log_posteriors` returns.
        pause_penalty: cost of entering a pause between two words, in nats, so that a single doubtful frame makes none.

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

    num_states = 2 * num_words + 1
    emissions = np.repeat(log_posteriors[-1][None], num_states, axis=0)
    emissions[1::2] = log_posteriors[:-1]
    enter_cost = np.zeros(num_states)
    enter_cost[2:-1:2] = pause_penalty
    score = np.full(num_states, -np.inf)
    score[:2] = emissions[:2, 0]
    # how many states the best path moved forward into each state: 0 stay, 1 next, 2 word to word over a skipped pause
    moves = np.zeros((num_frames, num_states), dtype=np.int8)
    options = np.full((3, num_states), -np.inf)
    for frame in range(1, num_frames):
        options[0] = score
        options[1, 1:] = score[:-1] - enter_cost[1:]
        options[2, 3::2] = score[1:-2:2]
        moves[frame] = options.argmax(axis=0)
        score = options.max(axis=0) + emissions[:, frame]

    state = num_states - 1 if score[-1] > score[-2] else num_states - 2
    path = np.empty(num_frames, dtype=int)
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = state
        state -= int(moves[frame, state])
    spans = []
    for word in range(num_words):
        frames = np.flatnonzero(path == 2 * word + 1)
        spans.append(WordSpan(int(frames[0]), int(frames[-1]) + 1))
    return spans


def spans_to_seconds(spans: list[WordSpan], frame_s: float, duration_s: float) -> list[tuple[float, float]]:
    """Spans in frames to `(start, end)` in seconds within `[0, duration_s]`, rounded to milliseconds."""
    return [
        (round(min(span.start * frame_s, duration_s), 3), round(min(span.end * frame_s, duration_s), 3))
        for span in spans
    ]
