"""Driving audio encoders of any family: lengths, padding, and Whisper's layout on audio shorter than its window."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


# Encoders with Whisper's layout (two convolutions, learned positions, layers), whose own forward insists on a full window.
WINDOWED_ENCODERS = ("whisper", "qwen2_audio_encoder")


@dataclass
class EncoderOutput(BaseModelOutput):
    """
    [`BaseModelOutput`] with what the encoder's last layers start from.

    Args:
        inner_states (`torch.Tensor` of shape `(batch, frames, audio_size)`, *optional*): see `run_encoder`.
    """

    inner_states: torch.Tensor | None = None


def encoder_output_lengths(encoder: nn.Module, lengths: torch.Tensor) -> torch.Tensor:
    """
    Number of encoder frames for `lengths` input features (or samples), by the encoder's own length function.

    Raises:
        ValueError: for an encoder that has none.
    """
    for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
        if hasattr(encoder, name):
            output = getattr(encoder, name)(lengths)
            return (output[-1] if isinstance(output, tuple) else output).long().clamp(min=0)
    raise ValueError(
        f"{type(encoder).__name__} has no length function (_get_feat_extract_output_lengths or "
        "_get_subsampling_output_length), so its number of frames cannot be derived; choose another audio encoder"
    )


def run_encoder(encoder, inputs, mask, last_layers: int = 0, **kwargs) -> EncoderOutput:
    """
    Encoder states for padded inputs; padding leaves real frames unchanged.

    Args:
        encoder (`PreTrainedModel`)
        inputs, mask (`torch.Tensor`): see `VoxLMForSpeechSeq2Seq.encode_audio`.
        last_layers (`int`): of an encoder of Whisper's layout; above 0, the result has the states that so many of its last
            layers start from, too.
        **kwargs: for the encoder, such as `output_hidden_states`.

    Returns:
        [`EncoderOutput`] with `(batch, frames, audio_size)`; values beyond the mask are undefined.
    """
    if encoder.config.model_type in WINDOWED_ENCODERS:
        return windowed_forward(encoder, inputs, attention_mask=mask, last_layers=last_layers, **kwargs)
    if getattr(encoder.config, "feat_extract_norm", None) == "group":
        # GroupNorm's statistics over time would include the padding, so each clip is encoded at its own length.
        rows = [encoder(row[None, : int(length)]).last_hidden_state[0] for row, length in zip(inputs, mask.sum(-1))]
        return EncoderOutput(last_hidden_state=nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return encoder(inputs, attention_mask=mask, **kwargs)


@merge_with_config_defaults
@capture_outputs
def windowed_forward(encoder, input_features, attention_mask, last_layers: int = 0, **kwargs) -> EncoderOutput:
    """
    Drive an encoder of Whisper's layout on audio of any length up to its window, without padding it to the window.

    Args:
        encoder (`PreTrainedModel`): stands for `self`, so that the library captures its hidden states and attentions.
        input_features (`torch.Tensor` of shape `(batch, mels, time)`)
        attention_mask (`torch.LongTensor` of shape `(batch, time)`)
        last_layers (`int`): see `run_encoder`.

    Returns:
        [`EncoderOutput`] with `(batch, frames, audio_size)`; values beyond the mask are undefined.

    Raises:
        ValueError: for audio longer than the encoder's learned positions.
    """
    hidden_states = nn.functional.gelu(encoder.conv1(input_features))
    # In a batch, the frame after the last real one must be the zero that the convolution pads a single clip with.
    hidden_states = hidden_states * attention_mask.unsqueeze(1).to(hidden_states.dtype)
    hidden_states = nn.functional.gelu(encoder.conv2(hidden_states)).transpose(1, 2)
    num_frames, positions = hidden_states.shape[1], encoder.embed_positions.weight
    if num_frames > len(positions):
        raise ValueError(
            f"The audio gives {num_frames} encoder frames, but the encoder has {len(positions)} positions; cut the audio, "
            "or use `model.transcribe`, which splits it at pauses"
        )
    hidden_states = hidden_states + positions[:num_frames]
    hidden_states = nn.functional.dropout(hidden_states, p=encoder.dropout, training=encoder.training)
    attention_mask = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=hidden_states, attention_mask=attention_mask[:, ::2][:, :num_frames]
    )
    inner_states, first_of_last = None, len(encoder.layers) - last_layers
    for number, layer in enumerate(encoder.layers):
        if number == first_of_last:
            inner_states = hidden_states
        hidden_states = layer(hidden_states, attention_mask, **kwargs)
    if hasattr(encoder, "avg_pooler"):
        hidden_states = encoder.avg_pooler(hidden_states.transpose(1, 2)).transpose(1, 2)
    return EncoderOutput(last_hidden_state=encoder.layer_norm(hidden_states), inner_states=inner_states)


def run_last_layers(layers, layer_norm, config, inner_states, mask) -> torch.Tensor:
    """
    States `(batch, frames, audio_size)` after the last layers of an encoder of Whisper's layout.

    Args:
        layers (`nn.ModuleList`), layer_norm (`nn.LayerNorm`): the encoder's last layers and its last normalisation.
        config (`PreTrainedConfig`): of the encoder.
        inner_states (`torch.Tensor` of shape `(batch, frames, audio_size)`): see `run_encoder`.
        mask (`torch.LongTensor` of shape `(batch, frames)`): 1 for real frames.
    """
    attention_mask = create_bidirectional_mask(config=config, inputs_embeds=inner_states, attention_mask=mask)
    for layer in layers:
        inner_states = layer(inner_states, attention_mask)
    return layer_norm(inner_states)
