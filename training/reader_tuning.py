"""
Fine-tune a reader (`voxlm_hf.reader_voxlm`) on transcripts: its decoder's layers and the end of audio that it knows, while
encoder and vocabulary stay as they are.

A decoder that is tuned on one language forgets others, so the result may be a mean of the weights before and after
(WiSE-FT, Wortsman et al. 2022), which keeps most of both.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .reader import ReaderDistillation
from .trainer import StageTrainer, encoded_once
from .warm_start import disturb


# Arguments of the Trainer, which a recipe may override; chosen by hand, not tuned.
ARGUMENTS = {
    "max_steps": 1000,
    "learning_rate": 2e-5,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
    "bf16": True,
    "eval_strategy": "no",
}


class ReaderTuner(StageTrainer):
    """
    [`StageTrainer`] of a reader's decoder, by cross-entropy of cased transcripts.

    Args:
        voxlm ([`VoxLMForSpeechSeq2Seq`]): with a reader, on the device of `args`.
        tokenizer ([`PreTrainedTokenizerFast`]): of the audio model.
        noise (`float`): see `warm_start.disturb`.
        keep (`float`): share of the old weights in the result, from 0 to below 1.

    Raises:
        ValueError: for a model without a reader, and a share out of range.
    """

    def __init__(self, *, voxlm, tokenizer, train_dataset, noise: float, keep: float, **kwargs):
        if voxlm.reader is None:
            raise ValueError("The model has no reader to tune; a stage of kind `reader` adds one")
        if not 0 <= keep < 1:
            raise ValueError(f"`keep` must be at least 0 and below 1, got {keep}")
        self.voxlm, self.tokenizer, self.noise, self.keep = voxlm, tokenizer, noise, keep
        self.forbidden = voxlm.reader._forbidden_tokens()
        reader = voxlm.reader
        reader.requires_grad_(False)
        for part in (reader.decoder.layers, reader.decoder.layer_norm, reader.end):
            part.requires_grad_(True)
        super().__init__(
            model=ReaderDistillation(reader), train_dataset=train_dataset, data_collator=self.collate, **kwargs
        )

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """A batch as of `VoxLMProcessor.collate`, with the reader's `decoder_input_ids` and what follows each of them."""
        batch = self.voxlm.processor.collate([{**row, "words": None} for row in rows])
        audio = {name: batch[name] for name in batch if name not in ("input_ids", "attention_mask", "labels")}
        prompt, end = self.voxlm.reader.prompt_ids, self.voxlm.reader.eos_token_id
        texts = [" " + row["text"] if row["text"] else "" for row in rows]
        ids = [
            torch.tensor(prompt + text_ids + [end])
            for text_ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        ids = pad_sequence(ids, batch_first=True, padding_value=-100)
        labels = ids[:, 1:].clone()
        labels[:, : len(prompt) - 1] = -100
        # What the LLM cannot spell, the reader never writes.
        labels[self.forbidden.cpu()[labels.clamp(min=0)]] = -100
        room = self.voxlm.reader.decoder.embed_positions.weight.shape[0]
        return {**audio, "decoder_input_ids": ids[:, :-1][:, :room].clamp(min=0), "labels": labels[:, :room]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = encoded_once(self.voxlm, inputs)
        mask = inputs["audio_states_mask"]
        states = self.voxlm.finish_encoding(inputs["audio_states"], mask).detach()
        if model.training:
            states = disturb(states, mask, self.noise)
        losses = model(states, mask, inputs["decoder_input_ids"], inputs["labels"])
        loss = self.with_all_parameters(model, self.scaled(losses, inputs, num_items_in_batch))
        return (loss, losses) if return_outputs else loss

    def train(self, *args, **kwargs):
        """As [`Trainer.train`], and then the mean of the old and the new weights."""
        before = {name: tensor.clone() for name, tensor in self._tuned().items()}
        output = super().train(*args, **kwargs)
        with torch.no_grad():
            for name, tensor in self._tuned().items():
                tensor.lerp_(before[name].to(tensor), self.keep)
        return output

    def _tuned(self) -> dict[str, nn.Parameter]:
        """The decoder's weights that training changes, by name."""
        return {
            name: parameter
            for name, parameter in self.voxlm.reader.decoder.named_parameters()
            if parameter.requires_grad
        }
