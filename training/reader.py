"""
Teach a reader (`voxlm_hf.reader_voxlm`) where audio ends when it is not padded, by distillation from itself on the full
window.

On recordings padded with silence to the window, the audio model's decoder stops by itself. Its texts there are the
targets for the same recordings without padding; the learned end frames start as the mean of what the encoder makes of
the silence. No transcripts are needed.
"""

import random

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .data import length_batches


# These were chosen by hand, not tuned.
# Longest text to learn from.
TARGET_TOKENS = 200
# The learning rate falls linearly to this share of its start.
FINAL_SHARE = 0.05
# Steps whose mean loss the progress bar shows.
SHOWN_STEPS = 20


@torch.no_grad()
def decode_full_window(model, waveform: np.ndarray) -> tuple[list[int] | None, torch.Tensor]:
    """
    Decode a recording padded to the full window.

    Returns:
        the text's ids, or `None` where the decoder did not end it by itself, and the encoder's states of the padding
        right after the recording, `(end_frames, audio_size)`, fewer where the window ends before.
    """
    processor = model.processor
    window = np.zeros(int(processor.audio_window_s * processor.sampling_rate), np.float32)
    window[: len(waveform)] = waveform
    audio = model.encode_audio(**processor.extract_features([window]))
    inputs = (audio.last_hidden_state, audio.frame_mask, [TARGET_TOKENS])
    (hypotheses,) = functional_call(model.reader, {"end": model.reader.end[:0]}, inputs)
    first = -(-len(waveform) // round(processor.frame_s * processor.sampling_rate))
    silence = audio.last_hidden_state[0, first : first + len(model.reader.end)]
    return (hypotheses[0].ids if hypotheses[0].ended else None), silence


def make_examples(
    model, waveforms: list[np.ndarray]
) -> tuple[list[tuple[torch.Tensor, list[int]]], list[torch.Tensor]]:
    """
    What a reader learns from.

    Returns:
        `(frames, audio_size)` encoder states without padding and the target ids, for each recording that the decoder
        ends by itself on the full window; and the states of the padding, `(end_frames, audio_size)`, of those of them
        whose padding is long enough.
    """
    reader, examples, silences = model.reader, [], []
    for waveform in tqdm(waveforms, desc="full windows", unit="clip"):
        ids, silence = decode_full_window(model, waveform)
        if ids is None:
            continue
        with torch.no_grad():
            states = model.encode_audio(**model.processor.extract_features([waveform])).last_hidden_state[0]
        examples.append((states, reader.prompt_ids + ids + [reader.eos_token_id]))
        if len(silence) == len(reader.end):
            silences.append(silence)
    return examples, silences


def train_reader(
    model,
    waveforms: list[np.ndarray],
    steps: int = 300,
    learning_rate: float = 3e-3,
    frames_per_batch: int = 6000,
    seed: int = 0,
) -> list[float]:
    """
    Train `model.reader.end` in place. The defaults were chosen by hand, not tuned.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader, and its processor.
        waveforms (`list[np.ndarray]`): each `(samples,)`, shorter than the window.

    Returns:
        the loss per token of each step.

    Raises:
        ValueError: when the decoder ends no text by itself.
    """
    reader = model.reader
    examples, silences = make_examples(model, waveforms)
    if not examples or not silences:
        raise ValueError(
            f"Of {len(waveforms)} recordings the reader ends {len(examples)} texts by itself: none to learn from"
        )
    with torch.no_grad():
        reader.end.copy_(torch.stack(silences).mean(0))
    reader.end.requires_grad_(True)
    optimizer = torch.optim.Adam([reader.end], learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, FINAL_SHARE, steps)
    drawn, losses = random.Random(seed), []
    batches = list(length_batches({n: len(states) for n, (states, _) in enumerate(examples)}, frames_per_batch))
    for _ in (progress := tqdm(range(steps), desc="reader", unit="step")):
        loss = reader_loss(reader, [examples[number] for number in drawn.choice(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(), schedule.step()
        losses.append(float(loss.detach()))
        progress.set_postfix(loss=f"{np.mean(losses[-SHOWN_STEPS:]):.4f}", refresh=False)
    return losses


def reader_loss(reader, batch: list[tuple[torch.Tensor, list[int]]]) -> torch.Tensor:
    """Cross-entropy per token, the prompt left out, of one batch of `make_examples`."""
    ids = pad_sequence([torch.tensor(text) for _, text in batch], batch_first=True, padding_value=-100)
    mask = pad_sequence([torch.ones(len(states), dtype=torch.long) for states, _ in batch], batch_first=True)
    states = pad_sequence([states for states, _ in batch], batch_first=True)
    logits = reader.teacher_force(states, mask, ids[:, :-1].clamp(min=0))
    targets = ids[:, 1:].clone()
    targets[:, : len(reader.prompt_ids) - 1] = -100
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
