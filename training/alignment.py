"""Training of an alignment head that reads the spelling of a text, by itself: the LLM is not needed."""

import numpy as np
import torch
from torch import nn
from transformers.trainer_utils import EvalPrediction

from voxlm_hf.timing_voxlm import alignment_loss, key_times

from .trainer import StageTrainer, add_noise, encoded_once, word_time_errors


# What the loss is computed from, in the order of `AlignmentLoss.forward`.
INPUTS = ("spelling", "spelling_words", "word_times", "frame_times", "audio_states", "audio_states_mask")


class AlignmentLoss(nn.Module):
    """The head with its loss: one module with one `forward`, so that data-parallel wrappers see all that it computes."""

    # The Trainer then counts the target tokens of accumulated batches.
    accepts_loss_kwargs = True

    def __init__(self, alignment: nn.Module):
        super().__init__()
        self.alignment = alignment

    def forward(
        self, spelling, spelling_words, word_times, frame_times, audio_states, audio_states_mask
    ) -> torch.Tensor:
        """`(batch,)` mean losses over the frames of each row; arguments as of the model's `forward`."""
        scores = self.alignment(spelling, audio_states, audio_states_mask)
        return alignment_loss(scores, spelling_words, word_times, key_times(frame_times, audio_states_mask, 1))


class AlignmentTrainer(StageTrainer):
    """
    [`StageTrainer`] of an alignment head of kind `"spelling"`; evaluation reports the errors of word starts and ends.

    Args:
        voxlm ([`VoxLMForSpeechSeq2Seq`]): on the device of `args`.
        seconds_per_batch (`float`): audio in one batch of one process, padding included.
        state_noise (`float`): see `trainer.add_noise`.
    """

    def __init__(self, *, voxlm, seconds_per_batch: float, state_noise: float = 0.0, **kwargs):
        self.voxlm, self.state_noise = voxlm, state_noise
        voxlm.alignment.requires_grad_(True)
        super().__init__(
            model=AlignmentLoss(voxlm.alignment),
            frames_per_batch=seconds_per_batch / voxlm.get_processor().frame_s,
            data_collator=self.collate,
            compute_metrics=self.time_errors,
            **kwargs,
        )

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """A batch as of `VoxLMProcessor.collate`, without word times where no row has any."""
        return self.voxlm.get_processor().collate(rows)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Weighted by the tokens of the text, by which the Trainer counts accumulated batches.
        losses = (inputs["labels"] != -100).sum(1).float()
        if "word_times" in inputs:
            inputs = encoded_once(self.voxlm, inputs)
            mask = inputs["audio_states_mask"]
            states = self.voxlm.finish_encoding(inputs["audio_states"], mask).detach()
            if model.training and self.state_noise:
                states = add_noise(states, mask, self.state_noise)
            inputs = {**inputs, "audio_states": states}
            losses = losses * model(*(inputs[name] for name in INPUTS))
        else:  # nothing to learn
            losses = 0 * losses
        loss = self.with_all_parameters(model, self.scaled(losses, inputs, num_items_in_batch))
        return (loss, losses) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss, and the errors of the word times, given the reference text."""
        inputs, loss = self.encoded_with_loss(self.voxlm, model, inputs)
        if prediction_loss_only:
            return loss, None, None
        frame_s = self.voxlm.get_processor().frame_s
        return loss, word_time_errors(self.voxlm, inputs, frame_s), inputs["labels"]

    def time_errors(self, prediction: EvalPrediction) -> dict[str, float]:
        """Mean errors of word starts and ends in milliseconds over the rows that have word times."""
        known = prediction.predictions[~np.isnan(prediction.predictions).any(-1)]
        if not len(known):
            return {}
        start_ms, end_ms = (1000 * known.mean(0)).tolist()
        return {"word_start_error_ms": start_ms, "word_end_error_ms": end_ms}
