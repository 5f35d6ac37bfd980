"""What only converted checkpoints of the original VoxLM need: its projector, its alignment head and plain DTW."""

import math

import numpy as np
import torch
from torch import nn
from transformers import initialization as init

from .configuration_voxlm import VoxLMConfig
from .timing_voxlm import AlignmentScores


# The original initialises its two learned vectors with this standard deviation.
EDGE_STD = 0.02
# Keeps the logarithm of an attention weight finite; far below any weight that decides something.
LEAST_WEIGHT = 1e-10


class VoxLMConvProjector(nn.Module):
    """
    The projector of the original VoxLM: Linear, GELU, Linear on every frame, a strided convolution (absent for a stride of
    1), and a learned vector before and behind the audio.

    It drops frames that do not fill a stride at the end, and its output has no norm.
    """

    gate, gate_threshold, token_ids, log_scale = None, None, None, None

    def __init__(self, config: VoxLMConfig):
        super().__init__()
        text_size = config.text_config.hidden_size
        self.stride = config.projector_stride
        self.linear_in = nn.Linear(config.audio_hidden_size, text_size)
        self.linear_out = nn.Linear(text_size, text_size)
        self.conv = nn.Conv1d(text_size, text_size, self.stride, self.stride) if self.stride > 1 else None
        self.start = nn.Parameter(EDGE_STD * torch.randn(text_size))
        self.end = nn.Parameter(EDGE_STD * torch.randn(text_size))

    def init_own_tensors(self):
        """Initialise what is in no layer."""
        for vector in (self.start, self.end):
            init.normal_(vector, std=EDGE_STD)

    def output_lengths(self, frames: torch.Tensor) -> torch.Tensor:
        """Number of embeddings for a number of encoder frames."""
        return frames // self.stride + 2

    def scale_to(self, embeddings: torch.Tensor):
        """Do nothing: the original starts at the scale of its layers."""

    def forward(self, frames, frame_mask, token_embeddings=None) -> dict[str, torch.Tensor]:
        """As [`VoxLMProjector.forward`], without a gate and a token mixture; the first and last embedding are learned."""
        hidden_states = self.linear_in(frames.to(self.linear_in.weight.dtype))
        hidden_states = self.linear_out(nn.functional.gelu(hidden_states))
        mask = frame_mask[:, self.stride - 1 :: self.stride]
        if self.conv is not None:
            hidden_states = self.conv(hidden_states.transpose(1, 2)).transpose(1, 2)
        # The end comes last in every row; the padding before it is masked.
        start, end = (vector.expand(len(frames), 1, -1) for vector in (self.start, self.end))
        ones = mask.new_ones(len(mask), 1)
        mask = torch.cat([ones, mask, ones], 1)
        embeds = torch.cat([start, hidden_states, end], 1)
        return {"pooler_output": embeds, "audio_embeds_mask": mask, "visible_mask": mask}


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
    """The alignment head of the original VoxLM: mean attention weights of cross-attention layers over projected frames."""

    states_at_tokens = True
    from_spelling = False

    def __init__(self, text_size: int, num_layers: int, num_heads: int, frames_per_key: int):
        super().__init__()
        self.frames_per_key = frames_per_key
        self.query_proj = nn.Linear(text_size, text_size)
        self.layers = nn.ModuleList([VoxLMCrossAttentionLayer(text_size, num_heads) for _ in range(num_layers)])

    def keys_of(self, audio):
        """Projected frames of a [`VoxLMAudioOutput`] and their mask, without the learned vectors around them."""
        return audio.pooler_output[:, 1:-1], audio.audio_embeds_mask[:, 1:-1]

    def forward(self, text_states, token_embeds, frames, frame_mask) -> AlignmentScores:
        """
        As [`VoxLMAlignmentHead.forward`], on projected frames; the tokens' embeddings are not used.

        Token scores are log attention weights. A pause scores like a token that attends to all frames evenly, so a frame
        that no token attends to more than that belongs to no word. Onsets are unknown (0).
        """
        dtype = self.query_proj.weight.dtype
        hidden_states, frames = self.query_proj(text_states.to(dtype)), frames.to(dtype)
        attentions = []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, frames, frame_mask)
            attentions.append(weights)
        tokens = torch.stack(attentions).mean((0, 2)).float().clamp(min=LEAST_WEIGHT).log()
        pause = -frame_mask.sum(-1, keepdim=True).log().expand(frame_mask.shape)
        return AlignmentScores(tokens, pause.float(), torch.zeros_like(pause, dtype=torch.float))


def dtw_word_times(
    weights: np.ndarray, token_words: np.ndarray, frame_s: float, duration_s: float, median_width: int
) -> list[tuple[float, float]]:
    """
    `(start, end)` in seconds of each word as the original VoxLM computes them, from the frames of its tokens.

    There are no pauses, the first word starts at 0, and an end is the beginning of the last frame, so a word within one
    frame is empty. Only for `config.alignment_median_width`.

    Args:
        weights (`np.ndarray` of shape `(tokens, frames)`): attention weights.
        token_words (`np.ndarray` of shape `(tokens,)`): index of each token's word, negative for tokens of no word.
        frame_s, duration_s (`float`): seconds per frame and of the recording.
        median_width (`int`): see `dtw_frames`.
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
    First and last frame of each token, `(tokens, 2)`, as the original VoxLM finds them: a median filter over time, the
    z-score over the whole matrix, and plain dynamic time warping from the first token and frame to the last.

    Args:
        weights (`np.ndarray` of shape `(tokens, frames)`): attention weights.
        median_width (`int`): frames of the filter, odd.
    """
    half = min(median_width // 2, weights.shape[1] - 1)
    padded = np.pad(weights.astype(np.float32), ((0, 0), (half, half)), mode="reflect")
    scores = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, axis=1), axis=-1)
    costs = -(scores - scores.mean()) / max(float(scores.std()), 1e-9)
    num_tokens, num_frames = costs.shape
    total = np.full((num_tokens + 1, num_frames + 1), np.inf, dtype=np.float32)
    total[0, 0] = 0
    # Where each cell's path came from; the first of equally cheap moves wins.
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
