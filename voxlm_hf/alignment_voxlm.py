"""Alignment heads: scores of text against encoder frames, from which `timing_voxlm` decodes word times."""

import math

import torch
from torch import nn

from .outputs_voxlm import VoxLMAudioOutput
from .timing_voxlm import AlignmentScores
from .words_voxlm import plain_words


# Of a byte that is no part of a text.
NO_BYTE = 0


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


def spell_words(words: list[str]) -> tuple[list[int], list[int]]:
    """
    The bytes in UTF-8 of words without capitals and punctuation, separated by spaces, as a speaker leaves both out; and the
    index of each byte's word, -1 for the spaces between words.
    """
    ids, owners = [], []
    for number, word in enumerate(plain_words(words)):
        if number:
            ids.append(ord(" "))
            owners.append(-1)
        spelt = list(word.encode())
        ids += spelt
        owners += [number] * len(spelt)
    return ids, owners


class VoxLMFrameKeys(nn.Module):
    """
    What alignment heads share: the encoder's own frames (50 Hz for Whisper, whose states encode their position) as keys, with
    convolutions over neighbouring frames, and each frame's scores for being a pause and for being the first of a word.
    """

    frames_per_key = 1
    # A token's state is the one that predicted it, not the one at it.
    states_at_tokens = False

    def __init__(self, audio_size: int, hidden_size: int, num_blocks: int):
        super().__init__()
        self.frame_norm = nn.LayerNorm(audio_size)
        self.frame_proj = nn.Linear(audio_size, hidden_size)
        self.blocks = nn.ModuleList([VoxLMConvNeXtBlock(hidden_size, 9, 2) for _ in range(num_blocks)])
        self.key_norm = nn.LayerNorm(hidden_size)
        self.frame_scores = nn.Linear(hidden_size, 2)

    def keys_of(self, audio: VoxLMAudioOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """The frames that `forward` takes and their mask: the encoder's."""
        return audio.last_hidden_state, audio.frame_mask

    def score(self, queries, frames, frame_mask) -> AlignmentScores:
        """
        Scores of queries `(batch, queries, hidden_size)` at each frame, unnormalised and in float32.

        Args:
            frames (`torch.Tensor` of shape `(batch, frames, audio_size)`): encoder states.
            frame_mask (`torch.Tensor` of shape `(batch, frames)`): 1 for real frames.
        """
        mask = frame_mask.unsqueeze(-1).to(queries.dtype)
        keys = self.frame_proj(self.frame_norm(frames.to(queries.dtype)))
        for block in self.blocks:
            keys = block(keys, mask)
        keys = self.key_norm(keys)
        scores = queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        pause, onset = self.frame_scores(keys).float().unbind(-1)
        return AlignmentScores(scores.float(), pause, onset)


class VoxLMAlignmentHead(VoxLMFrameKeys):
    """
    Scores every encoder frame against every text token, for being a pause, and for being the first of a word.

    A token's query is the LLM's hidden state that predicted it, so the pass that generated the text can be used, plus the
    embedding of the token itself.
    """

    from_spelling = False

    def __init__(self, text_size: int, audio_size: int, hidden_size: int, num_blocks: int):
        super().__init__(audio_size, hidden_size, num_blocks)
        self.state_norm = nn.LayerNorm(text_size)
        self.state_proj = nn.Linear(text_size, hidden_size)
        self.token_proj = nn.Linear(text_size, hidden_size, bias=False)

    def forward(self, text_states, token_embeds, frames, frame_mask) -> AlignmentScores:
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
        return self.score(queries, frames, frame_mask)


class VoxLMSpellingAlignmentHead(VoxLMFrameKeys):
    """
    Scores every encoder frame against every letter of the text (`spell_words`), for being a pause, and for being the first
    of a word.

    Knows nothing of the LLM, so that word times do not depend on which LLM judged the text, on its prompt, or on whether one
    did; letters, unlike tokens, are shared by rare and frequent words. Queries are embedded bytes with convolutions over their
    neighbours.
    """

    from_spelling = True

    def __init__(self, audio_size: int, hidden_size: int, num_blocks: int):
        super().__init__(audio_size, hidden_size, num_blocks)
        self.spelling = nn.Embedding(256, hidden_size)
        self.text_norm = nn.LayerNorm(hidden_size)
        self.text_blocks = nn.ModuleList([VoxLMConvNeXtBlock(hidden_size, 9, 2) for _ in range(num_blocks)])
        self.query_norm = nn.LayerNorm(hidden_size)

    def forward(self, spelling, frames, frame_mask) -> AlignmentScores:
        """
        Args:
            spelling (`torch.LongTensor` of shape `(batch, bytes)`): of `spell_words`, padded with `NO_BYTE`.
            frames (`torch.Tensor` of shape `(batch, frames, audio_size)`): encoder states.
            frame_mask (`torch.Tensor` of shape `(batch, frames)`): 1 for real frames.

        Returns:
            [`AlignmentScores`] with one row of `tokens` for each byte, unnormalised and in float32.
        """
        dtype = self.frame_proj.weight.dtype
        queries, text_mask = self.text_norm(self.spelling(spelling)), (spelling != NO_BYTE).unsqueeze(-1).to(dtype)
        for block in self.text_blocks:
            queries = block(queries, text_mask)
        return self.score(self.query_norm(queries), frames, frame_mask)
