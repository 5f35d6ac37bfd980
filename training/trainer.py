"""transformers' Trainer for the stages of a recipe, and with what transcription and alignment need."""

from pathlib import Path

import jiwer
import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalPrediction
from transformers.utils import SAFE_WEIGHTS_NAME

from voxlm_hf.decoding_voxlm import pack_inputs
from voxlm_hf.generation_voxlm import FEATURES
from voxlm_hf.outputs_voxlm import VoxLMAudioOutput
from voxlm_hf.timing_voxlm import word_times

from .checkpoints import (
    check_shapes,
    last_whole_checkpoint,
    naming_unwritten_files,
    remove_checkpoints_after,
    shapes_of,
)
from .data import LengthBatchSampler
from .streaming import SpeechStream


def trained_share(model) -> str:
    """A summary to print: trained parameters of each part of the model, and their share of all."""
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = []
    for name, part in model.named_children():
        trained = sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        if trained:
            lines.append(f"  {name}: {trained:,} of {sum(parameter.numel() for parameter in part.parameters()):,}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"trained: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)\n" + "\n".join(lines)


def leave_out_hidden_frames(model, inputs: dict) -> dict:
    """
    The same batch without the placeholders of frames that the projector's gate hides from the LLM: a third of the work,
    the same loss.

    Args:
        inputs: of the model's `forward`, with `labels` and `audio_states`.
    """
    audio = model.project(inputs["audio_states"], inputs["audio_states_mask"])
    columns = {name: (inputs[name], -100) for name in ("labels", "token_words") if name in inputs}
    return {**inputs, **pack_inputs(model, audio, inputs["input_ids"], inputs["attention_mask"], **columns)}


def encoded_once(model, inputs: dict) -> dict:
    """The same batch with `audio_states` in the place of features, so that several passes share one of the encoder."""
    features = {name: value for name, value in inputs.items() if name in FEATURES}
    if not features:
        return inputs
    audio = model.encode_audio(**features)
    states = {"audio_states": audio.projector_states, "audio_states_mask": audio.frame_mask}
    return {**{name: value for name, value in inputs.items() if name not in FEATURES}, **states}


class StageTrainer(Trainer):
    """
    [`Trainer`] for one stage of a recipe: batches are limited by their frames, checkpoints hold only what is trained, and
    a run that was killed at any moment resumes exactly.

    Args:
        train_dataset ([`SpeechDataset`] or [`SpeechStream`], or any dataset with `lengths`)
        frames_per_batch (`float`): frames in one batch of one process, padding included; replaces
            `per_device_train_batch_size`.
    """

    def __init__(self, *args, frames_per_batch: float, **kwargs):
        self.frames_per_batch = frames_per_batch
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of rows of similar length."""
        arguments, streamed = self.args, isinstance(self.train_dataset, SpeechStream)
        if streamed:
            share = (arguments.process_index, arguments.world_size)
            sampler = self.train_dataset.batches(self.frames_per_batch, arguments.seed, share)
        else:
            lengths, processes = self.train_dataset.lengths, arguments.world_size
            sampler = LengthBatchSampler(lengths, self.frames_per_batch, arguments.seed, multiple=processes)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            # Of its own, so that starting the workers of a resumed run takes no number from the model's generator.
            generator=torch.Generator().manual_seed(arguments.seed),
        )
        if streamed:
            return loader  # each process has its own rows already
        # Only here: batches have other numbers of rows, and evaluation needs the same number in all processes.
        even, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.even_batches = even

    def resume(self):
        """
        Train from the last whole checkpoint in the stage's folder, or from the beginning.

        Prints a line about damaged checkpoints, which are removed.
        """
        folder = Path(self.args.output_dir)
        last, damages = last_whole_checkpoint(folder, self.args)
        # Nobody removes anything before all have looked.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero() and damages:
            start = f"from {last.name}" if last else "from the beginning"
            print(f"cannot resume from {'; '.join(damages)}; continues {start}")
            remove_checkpoints_after(folder, last)
        self.accelerator.wait_for_everyone()
        try:
            return self.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            # accelerate gave the model a forward in mixed precision, and would leave it to the next stage as it is.
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                self.model.__dict__.pop(name, None)

    def _run_epoch(self, *args, **kwargs):
        """As in [`Trainer`], which would take one step more after the checkpoint of the last step: that is only loaded."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        """As in [`Trainer`]; a module that is no [`PreTrainedModel`] saves only what is trained."""
        if state_dict is None and not isinstance(self.model, PreTrainedModel):
            trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            state_dict = {name: tensor for name, tensor in self.model.state_dict().items() if name in trained}
        with naming_unwritten_files([], Path(output_dir or self.args.output_dir) / "model.safetensors"):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial):
        """As in [`Trainer`], without the frozen weights; `save_model` and `save_pretrained` still save all of them."""
        if not isinstance(self.model, PreTrainedModel):
            return super()._save_checkpoint(model, trial)
        frozen = [
            name.replace(".base_layer.", ".")
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad
        ]
        self.model._keys_to_ignore_on_save = frozen
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.model._keys_to_ignore_on_save = None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As in [`Trainer`], but says what differs from what this stage trains; does not look at sharded weights."""
        path = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        if path.is_file():
            shapes = {
                name: tuple(tensor.shape) for name, tensor in self.model.named_parameters() if tensor.requires_grad
            }
            buffers = [name for name, _ in self.model.named_buffers(remove_duplicate=False)]
            with safe_open(path, "pt") as weights:
                check_shapes(path.parent, shapes_of(weights), shapes, buffers)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        """In place of the library's warning: frozen weights are missing on purpose, trained ones must not be."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if missing := sorted(trained.intersection(load_result.missing_keys)):
            raise ValueError(
                f"The checkpoint in {self.args.output_dir} lacks what this stage trains, such as {missing[0]}; was the "
                "recipe changed? Remove the checkpoint, or choose another `output`"
            )

    def _save_rng_state(self, output_dir):
        """As in [`Trainer`]; older checkpoints are removed only after all processes have saved theirs."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def scaled(self, losses, inputs, num_items_in_batch, at_least: int = 1) -> torch.Tensor:
        """
        The loss of one batch, such that those of all processes and of all accumulated batches add up to the mean per
        target token.

        Args:
            losses (`torch.Tensor` of shape `(batch,)`): summed over the target tokens of each row.
            inputs (`dict`): with `labels`, -100 where there is no target.
            num_items_in_batch: target tokens of all these batches; `None` in evaluation, which looks at one.
            at_least (`int`): the least number of tokens to divide by.
        """
        count = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        processes = self.accelerator.num_processes if num_items_in_batch is not None else 1
        return losses.sum() * processes / count.clamp(min=at_least)

    def encoded_with_loss(self, voxlm, model, inputs) -> tuple[dict, torch.Tensor]:
        """A batch of evaluation on the device, its audio encoded once by `voxlm`, and its loss."""
        inputs = encoded_once(voxlm, self._prepare_inputs(inputs))
        with self.compute_loss_context_manager():
            return inputs, self.compute_loss(model, inputs).detach()

    def with_all_parameters(self, model, loss):
        """
        The same loss with a gradient, at least of 0, for every parameter that is trained: a batch need not have all that
        the stage learns from (no word has times in silence), and processes with other batches wait for all gradients.
        """
        if self.is_fsdp_enabled or not torch.is_grad_enabled():
            return loss
        return loss + 0.0 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)


