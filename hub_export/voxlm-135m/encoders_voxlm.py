"""Driving audio encoders of any family: lengths, padding, and Whisper's layout on audio shorter than its window."""

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


# Encoders with Whisper's layout (two convolutions, learned positions, layers), whose own forward insists on a full window.
WINDOWED_ENCODERS = ("whisper", "qwen2_audio_encoder")


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


def run_encoder(encoder, inputs, mask, **kwargs) -> BaseModelOutput:
    """
    Encoder states for padded inputs; padding leaves real frames unchanged.

    Args:
        encoder (`PreTrainedModel`)
        inputs, mask (`torch.Tensor`): see `VoxLMForSpeechSeq2Seq.encode_audio`.
        **kwargs: for the encoder, such as `output_hidden_states`.

    Returns:
        [`BaseModelOutput`] with `(batch, frames, audio_size)`; values beyond the mask are undefined.
    """
    if encoder.config.model_type in WINDOWED_ENCODERS:
        return windowed_forward(encoder, inputs, attention_mask=mask, **kwargs)
    if getattr(encoder.config, "feat_extract_norm", None) == "group":
        # GroupNorm's statistics over time would include the padding, so each clip is encoded at its own length.
        rows = [encoder(row[None, : int(length)]).last_hidden_state[0] for row, length in zip(inputs, mask.sum(-1))]
        return BaseModelOutput(last_hidden_state=nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return encoder(inputs, attention_mask=mask, **kwargs)


@merge_with_config_defaults
@capture_outputs
def windowed_forward(encoder, input_features, attention_mask, **kwargs) -> BaseModelOutput:
    """
    Drive an encoder of Whisper's layout on audio of any length up to its window, without padding it to the window.

    Args:
        encoder (`PreTrainedModel`): stands for `self`, so that the library captures its hidden states and attentions.
        input_features (`torch.Tensor` of shape `(batch, mels, time)`)
        attention_mask (`torch.LongTensor` of shape `(batch, time)`)

    Returns:
        [`BaseModelOutput`] with `(batch, frames, audio_size)`; values beyond the mask are undefined.

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
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, attention_mask, **kwargs)
    if hasattr(encoder, "avg_pooler"):
        hidden_states = encoder.avg_pooler(hidden_states.transpose(1, 2)).transpose(1, 2)
    return BaseModelOutput(last_hidden_state=encoder.layer_norm(hidden_states))
