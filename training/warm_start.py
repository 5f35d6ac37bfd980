"""
Warm start of the projector by CTC against the LLM's own token embeddings, without a pass through the LLM.

The gate's log-odds say whether a frame carries a token (CTC's blank is the complement), the projector's output says
which one: the score of a subword is the dot product of its embedding with the output (`voxlm_hf.subwords_voxlm` chooses
the subwords).
"""

import math

import jiwer
import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.trainer_utils import EvalPrediction

from voxlm_hf.subwords_voxlm import encode_subwords, subword_tokenizer, subword_vocabulary
from voxlm_hf.words_voxlm import plain_words

from .text import whisper_normaliser
from .trainer import StageTrainer, add_noise, encoded_once


# All of these were chosen by hand, not tuned.
# The least number of target tokens that a batch's loss is divided by, so that a batch with hardly any text has no
# outsized gradients.
MIN_TARGET_TOKENS = 8
# SpecAugment-like masking in time (Park et al. 2019): one span per so many encoder frames, each of at most so many
# frames.
FRAMES_PER_MASK, LONGEST_MASK = 100, 25
# The copies of the encoder's layers have learnt much already: their learning rate is this share of the others'.
COPIED_LAYERS_RATE = 0.2
# An untrained projector's scores are scaled so that an output like an embedding has this dot product with it.
INITIAL_SCORE = 20
# Arguments of the Trainer, which a recipe may override: the optimiser, and a learning rate with linear warmup, then a
# cosine down to a share of its peak.
ARGUMENTS = {
    "max_steps": 5000,
    "learning_rate": 1e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "warmup_steps": 200,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
    "bf16": True,
    "eval_steps": 500,
}


def ctc_losses(embeds, mask, gate_logits, token_embeddings, scale, labels):
    """
    CTC over a factorised distribution: whether a frame carries a token, and if so, which one.

    Args:
        embeds (`torch.Tensor` of shape `(batch, frames, text_size)`), mask (`(batch, frames)`), gate_logits (same).
        token_embeddings (`torch.Tensor` of shape `(tokens, text_size)`): of the tokens in the softmax.
        labels (`torch.LongTensor` of shape `(batch, length)`): indices into `token_embeddings`, then -100.

    Returns:
        `(batch,)` loss of each row, summed over its target tokens.
    """
    tokens = (embeds @ token_embeddings.T).float() * scale
    gate_logits = gate_logits.float().unsqueeze(-1)
    blank = nn.functional.logsigmoid(-gate_logits)
    logprobs = torch.cat([blank, nn.functional.logsigmoid(gate_logits) + tokens.log_softmax(-1)], dim=-1)
    targets, lengths = (labels + 1).clamp(min=0), (labels != -100).sum(1)
    return nn.functional.ctc_loss(
        logprobs.transpose(0, 1), targets, mask.sum(1), lengths, reduction="none", zero_infinity=True
    )


