"""[`VoxLMTrainer`]: transformers' Trainer with what transcription and alignment need."""

import jiwer
import numpy as np
import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction

from voxlm_hf.decoding_voxlm import pack_inputs, pack_left
from voxlm_hf.timing_voxlm import word_times

from .data import LengthBatchSampler


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


def prompts_alone(inputs: dict, pad_token_id: int) -> dict:
    """`input_ids` and `attention_mask` of a training batch without the answers, padded on the left."""
    is_prompt = inputs["attention_mask"].bool() & (inputs["labels"] == -100)
    columns = {"input_ids": (inputs["input_ids"], pad_token_id), "attention_mask": (inputs["attention_mask"], 0)}
    return pack_left(is_prompt, columns)


class VoxLMTrainer(Trainer):
    """
    [`Trainer`] for [`VoxLMForSpeechSeq2Seq`] on a [`SpeechDataset`], collated by its processor.

    Seconds of audio limit the size of a batch; checkpoints hold only what is trained; evaluation generates the text
    from the prompt alone and reports WER, CER and the share of texts that end with eos.

    Args:
        processor ([`VoxLMProcessor`]): of the model.
        seconds_per_batch (`float`): audio in one batch of one process, padding included; replaces
            `per_device_train_batch_size`.
        state_noise (`float`): largest standard deviation of the noise that training adds to the encoder states (each
            row draws its own), so that the projector makes the errors that it makes on new recordings and the LLM
            learns to cope with them.
        max_new_tokens (`int`): token budget of a text in evaluation; the default was chosen by hand, not tuned.
    """

    def __init__(self, *args, processor, seconds_per_batch: float, state_noise=0.0, max_new_tokens=200, **kwargs):
        self.processor, self.seconds_per_batch = processor, seconds_per_batch
        self.max_new_tokens, self.state_noise, self.logged = max_new_tokens, state_noise, {}
        super().__init__(*args, compute_metrics=kwargs.pop("compute_metrics", self.text_metrics), **kwargs)

    def train(self, *args, **kwargs):
        """As [`Trainer.train`], with noise on the encoder states; a trained model adds none."""
        hook = self.model.projector.register_forward_pre_hook(
            lambda projector, inputs: disturb(projector, inputs, self.state_noise)
        )
        try:
            return super().train(*args, **kwargs)
        finally:
            hook.remove()

    def get_train_dataloader(self) -> DataLoader:
        """Batches of rows of similar length, of at most `seconds_per_batch`."""
        sampler = LengthBatchSampler(
            self.train_dataset.lengths,
            self.seconds_per_batch / self.processor.frame_s,
            self.args.seed,
            multiple=self.args.world_size,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        self.accelerator.even_batches = False
        return self.accelerator.prepare(loader)

    def _save_checkpoint(self, model, trial):
        """As in [`Trainer`], without the frozen weights; `save_model` and `save_pretrained` still save all of them."""
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        alone = self.accelerator.distributed_type == DistributedType.NO
        if alone and "audio_states" in inputs and model.projector.gate is not None:
            inputs = leave_out_hidden_frames(model, inputs)
        if model.training:
            # Logits are needed for the text alone, which is at the end of every row.
            first = int((inputs["labels"] != -100).any(0).int().argmax())
            inputs = {**inputs, "logits_to_keep": inputs["labels"].shape[1] - first + 1, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if outputs.alignment_loss is not None:
            self.logged.setdefault("alignment_loss", []).append(float(outputs.alignment_loss.detach()))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        logs.update({name: round(sum(values) / len(values), 4) for name, values in self.logged.items()})
        self.logged = {}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        Loss of the reference text; the text that the model generates from the prompt alone; and the word-time errors on
        the reference text.
        """
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs).detach()
        if prediction_loss_only:
            return loss, None, None
        unwrapped = self.accelerator.unwrap_model(model)
        errors = word_time_errors(unwrapped, inputs, self.processor.frame_s).to(loss.device)
        prompt = prompts_alone(inputs, unwrapped.config.pad_token_id)
        names = ("input_features", "input_values", "audio_states")
        audio = {name: value for name, value in inputs.items() if name.removesuffix("_mask") in names}
        ids = unwrapped.generate(**prompt, **audio, max_new_tokens=self.max_new_tokens, do_sample=False)
        return loss, (ids[:, prompt["input_ids"].shape[1] :], errors), inputs["labels"]

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
        inputs: a training batch; frame_s: seconds per encoder frame.

    Returns:
        `(batch, 2)` mean absolute errors of word starts and ends in seconds, NaN for rows without word times.
    """
    errors = torch.full((len(inputs["labels"]), 2), torch.nan)
    if "word_times" not in inputs:
        return errors
    output = model(**inputs, output_hidden_states=True, use_cache=False)
    first = max(1, int((inputs["labels"] != -100).any(0).int().argmax()))
    states = model.text_states(output.hidden_states[-1], first)
    scores = model.align_scores(states, inputs["input_ids"][:, first:], output.audio)
    frame_s = frame_s * model.alignment.frames_per_key
    for row, frames in enumerate(model.alignment.keys_of(output.audio)[1].sum(-1).tolist()):
        targets = inputs["word_times"][row].cpu().numpy()
        known = np.flatnonzero(~np.isnan(targets[:, 0]))
        if not len(known):
            continue
        found = word_times(scores, row, inputs["token_words"][row, first:].cpu().numpy(), frames, frame_s)
        errors[row] = torch.tensor(np.abs(np.array(found)[known] - targets[known]).mean(0), dtype=torch.float)
    return errors


def disturb(projector, inputs: tuple, noise: float) -> tuple | None:
    """
    Forward pre-hook of the projector: adds noise of up to this standard deviation to its input frames in training mode.
    """
    frames, *rest = inputs
    if not projector.training or not noise:
        return None
    strength = noise * torch.rand(len(frames), 1, 1, device=frames.device)
    return frames + strength * torch.randn_like(frames), *rest
