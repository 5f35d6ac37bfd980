"""
Word times from the reader's cross-attention, for models whose alignment head is not trained.

Some heads of Whisper's decoder follow the audio word by word (Louradour 2023, "whisper-timestamped"; OpenAI's timing.py). Their
attention, normalised as there, takes the place of the alignment head's scores; the same decoder, which models pauses, turns it
into word times.
"""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .decoding_voxlm import DecodedText
from .outputs_voxlm import VoxLMAudioOutput
from .timing_voxlm import AlignmentScores


# Frames of the median filter over time: Whisper's.
MEDIAN_WIDTH = 7


def attention_scores(model, texts: list[DecodedText], audio: VoxLMAudioOutput) -> AlignmentScores:
    """
    Scores of the reader's tokens at the encoder's frames, in the place of those of an alignment head.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader.
        texts (`list[DecodedText]`): of the reader, with `reader_ids`.
        audio ([`VoxLMAudioOutput`]): of the same batch.

    Returns:
        [`AlignmentScores`], `tokens` of shape `(batch, most reader tokens, frames)`.
    """
    reader, device = model.reader, audio.last_hidden_state.device
    rows = [torch.tensor([*reader.prompt_ids, *text.reader_ids], device=device) for text in texts]
    ids, first = pad_sequence(rows, batch_first=True), len(reader.prompt_ids) - 1
    padded = model.config.pad_audio_to_window
    weights = reader.cross_attention(audio.last_hidden_state, audio.frame_mask, ids, alignment_heads(model), padded)
    lengths = audio.frame_mask.sum(-1).tolist()
    frames, most = audio.frame_mask.shape[1], max(len(text.reader_ids) for text in texts)
    tokens = torch.zeros(len(texts), most, frames)
    for row, (text, length) in enumerate(zip(texts, lengths)):
        count = len(text.reader_ids)
        if count:
            # A token's row is that of the position that predicted it; one more, of the end, normalises with them.
            own = weights[row, :, first : first + count + 1, :length].float().cpu().numpy()
            tokens[row, :count, :length] = torch.from_numpy(head_mean(own)[:count])
    pause = torch.zeros(len(texts), frames)
    return AlignmentScores(tokens, pause, torch.zeros_like(pause))


def head_mean(weights: np.ndarray) -> np.ndarray:
    """
    Attention weights `(heads, tokens, frames)` as Whisper makes one matrix `(tokens, frames)` of them: each head's z-scores over
    the tokens, a median filter over time, the mean of the heads.
    """
    deviation = weights.std(axis=1, keepdims=True)
    scores = (weights - weights.mean(axis=1, keepdims=True)) / np.where(deviation == 0, 1, deviation)
    half = MEDIAN_WIDTH // 2
    if scores.shape[2] > half:  # as Whisper has it, shorter clips are left as they are
        padded = np.pad(scores, ((0, 0), (0, 0), (half, half)), mode="reflect")
        scores = np.median(np.lib.stride_tricks.sliding_window_view(padded, MEDIAN_WIDTH, axis=2), axis=-1)
    return scores.mean(axis=0)


def alignment_heads(model) -> list[tuple[int, int]]:
    """Layers and heads that follow the audio: those that the audio model names, else all of the upper half of its layers."""
    named, audio_config = model.config.reader_config["alignment_heads"], model.config.audio_config
    if named:
        return [(layer, head) for layer, head in named]
    layers = range(audio_config.decoder_layers // 2, audio_config.decoder_layers)
    return [(layer, head) for layer in layers for head in range(audio_config.decoder_attention_heads)]
