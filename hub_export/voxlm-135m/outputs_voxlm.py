"""What the network returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast


@dataclass
class VoxLMAudioOutput(BaseModelOutputWithPooling):
    """
    A batch of audio, encoded and projected.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, frames, audio_size)`): encoder states.
        pooler_output (`torch.Tensor` of shape `(batch, projected_frames, text_size)`): input embeddings for the LLM.
        projector_states (`torch.Tensor` of shape `(batch, frames, audio_size)`): what the projector takes: the encoder states
            or, with `projector_encoder_layers`, what so many of the encoder's last layers start from.
        frame_mask (`torch.LongTensor` of shape `(batch, frames)`): 1 for real encoder frames.
        audio_embeds_mask (`torch.LongTensor` of shape `(batch, projected_frames)`): 1 for real projected frames.
        visible_mask (`torch.LongTensor` of shape `(batch, projected_frames)`): 1 for those that the LLM sees: all real
            ones or, with a frame gate, those that pass it and do not repeat the token before them.
        gate_logits (`torch.Tensor` of shape `(batch, projected_frames)`, *optional*): with a frame gate, the log-odds that
            a frame carries a token of speech.
        ctc_states (`torch.Tensor` of shape `(batch, projected_frames, text_size)`, *optional*): with
            `projector_readout="token_mixture"`, the states that are scored against the LLM's token embeddings.
        tokens (`torch.LongTensor` of shape `(batch, projected_frames)`, *optional*): with `"token_mixture"`, the likeliest
            token of each visible frame, -1 elsewhere: greedy CTC.
    """

    projector_states: torch.Tensor | None = None
    frame_mask: torch.Tensor | None = None
    audio_embeds_mask: torch.Tensor | None = None
    visible_mask: torch.Tensor | None = None
    gate_logits: torch.Tensor | None = None
    ctc_states: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass
class VoxLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    [`CausalLMOutputWithPast`] plus the audio side.

    Args:
        audio ([`VoxLMAudioOutput`], *optional*): when this pass had audio to project.
        alignment_loss (`torch.Tensor`, *optional*): the alignment head's part of `loss`, when word times were given.
    """

    audio: VoxLMAudioOutput | None = None
    alignment_loss: torch.Tensor | None = None