def disturb(frames: torch.Tensor, mask: torch.Tensor, noise: float) -> torch.Tensor:
    """
    Encoder states with noise and with a few spans set to zero.

    Args:
        frames (`torch.Tensor` of shape `(batch, frames, size)`), mask (`(batch, frames)`)
        noise (`float`): see `add_noise`.
    """
    device, lengths = frames.device, mask.sum(1, keepdim=True)
    frames = add_noise(frames, mask, noise)
    spans = lengths // FRAMES_PER_MASK + 1
    drawn = torch.rand(2, len(frames), frames.shape[1] // FRAMES_PER_MASK + 1, device=device)
    starts, widths = (drawn[0] * lengths).long(), (drawn[1] * LONGEST_MASK).long() + 1
    widths = widths * (torch.arange(drawn.shape[2], device=device) < spans)
    places = torch.arange(frames.shape[1], device=device)[:, None]
    covered = (places >= starts[:, None]) & (places < (starts + widths)[:, None])
    return frames.masked_fill(covered.any(-1).unsqueeze(-1), 0.0)


def plain_text(text: str) -> str:
    """A text as the projector writes it: lower case without punctuation; see `words_voxlm.plain_words`."""
    return " ".join(plain_words(text.split()))


def choose_subwords(model, processor, texts: list[str] | None, merges: int):
    """
    Give the projector the vocabulary of subwords that `texts` need, or of all subwords when the texts are not known. The
    projector writes lower case without punctuation, which can be heard, and leaves the rest to the LLM.

    Returns:
        a function from a text to the places of its subwords in that vocabulary.
    """
    subwords = subword_tokenizer(processor.tokenizer, merges)
    texts = None if texts is None else list(map(plain_text, texts))
    model.set_projector_vocabulary(subword_vocabulary(subwords, texts), merges)
    place = {token: index for index, token in enumerate(model.projector.token_ids.tolist())}
    return lambda text: [place[token] for token in encode_subwords(subwords, plain_text(text)) if token in place]


class ProjectorCTC(nn.Module):
    """
    The projector with its loss: one module with one `forward`, so that data-parallel wrappers see all that it computes.

    Args:
        projector ([`VoxLMProjector`]): with a frame gate and token scores.
        embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`): of the LLM.
    """

    # The Trainer then counts the target tokens of accumulated batches.
    accepts_loss_kwargs = True

    def __init__(self, projector: nn.Module, embeddings: torch.Tensor):
        super().__init__()
        self.projector = projector
        self.register_buffer("embeddings", embeddings[projector.token_ids].detach(), persistent=False)

    def forward(self, audio_states, audio_states_mask, labels) -> torch.Tensor:
        """`(batch,)` CTC losses; see `ctc_losses`."""
        projected, scale = self.projector(audio_states, audio_states_mask), self.projector.log_scale.exp()
        embeds, mask, gate_logits = (projected[name] for name in ("pooler_output", "audio_embeds_mask", "gate_logits"))
        return ctc_losses(embeds, mask, gate_logits, self.embeddings.to(embeds.dtype), scale, labels)


class WarmStartTrainer(StageTrainer):
    """
    [`StageTrainer`] of the projector alone, by CTC; evaluation reports the word error rate of greedy decoding.

    Args:
        voxlm ([`VoxLMForSpeechSeq2Seq`]): with a frame gate and `projector_readout="token_mixture"`, on the device of
            `args`.
        merges (`int`): see `voxlm_hf.subwords_voxlm`. noise (`float`): see `disturb`.

    Raises:
        ValueError: for a model without a frame gate or without token scores.
    """

    def __init__(self, *, voxlm, train_dataset, merges: int, noise: float, **kwargs):
        if voxlm.projector.gate is None or voxlm.projector.log_scale is None:
            raise ValueError(
                "The warm start trains the frame gate as CTC's blank and the scores of tokens: set `frame_gate_threshold` "
                "and `projector_readout: token_mixture`"
            )
        self.voxlm, self.noise, processor = voxlm, noise, voxlm.get_processor()
        self.targets_of = choose_subwords(voxlm, processor, train_dataset.spoken_texts, merges)
        embeddings = voxlm.get_input_embeddings().weight
        if float(voxlm.projector.log_scale.detach()) == 0.0:  # untrained
            voxlm.projector.log_scale.data.fill_(math.log(INITIAL_SCORE / embeddings.detach().norm(dim=1).mean() ** 2))
        voxlm.projector.requires_grad_(True)
        super().__init__(
            model=ProjectorCTC(voxlm.projector, embeddings),
            train_dataset=train_dataset,
            data_collator=self.collate,
            compute_metrics=self.error_rate,
            **kwargs,
        )

    def create_optimizer(self, model=None):
        """As in [`Trainer`], with a lower learning rate for the copies of the encoder's layers."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer, projector = super().create_optimizer(model), self.voxlm.projector
        parts = [part for part in (projector.encoder_layers, projector.encoder_norm) if part is not None]
        copied = {id(parameter) for part in parts for parameter in part.parameters()}
        for group in list(optimizer.param_groups):
            slow = [parameter for parameter in group["params"] if id(parameter) in copied]
            if slow:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in copied]
                optimizer.add_param_group({**group, "params": slow, "lr": COPIED_LAYERS_RATE * group["lr"]})
        return optimizer

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """A batch as of `VoxLMProcessor.collate`, with the subwords' places as `labels` and the texts as `text_ids`."""
        batch = self.voxlm.processor.collate([{**row, "words": None} for row in rows])
        targets = [torch.tensor(self.targets_of(row.get("spoken", row["text"])), dtype=torch.long) for row in rows]
        audio = {name: batch[name] for name in batch if name not in ("input_ids", "attention_mask", "labels")}
        labels = pad_sequence(targets, batch_first=True, padding_value=-100)
        return {**audio, "labels": labels, "text_ids": batch["labels"]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = encoded_once(self.voxlm, inputs)
        states, mask = inputs["audio_states"], inputs["audio_states_mask"]
        if model.training:
            states = disturb(states, mask, self.noise)
        losses = model(states, mask, inputs["labels"])
        loss = self.scaled(losses, inputs, num_items_in_batch, MIN_TARGET_TOKENS)
        loss = self.with_all_parameters(model, loss)
        return (loss, losses) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss, and the greedy text of the projector beside the reference text."""
        inputs, loss = self.encoded_with_loss(self.voxlm, model, inputs)
        if prediction_loss_only:
            return loss, None, None
        tokens = self.voxlm.project(inputs["audio_states"], inputs["audio_states_mask"]).tokens
        return loss, tokens, inputs["text_ids"]

    def error_rate(self, prediction: EvalPrediction) -> dict[str, float]:
        """The pooled word error rate of greedy decoding over the rows that have a text."""
        references, hypotheses = (self._decode(ids) for ids in (prediction.label_ids, prediction.predictions))
        spoken = [pair for pair in zip(references, hypotheses) if pair[0]]
        return {"wer": jiwer.wer(*map(list, zip(*spoken)))} if spoken else {}

    def _decode(self, ids: np.ndarray) -> list[str]:
        """Normalised texts, since the projector writes no capitals and no punctuation."""
        texts = [self.voxlm.processor.decode_text(row[row >= 0].tolist()) for row in ids]
        return list(map(whisper_normaliser(), texts))
