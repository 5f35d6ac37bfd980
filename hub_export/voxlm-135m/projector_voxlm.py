"""Projectors: encoder states to input embeddings of the LLM."""

import torch
from torch import nn

from .configuration_voxlm import VoxLMConfig


# Projected frames that are scored against the whole vocabulary at once.
FRAMES_AT_ONCE = 64


class VoxLMConvNeXtBlock(nn.Module):
    """Residual depthwise convolution over time and feed-forward layer (Liu et al. 2022, in one dimension)."""

    def __init__(self, hidden_size: int, kernel_size: int = 7, expansion: int = 3):
        super().__init__()
        self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, expansion * hidden_size)
        self.down = nn.Linear(expansion * hidden_size, hidden_size)

    def forward(self, hidden_states, mask):
        """`hidden_states` `(batch, frames, hidden_size)`, `mask` `(batch, frames, 1)`; padding never reaches real frames."""
        mixed = self.conv((hidden_states * mask).transpose(1, 2)).transpose(1, 2)
        return hidden_states + self.down(nn.functional.gelu(self.up(self.norm(mixed))))


class VoxLMProjector(nn.Module):
    """Encoder frames to input embeddings of the LLM: stack `projector_stride` frames, then an MLP, then RMSNorm."""

    def __init__(self, config: VoxLMConfig):
        super().__init__()
        hidden_size, text_size = config.projector_hidden_size, config.text_config.hidden_size
        self.stride = config.projector_stride
        self.linear_in = nn.Linear(self.stride * config.audio_hidden_size, hidden_size)
        num_blocks = config.projector_num_blocks if config.projector_kind == "convnext" else 0
        self.blocks = nn.ModuleList([VoxLMConvNeXtBlock(hidden_size) for _ in range(num_blocks)])
        self.linear_out = nn.Linear(hidden_size, text_size)
        self.norm = nn.RMSNorm(text_size, eps=1e-6)
        self.gate_threshold = config.frame_gate_threshold
        self.gate = nn.Linear(hidden_size, 1) if self.gate_threshold is not None else None
        # The inverse temperature of the token scores, as a logarithm; not a scalar, which FSDP2 cannot shard.
        self.log_scale = nn.Parameter(torch.zeros(1)) if config.projector_readout == "token_mixture" else None
        # The tokens that frames are read as; before training the first ones, for want of a choice.
        vocab_size = config.projector_vocab_size
        self.register_buffer("token_ids", None if vocab_size is None else torch.arange(vocab_size))

    def output_lengths(self, frames: torch.Tensor) -> torch.Tensor:
        """Number of embeddings for a number of encoder frames."""
        return (frames + self.stride - 1) // self.stride

    def scale_to(self, embeddings: torch.Tensor):
        """Start at the size of the embeddings the LLM is used to."""
        nn.init.constant_(self.norm.weight, embeddings.detach().float().pow(2).mean().sqrt().item())

    def forward(self, frames, frame_mask, token_embeddings=None):
        """
        Args:
            frames (`torch.Tensor` of shape `(batch, frames, audio_size)`)
            frame_mask (`torch.LongTensor` of shape `(batch, frames)`)
            token_embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`, *optional*): of the LLM, to read the frames
                as tokens (see `mix_tokens`). Done in this pass, where sharded parameters are whole.

        Returns:
            embeddings `(batch, ceil(frames / stride), text_size)`, their mask, the gate's log-odds or `None`, and the tokens
            that were read or `None`.
        """
        embeds, speech_logits, mask = self.read(frames, frame_mask)
        tokens = None
        if token_embeddings is not None:
            embeds, speech_logits, tokens = self.mix_tokens(embeds, speech_logits, token_embeddings)
            tokens = tokens.masked_fill(mask == 0, -1)
        return embeds, mask, speech_logits, tokens

    def read(self, frames, frame_mask):
        """
        The projected frames before they are mixed: `(batch, ceil(frames / stride), text_size)`, the gate's log-odds or `None`,
        and the mask. Arguments as in `forward`.
        """
        frames = frames.to(self.linear_in.weight.dtype) * frame_mask.unsqueeze(-1).to(self.linear_in.weight.dtype)
        missing = -frames.shape[1] % self.stride
        frames = nn.functional.pad(frames, (0, 0, 0, missing))
        mask = nn.functional.pad(frame_mask, (0, missing))[:, :: self.stride]
        hidden_states = self.linear_in(frames.reshape(frames.shape[0], -1, self.stride * frames.shape[2]))
        if len(self.blocks) == 0:
            hidden_states = nn.functional.gelu(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, mask.unsqueeze(-1).to(hidden_states.dtype))
        speech_logits = self.gate(hidden_states).squeeze(-1) if self.gate is not None else None
        return self.norm(self.linear_out(hidden_states)), speech_logits, mask

    def keep(self, speech_logits):
        """Mask of the frames whose probability of carrying a token is above the gate's threshold."""
        return speech_logits.float().sigmoid() > self.gate_threshold

    def mix_tokens(self, embeds, speech_logits, token_embeddings):
        """
        Read the projected frames as tokens.

        Args:
            embeds (`torch.Tensor` of shape `(batch, frames, text_size)`), speech_logits (`(batch, frames)`): of `forward`.
            token_embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`): of the LLM.

        Returns:
            mixtures of token embeddings by the softmax of their dot products with each frame, zero for frames that the gate
            hides; the gate's log-odds, minus infinity for frames that repeat the token before them; and the likeliest
            tokens `(batch, frames)`, -1 for frames hidden for either reason.
        """
        if self.token_ids is not None:
            token_embeddings = token_embeddings[self.token_ids]
        kept = self.keep(speech_logits)
        token_embeddings = token_embeddings.to(embeds.dtype)
        read, best = [embeds[:0, 0]], [kept.new_zeros(0, dtype=torch.long)]
        # A few frames at a time: a row of scores is as long as the vocabulary.
        for frames in embeds[kept].split(FRAMES_AT_ONCE):
            scores = frames @ token_embeddings.T * self.log_scale.exp()
            read.append(scores.softmax(-1) @ token_embeddings)
            best.append(scores.argmax(-1))
        mixtures = torch.zeros_like(embeds)
        mixtures[kept] = torch.cat(read)
        tokens = torch.full(kept.shape, -1, device=embeds.device)
        best = torch.cat(best)
        tokens[kept] = best if self.token_ids is None else self.token_ids[best]
        repeats = nn.functional.pad((tokens[:, 1:] == tokens[:, :-1]) & kept[:, 1:], (1, 0))
        return mixtures, speech_logits.masked_fill(repeats, -torch.inf), tokens.masked_fill(repeats, -1)


