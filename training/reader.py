"""
Teach a reader (`voxlm_hf.reader_voxlm`) where audio ends when it is not padded, by distillation from itself on the full
window.

On recordings padded with silence to the window, the audio model's decoder stops by itself. Its texts there are the
targets for the same recordings without padding; the learned end frames start as the mean of what the encoder makes of
the silence. No transcripts are needed.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .data import READ_ERRORS, Row, print_skipped
from .features import TensorStore
from .trainer import StageTrainer


# These were chosen by hand, not tuned.
# Longest text to learn from.
TARGET_TOKENS = 200
# Recordings whose examples an interrupted run loses at most.
EXAMPLES_PER_SHARD = 16
# Arguments of the Trainer, which a recipe may override: Adam, whose learning rate falls linearly to a share of its start.
ARGUMENTS = {
    "max_steps": 300,
    "learning_rate": 3e-3,
    "max_grad_norm": 0.0,
    "warmup_steps": 0,
    "eval_strategy": "no",
    "save_steps": 50,
}
FINAL_SHARE = 0.05


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


@torch.no_grad()
def make_example(model, waveform: np.ndarray) -> dict[str, torch.Tensor]:
    """
    What a reader learns from one recording: "states", the encoder's without padding, `(frames, audio_size)`; "ids", the
    decoder's prompt, the text and its end; and "silence" (see `decode_full_window`). Empty where the decoder did not end
    the text by itself.
    """
    reader = model.reader
    ids, silence = decode_full_window(model, waveform)
    if ids is None:
        return {}
    states = model.encode_audio(**model.processor.extract_features([waveform])).last_hidden_state[0]
    # On the CPU, as the rows of any dataset.
    ids = torch.tensor(reader.prompt_ids + ids + [reader.eos_token_id], device="cpu")
    return {"states": states.cpu(), "ids": ids, "silence": silence.cpu()}


class ReaderExamples(torch.utils.data.Dataset):
    """
    What a reader learns from, in a folder of shards, so that a run that was killed continues with them.

    Args:
        store ([`TensorStore`]): tensors NUMBER.states, NUMBER.ids and NUMBER.silence of `make_example`.
        numbers (`list[int]`): of the recordings that have an example.
    """

    def __init__(self, store: TensorStore, numbers: list[int]):
        self.store, self.numbers = store, numbers

    @property
    def lengths(self) -> list[int]:
        """Encoder frames of each example."""
        return [self.store.frames(f"{number}.states") for number in self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: self.store[f"{self.numbers[index]}.{name}"] for name in ("states", "ids")}

    def mean_silence(self, frames: int) -> torch.Tensor:
        """
        The mean of the encoder's states of the first frames after a recording, `(frames, audio_size)`.

        Raises:
            ValueError: when no recording has so much padding.
        """
        silences = [self.store[f"{number}.silence"] for number in self.numbers]
        long_enough = [silence for silence in silences if len(silence) == frames]
        if not long_enough:
            raise ValueError(
                f"The reader ends the texts of {len(self.numbers)} recordings by itself, and after none of them is there "
                f"room for {frames} frames: nothing to learn from"
            )
        return torch.stack(long_enough).mean(0)


def make_examples(model, rows: list[Row], folder: Path) -> ReaderExamples:
    """
    Decode recordings on the full window, on the model's device; several processes share the work. What `folder` has of an
    earlier run is kept.
    """
    processes, store = PartialState(), TensorStore(folder)
    done = {name.partition(".")[0] for name in store.files}
    share = range(processes.process_index, len(rows), processes.num_processes)
    mine = [number for number in share if str(number) not in done]
    hidden = not mine or not processes.is_local_main_process
    blocks = range(0, len(mine), EXAMPLES_PER_SHARD)
    for first in tqdm(blocks, desc="full windows", unit=f"{EXAMPLES_PER_SHARD} clips", disable=hidden):
        found = {}
        for number in mine[first : first + EXAMPLES_PER_SHARD]:
            try:
                example = make_example(model, model.processor.load_audio(rows[number].audio))
            except READ_ERRORS as error:
                print_skipped(rows[number], error)
                example = {}
            # A recording without an example is remembered too.
            example = example or {"none": torch.zeros(0, device="cpu")}
            found.update({f"{number}.{name}": tensor for name, tensor in example.items()})
        store.add(found)
    processes.wait_for_everyone()
    store.refresh()
    return ReaderExamples(store, [number for number in range(len(rows)) if f"{number}.states" in store])


class ReaderDistillation(nn.Module):
    """The reader with its loss: one module with one `forward`, so that data-parallel wrappers see all that it computes."""

    # The Trainer then counts the target tokens of accumulated batches.
    accepts_loss_kwargs = True

    def __init__(self, reader: nn.Module):
        super().__init__()
        self.reader = reader

    def forward(self, audio_states, audio_states_mask, decoder_input_ids, labels) -> torch.Tensor:
        """`(batch,)` cross-entropies, summed over the tokens of each text."""
        logits = self.reader.teacher_force(audio_states, audio_states_mask, decoder_input_ids)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return losses.sum(1)


class ReaderTrainer(StageTrainer):
    """
    [`StageTrainer`] of the end that a reader learns.

    Args:
        reader ([`VoxLMReader`]), train_dataset ([`ReaderExamples`])
    """

    def __init__(self, *, reader, train_dataset: ReaderExamples, **kwargs):
        with torch.no_grad():
            reader.end.copy_(train_dataset.mean_silence(len(reader.end)))
        reader.requires_grad_(False)
        reader.end.requires_grad_(True)
        self.prompt_length = len(reader.prompt_ids)
        super().__init__(
            model=ReaderDistillation(reader), train_dataset=train_dataset, data_collator=self.collate, **kwargs
        )

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Examples as a padded batch; each position of `labels` is what follows that of `decoder_input_ids`."""
        ids = pad_sequence([row["ids"] for row in rows], batch_first=True, padding_value=-100)
        labels = ids[:, 1:].clone()
        labels[:, : self.prompt_length - 1] = -100
        masks = [torch.ones(len(row["states"]), dtype=torch.long) for row in rows]
        return {
            "audio_states": pad_sequence([row["states"] for row in rows], batch_first=True),
            "audio_states_mask": pad_sequence(masks, batch_first=True),
            "decoder_input_ids": ids[:, :-1].clamp(min=0),
            "labels": labels,
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = model(**inputs)
        loss = self.with_all_parameters(model, self.scaled(losses, inputs, num_items_in_batch))
        return (loss, losses) if return_outputs else loss
