"""
Teach a reader (`voxlm_hf.reader_voxlm`) where bare audio ends, by distillation from itself on the full window.

On recordings padded with silence to the window the audio model's decoder stops by itself. Its texts there are the targets for the same
recordings without padding, and what the encoder makes of the silence, on average, is what the learned frames begin as. No transcripts
are needed.
"""

import random

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .data import length_batches


# Longest text that is learnt from.
TARGET_TOKENS = 200


@torch.no_grad()
def window_reading(model, waveform: np.ndarray) -> tuple[list[int] | None, torch.Tensor]:
    """
    What the decoder writes when it sees the full window, `None` where it does not end by itself, and the encoder's states
    `(end_frames, audio_size)` behind the recording, fewer where the window ends before.
    """
    processor = model.processor
    window = np.zeros(int(processor.audio_window_s * processor.sampling_rate), np.float32)
    window[: len(waveform)] = waveform
    inputs, _ = processor._process_audio([window])
    audio = model.get_audio_features(**inputs)
    inputs = (audio.last_hidden_state, audio.frame_mask, [TARGET_TOKENS])
    (readings,) = functional_call(model.reader, {"end": model.reader.end[:0]}, inputs)
    first = -(-len(waveform) // round(processor.frame_s * processor.sampling_rate))
    silence = audio.last_hidden_state[0, first : first + len(model.reader.end)]
    return (readings[0].ids if readings[0].ended else None), silence


def train_reader(
    model,
    waveforms: list[np.ndarray],
    steps: int = 300,
    learning_rate: float = 3e-3,
    frames_per_batch: int = 6000,
    seed: int = 0,
) -> list[float]:
    """
    Train `model.reader.end` in place.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader, and its processor.
        waveforms (`list[np.ndarray]`): each `(samples,)`, shorter than the window.

    Returns:
        the loss per token of each step.

    Raises:
        ValueError: when the decoder ends no text by itself.
    """
    reader, examples, silences = model.reader, [], []
    for waveform in tqdm(waveforms, desc="full windows", unit="clip"):
        ids, silence = window_reading(model, waveform)
        if ids is None:
            continue
        with torch.no_grad():
            inputs, _ = model.processor._process_audio([waveform])
            states = model.get_audio_features(**inputs).last_hidden_state[0]
        examples.append((states, reader.prompt_ids + ids + [reader.eos_token_id]))
        if len(silence) == len(reader.end):
            silences.append(silence)
    if not examples or not silences:
        raise ValueError(
            f"Of {len(waveforms)} recordings the reader ends {len(examples)} texts by itself: none to learn from"
        )
    with torch.no_grad():
        reader.end.copy_(torch.stack(silences).mean(0))
    reader.end.requires_grad_(True)
    optimizer = torch.optim.Adam([reader.end], learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    drawn, losses = random.Random(seed), []
    batches = list(length_batches({n: len(states) for n, (states, _) in enumerate(examples)}, frames_per_batch))
    for _ in (progress := tqdm(range(steps), desc="reader", unit="step")):
        batch = [examples[number] for number in drawn.choice(batches)]
        ids = pad_sequence([torch.tensor(text) for _, text in batch], batch_first=True, padding_value=-100)
        mask = pad_sequence([torch.ones(len(states), dtype=torch.long) for states, _ in batch], batch_first=True)
        states = pad_sequence([states for states, _ in batch], batch_first=True)
        logits = reader.teacher_forced(states, mask, ids[:, :-1].clamp(min=0))
        targets = ids[:, 1:].clone()
        targets[:, : len(reader.prompt_ids) - 1] = -100
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(), schedule.step()
        losses.append(float(loss.detach()))
        progress.set_postfix(loss=f"{np.mean(losses[-20:]):.4f}", refresh=False)
    return losses