class VoxLMConvProjector(nn.Module):
    """
    The projector of the original VoxLM: Linear, GELU, Linear on every frame, a strided convolution (left out for a stride of
    1), and a learned vector before and behind the audio.

    It drops what does not fill a stride at the end, and its frames have no norm.
    """

    gate, gate_threshold, token_ids, log_scale = None, None, None, None

    def __init__(self, config: VoxLMConfig):
        super().__init__()
        text_size = config.text_config.hidden_size
        self.stride = config.projector_stride
        self.linear_in = nn.Linear(config.audio_hidden_size, text_size)
        self.linear_out = nn.Linear(text_size, text_size)
        self.conv = nn.Conv1d(text_size, text_size, self.stride, self.stride) if self.stride > 1 else None
        self.start = nn.Parameter(0.02 * torch.randn(text_size))
        self.end = nn.Parameter(0.02 * torch.randn(text_size))

    def output_lengths(self, frames: torch.Tensor) -> torch.Tensor:
        """Number of embeddings for a number of encoder frames."""
        return frames // self.stride + 2

    def scale_to(self, embeddings: torch.Tensor):
        """Nothing: the original starts at the size that its layers give."""

    def forward(self, frames, frame_mask, token_embeddings=None):
        """As [`VoxLMProjector.forward`], without a gate and without reading tokens; the first and last embedding are the learned ones."""
        hidden_states = self.linear_in(frames.to(self.linear_in.weight.dtype))
        hidden_states = self.linear_out(nn.functional.gelu(hidden_states))
        mask = frame_mask[:, self.stride - 1 :: self.stride]
        if self.conv is not None:
            hidden_states = self.conv(hidden_states.transpose(1, 2)).transpose(1, 2)
        # The end comes last in every row; what is padding before it is masked.
        edges = [vector.expand(len(frames), 1, -1) for vector in (self.start, self.end)]
        ones = mask.new_ones(len(mask), 1)
        return torch.cat([edges[0], hidden_states, edges[1]], 1), torch.cat([ones, mask, ones], 1), None, None


def make_projector(config: VoxLMConfig) -> nn.Module:
    """The projector that `config.projector_kind` names."""
    return VoxLMConvProjector(config) if config.projector_kind == "conv" else VoxLMProjector(config)
