"""
Teach a reader (`voxlm_hf.reader_voxlm`) where audio ends when it is not padded, by distillation from itself on the full
window.

On recordings padded with silence to the window, the audio model's decoder stops by itself. Its texts there are the
targets for the same recordings without padding; end frames that have learned nothing yet start as the mean of what the
encoder makes of the silence. No transcripts are needed.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .data import READ_ERRORS, Row, print_skipped
from .features import TensorStore, audio_key, encode, weights_key
from .trainer import StageTrainer


# These were chosen by hand, not tuned.
# Longest text to learn from.
TARGET_TOKENS = 200
# Recordings that are decoded together, whose examples an interrupted run loses at most.
EXAMPLES_PER_SHARD = 16
# Audio that the encoder takes at once without padding to the window.
SECONDS_PER_BATCH = 60.0
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
def decode_full_windows(model, waveforms: list[np.ndarray]) -> list[tuple[list[int] | None, torch.Tensor]]:
    """
    Decode recordings padded to the full window.

    Returns:
        of each, the text's ids, or `None` where the decoder did not end it by itself, and the encoder's states of the
        padding right after the recording, `(end_frames, audio_size)`, fewer where the window ends before.
    """
    processor = model.processor
    windows = [np.zeros(int(processor.audio_window_s * processor.sampling_rate), np.float32) for _ in waveforms]
    for window, waveform in zip(windows, waveforms):
        window[: len(waveform)] = waveform
    audio = model.encode_audio(**processor.extract_features(windows))
    budgets = [TARGET_TOKENS] * len(windows)
    found = []
    for number, (best, *_) in enumerate(model.reader(audio.last_hidden_state, audio.frame_mask, budgets, padded=True)):
        first = -(-len(waveforms[number]) // round(processor.frame_s * processor.sampling_rate))
        silence = audio.last_hidden_state[number, first : first + len(model.reader.end)]
        found.append((best.ids if best.ended else None, silence))
    return found


@torch.no_grad()
def examples_of(model, waveforms: list[np.ndarray]) -> list[dict[str, torch.Tensor]]:
    """
    What a reader learns from each recording: "states", the encoder's without padding, `(frames, audio_size)`; "ids", the
    decoder's prompt, the text and its end; and "silence" (see `decode_full_windows`). Empty where the decoder did not
    end the text by itself.
    """
    reader = model.reader
    decoded = decode_full_windows(model, waveforms) if waveforms else []
    ended = {number: waveforms[number] for number, (ids, _) in enumerate(decoded) if ids is not None}
    states = encode(model, model.processor, ended, SECONDS_PER_BATCH)
    examples: list[dict[str, torch.Tensor]] = [{} for _ in waveforms]
    for number in ended:
        ids, silence = decoded[number]
        # On the CPU, as the rows of any dataset.
        ids = torch.tensor(reader.prompt_ids + ids + [reader.eos_token_id], device="cpu")
        examples[number] = {"states": states[number], "ids": ids, "silence": silence.cpu()}
    return examples


class ReaderExamples(torch.utils.data.Dataset):
    """
    What a reader learns from, in a folder of shards, so that a run that was killed continues with them.

    Args:
        store ([`TensorStore`]): tensors KEY.states, KEY.ids and KEY.silence of `examples_of`.
        keys (`list[str]`): of the recordings that have an example.
    """

    def __init__(self, store: TensorStore, keys: list[str]):
        self.store, self.keys = store, keys

    @property
    def lengths(self) -> list[int]:
        """Encoder frames of each example."""
        return [self.store.frames(f"{key}.states") for key in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: self.store[f"{self.keys[index]}.{name}"] for name in ("states", "ids")}

    def mean_silence(self, frames: int) -> torch.Tensor:
        """
        The mean of the encoder's states of the first frames after a recording, `(frames, audio_size)`.

        Raises:
            ValueError: when no recording has so much padding.
        """
        silences = [self.store[f"{key}.silence"] for key in self.keys]
        long_enough = [silence for silence in silences if len(silence) == frames]
        if not long_enough:
            raise ValueError(
                f"The reader ends the texts of {len(self.keys)} recordings by itself, and after none of them is there "
                f"room for {frames} frames: nothing to learn from"
            )
        return torch.stack(long_enough).mean(0)


def make_examples(model, rows: list[Row], folder: Path) -> ReaderExamples:
    """
    Decode recordings on the full window, on the model's device; several processes share the work. What `folder` has of the
    same recordings, by an earlier run with the same audio model and as many end frames, is kept.
    """
    processes, store = PartialState(), TensorStore(folder)
    teacher = f"{weights_key(model.encoder)}-{weights_key(model.reader.decoder)}-{len(model.reader.end)}"
    keys: dict[str, Row] = {}  # the same recording may be there twice
    for row in rows:
        try:
            keys.setdefault(f"{teacher}-{audio_key(row.audio)}", row)
        except READ_ERRORS as error:
            print_skipped(row, error)
    done = {name.partition(".")[0] for name in store.files}
    mine = [key for key in list(keys)[processes.process_index :: processes.num_processes] if key not in done]
    hidden = not mine or not processes.is_local_main_process
    blocks = range(0, len(mine), EXAMPLES_PER_SHARD)
    for first in tqdm(blocks, desc="full windows", unit=f"{EXAMPLES_PER_SHARD} clips", disable=hidden):
        waveforms, found = {}, {}
        for key in mine[first : first + EXAMPLES_PER_SHARD]:
            try:
                waveforms[key] = model.processor.load_audio(keys[key].audio)
            except READ_ERRORS as error:
                print_skipped(keys[key], error)
        examples = dict(zip(waveforms, examples_of(model, list(waveforms.values()))))
        for key in mine[first : first + EXAMPLES_PER_SHARD]:
            # A recording without an example is remembered too.
            example = examples.get(key) or {"none": torch.zeros(0, device="cpu")}
            found.update({f"{key}.{name}": tensor for name, tensor in example.items()})
        store.add(found)
    processes.wait_for_everyone()
    store.refresh()
    return ReaderExamples(store, [key for key in keys if f"{key}.states" in store])


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
        fresh (`bool`): whether its end has not been trained: it then starts as the mean silence of the recordings.
    """

    def __init__(self, *, reader, train_dataset: ReaderExamples, fresh: bool, **kwargs):
        if fresh:
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