class VoxLMTrainer(StageTrainer):
    """
    [`StageTrainer`] for [`VoxLMForSpeechSeq2Seq`] on a [`SpeechDataset`], collated by its processor.

    Evaluation generates the text from the prompt alone and reports WER, CER and the share of texts that end with eos.

    Args:
        processor ([`VoxLMProcessor`]): of the model.
        seconds_per_batch (`float`): audio in one batch of one process, padding included.
        state_noise (`float`): largest standard deviation of the noise that training adds to the encoder states (each
            row draws its own; in units of each feature's own deviation), so that the projector makes the errors that it
            makes on new recordings and the LLM learns to cope with them.
        max_new_tokens (`int`): token budget of a text in evaluation; the default was chosen by hand, not tuned.
    """

    def __init__(self, *args, processor, seconds_per_batch: float, state_noise=0.0, max_new_tokens=200, **kwargs):
        self.processor = processor
        self.max_new_tokens, self.state_noise = max_new_tokens, state_noise
        # Since the last line of the log: the first step, and the sum of its batches' and the following ones' losses.
        self.first_step, self.alignment_loss = None, None
        kwargs.setdefault("compute_metrics", self.text_metrics)
        super().__init__(*args, frames_per_batch=seconds_per_batch / processor.frame_s, **kwargs)

    def train(self, *args, **kwargs):
        """As [`Trainer.train`], with noise on the encoder states; a trained model adds none."""
        hook = self.model.projector.register_forward_pre_hook(
            lambda projector, inputs: noise_hook(projector, inputs, self.state_noise)
        )
        try:
            return super().train(*args, **kwargs)
        finally:
            hook.remove()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        alone = self.accelerator.distributed_type == DistributedType.NO
        if alone and "audio_states" in inputs and model.projector.gate is not None:
            inputs = leave_out_hidden_frames(model, inputs)
        if model.training:
            # Logits are needed for the text alone, which is at the end of every row.
            first = int((inputs["labels"] != -100).any(0).int().argmax())
            inputs = {**inputs, "logits_to_keep": inputs["labels"].shape[1] - first + 1, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = self.with_all_parameters(model, loss)
        if model.training and self.first_step is None:
            self.first_step = self.state.global_step
        if model.training and outputs.alignment_loss is not None:
            # Each batch has a share of its step's loss: its tokens are counted over all batches and processes.
            self.alignment_loss = outputs.alignment_loss.detach() + (
                0 if self.alignment_loss is None else self.alignment_loss
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """As in [`Trainer`]; next to the loss of the steps since the last time, what the alignment head has of it."""
        if "loss" in logs and self.first_step is not None:
            found = torch.zeros(2, device=self.args.device)
            if self.alignment_loss is not None:
                found = torch.stack([self.alignment_loss.float(), torch.ones_like(found[0])])
            how = "sum" if self.args.average_tokens_across_devices else "mean"
            total, known = self.accelerator.reduce(found, how).tolist()
            if known:
                logs["alignment_loss"] = total / (self.state.global_step - self.first_step)
            self.first_step, self.alignment_loss = None, None
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        Loss of the reference text; the text that the LLM writes from the prompt alone, without the reader; and the word-time errors on
        the reference text.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        inputs, loss = self.encoded_with_loss(unwrapped, model, inputs)
        if prediction_loss_only:
            return loss, None, None
        errors = word_time_errors(unwrapped, inputs, self.processor.frame_s)
        ids = unwrapped.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, use_reader=False)
        return loss, (ids, errors), inputs["labels"]

    def text_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Pooled word and character error rates, and the share of texts that end with eos; mean errors of word starts and
        ends in milliseconds where times are known.

        Args:
            prediction: what `prediction_step` returned for all rows, ids padded with -100.
        """
        ids, errors = prediction.predictions
        texts, references = self._decode(ids), self._decode(prediction.label_ids)
        ended = np.isin(ids, np.atleast_1d(self.model.generation_config.eos_token_id)).any(-1).mean()
        scores = {
            "wer": jiwer.wer(references, texts),
            "cer": jiwer.cer(references, texts),
            "end_of_speech_rate": float(ended),
        }
        known = errors[~np.isnan(errors).any(-1)]
        if len(known):
            scores["word_start_error_ms"], scores["word_end_error_ms"] = (1000 * known.mean(0)).tolist()
        return scores

    def _decode(self, ids: np.ndarray) -> list[str]:
        return [self.processor.decode_text(row[row >= 0].tolist()).strip() for row in ids]


@torch.no_grad()
def word_time_errors(model, inputs: dict, frame_s: float) -> torch.Tensor:
    """
    Errors of the alignment head's word times, given the reference text.

    Args:
        inputs: a training batch, for a head that reads the spelling with `audio_states`; frame_s: seconds per encoder frame.

    Returns:
        `(batch, 2)` mean absolute errors of word starts and ends in seconds, NaN for rows without word times.
    """
    errors = inputs["labels"].new_full((len(inputs["labels"]), 2), torch.nan, dtype=torch.float)
    if "word_times" not in inputs:
        return errors
    if model.alignment.from_spelling:
        audio = VoxLMAudioOutput(last_hidden_state=inputs["audio_states"], frame_mask=inputs["audio_states_mask"])
        scores, owners = model.align_spelling(inputs["spelling"], audio), inputs["spelling_words"]
    else:
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        audio = output.audio
        first = max(1, int((inputs["labels"] != -100).any(0).int().argmax()))
        states, owners = model.text_states(output.hidden_states[-1], first), inputs["token_words"][:, first:]
        scores = model.align_scores(states, inputs["input_ids"][:, first:], audio)
    frame_s = frame_s * model.alignment.frames_per_key
    for row, frames in enumerate(model.alignment.keys_of(audio)[1].sum(-1).tolist()):
        targets = inputs["word_times"][row].cpu().numpy()
        known = np.flatnonzero(~np.isnan(targets[:, 0]))
        if not len(known):
            continue
        found = word_times(scores, row, owners[row].cpu().numpy(), frames, frame_s)
        errors[row] = errors.new_tensor(np.abs(np.array(found)[known] - targets[known]).mean(0))
    return errors


def noise_hook(projector, inputs: tuple, noise: float) -> tuple | None:
    """Forward pre-hook of the projector: adds noise to its input frames in training mode; see `add_noise`."""
    frames, mask, *rest = inputs
    return (add_noise(frames, mask, noise), mask, *rest) if projector.training and noise else None


def add_noise(frames: torch.Tensor, mask: torch.Tensor, noise: float) -> torch.Tensor:
    """
    Encoder states with noise, each feature with as much as it varies: some vary a hundred times as much as others.

    Args:
        frames (`torch.Tensor` of shape `(batch, frames, size)`), mask (`(batch, frames)`)
        noise (`float`): largest standard deviation, as a share of each feature's own in the batch; each row draws its
            share.
    """
    deviations = frames[mask.bool()].float().std(0, correction=0).to(frames.dtype)
    strength = noise * torch.rand(len(frames), 1, 1, device=frames.device)
    # By shape, since like the frames it would depend on their layout in memory, which a cache changes.
    return frames + strength * deviations * torch.randn(frames.shape, device=frames.device, dtype=frames.dtype)
