"""
Warm start of the projector by CTC against the LLM's own token embeddings, without a pass through the LLM.

The gate's log-odds say whether a frame carries a token (CTC's blank is the complement), the projector's output says
which one: the score of a subword is the dot product of its embedding with the output (`voxlm_training.subwords` chooses
the subwords).
"""

import itertools
import math
import random
from collections.abc import Iterator

import jiwer
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .data import LengthBatchSampler
from .subwords import encode_subwords, subword_tokenizer, subword_vocabulary


# All of these were chosen by hand, not tuned.
# The least number of target tokens that a batch's loss is divided by, so that a batch with hardly any text has no
# outsized gradients.
MIN_TARGET_TOKENS = 8
# SpecAugment-like masking in time (Park et al. 2019): one span per so many encoder frames, each of at most so many
# frames.
FRAMES_PER_MASK, LONGEST_MASK = 100, 12
# An untrained projector's scores are scaled so that an output like an embedding has this dot product with it.
INITIAL_SCORE = 20
# AdamW, and a learning rate with linear warmup, then a cosine down to a share of its peak.
BETAS, WEIGHT_DECAY, MAX_GRADIENT_NORM = (0.9, 0.98), 0.01, 1.0
WARMUP_STEPS, FINAL_SHARE = 200, 0.02


def ctc_loss(embeds, mask, gate_logits, token_embeddings, scale, targets):
    """
    CTC over a factorised distribution: whether a frame carries a token, and if so, which one.

    Args:
        embeds (`torch.Tensor` of shape `(batch, frames, text_size)`), mask (`(batch, frames)`), gate_logits (same).
        token_embeddings (`torch.Tensor` of shape `(tokens, text_size)`): of the tokens in the softmax.
        targets (`list[list[int]]`): for each row, indices into `token_embeddings`.

    Returns:
        the mean loss per target token.
    """
    tokens = (embeds @ token_embeddings.T).float() * scale
    gate_logits = gate_logits.float().unsqueeze(-1)
    blank = nn.functional.logsigmoid(-gate_logits)
    logprobs = torch.cat([blank, nn.functional.logsigmoid(gate_logits) + tokens.log_softmax(-1)], dim=-1)
    lengths = torch.tensor([len(target) for target in targets])
    labels = torch.tensor([token + 1 for target in targets for token in target], dtype=torch.long)
    losses = nn.functional.ctc_loss(
        logprobs.transpose(0, 1), labels, mask.sum(1), lengths, reduction="none", zero_infinity=True
    )
    return losses.sum() / lengths.sum().clamp(min=MIN_TARGET_TOKENS)


def disturb(frames: torch.Tensor, noise: float) -> torch.Tensor:
    """
    Encoder states `(frames, size)` with noise of a standard deviation drawn up to `noise`, and a few spans set to zero.
    """
    frames = frames + noise * random.random() * torch.randn_like(frames)
    for _ in range(len(frames) // FRAMES_PER_MASK + 1):
        start, width = random.randrange(len(frames)), random.randint(1, LONGEST_MASK)
        frames[start : start + width] = 0
    return frames


@torch.no_grad()
def greedy_wer(model, processor, rows: list[dict]) -> float:
    """
    Word error rate of the projector alone, decoded greedily.

    Args:
        rows: with "states" `(frames, audio_size)` and "text".
    """
    hypotheses = []
    for row in rows:
        states = row["states"].unsqueeze(0)
        tokens = model.project(states, torch.ones(states.shape[:2], dtype=torch.long)).tokens[0]
        hypotheses.append(processor.decode_text(tokens[tokens >= 0]).strip())
    spoken = [(row["text"], hypothesis) for row, hypothesis in zip(rows, hypotheses) if row["text"]]
    return jiwer.wer([text for text, _ in spoken], [hypothesis for _, hypothesis in spoken])


def choose_subwords(model, processor, texts: list[str], merges: int) -> list[list[int]]:
    """
    Give the projector the vocabulary of subwords that `texts` need.

    Returns:
        for each text, the places of its subwords in that vocabulary.
    """
    subwords = subword_tokenizer(processor.tokenizer, merges)
    model.set_projector_vocabulary(subword_vocabulary(subwords, texts))
    place = {token: index for index, token in enumerate(model.projector.token_ids.tolist())}
    return [[place[token] for token in encode_subwords(subwords, text) if token in place] for text in texts]


def warm_start(
    model,
    processor,
    dataset,
    dev_rows: list[dict],
    merges: int = 800,
    steps: int = 5000,
    learning_rate: float = 1e-3,
    noise: float = 1.0,
    frames_per_batch: int = 8000,
    eval_steps: int = 500,
):
    """
    Train the projector of `model` in place. The defaults were chosen by hand, not tuned.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a frame gate.
        dataset: sequence of rows with "states" `(frames, audio_size)` and "text"; `dataset.lengths` gives their frames.
        dev_rows: rows to report the greedy word error rate on.
        merges: see `voxlm_training.subwords`. noise: see `disturb`.

    Raises:
        ValueError: for a model without a frame gate.
    """
    if model.projector.gate is None:
        raise ValueError("The warm start trains the frame gate as CTC's blank: set `frame_gate_threshold`")
    targets = choose_subwords(model, processor, dataset.texts, merges)
    embeddings = model.get_input_embeddings().weight.detach()
    if float(model.projector.log_scale.detach()) == 0.0:  # untrained
        model.projector.log_scale.data.fill_(math.log(INITIAL_SCORE / embeddings.norm(dim=1).mean() ** 2))
    optimizer, schedule = make_optimizer(model.projector, learning_rate, steps)
    batches = endless_batches(LengthBatchSampler(dataset.lengths, frames_per_batch))
    progress = tqdm(total=steps, desc="CTC", unit="step")
    for step, batch in enumerate(itertools.islice(batches, steps), 1):
        states = [disturb(dataset[index]["states"], noise) for index in batch]
        loss = projector_loss(model.projector, states, embeddings, [targets[index] for index in batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.projector.parameters(), MAX_GRADIENT_NORM)
        optimizer.step(), schedule.step(), progress.update()
        progress.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
        if step % eval_steps == 0 or step == steps:
            rate = 100 * greedy_wer(model, processor, dev_rows) if dev_rows else float("nan")
            tqdm.write(f"step {step}: loss {float(loss.detach()):.3f}, greedy CTC WER {rate:.1f} %")


def make_optimizer(projector, learning_rate: float, steps: int):
    """AdamW, and its learning-rate schedule over `steps`: linear warmup, then a cosine."""
    optimizer = torch.optim.AdamW(projector.parameters(), learning_rate, BETAS, weight_decay=WEIGHT_DECAY)

    def share_of_peak(step):
        cosine = 1 + math.cos(math.pi * min(1, step / steps))
        return min(1, (step + 1) / WARMUP_STEPS) * (FINAL_SHARE + (1 - FINAL_SHARE) / 2 * cosine)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def endless_batches(sampler: LengthBatchSampler) -> Iterator[list[int]]:
    """Batches of row numbers, epoch after epoch, each in an order of its own."""
    step = 0
    while True:
        for batch in sampler:
            yield batch
            step += 1
        sampler.set_epoch(step)


def projector_loss(projector, states: list[torch.Tensor], embeddings: torch.Tensor, targets: list[list[int]]):
    """
    CTC loss of one batch, the projector in bfloat16.

    Args:
        states: of each row, `(frames, audio_size)`; embeddings: all of the LLM's; targets: of each row, places in the
            projector's vocabulary.
    """
    mask = pad_sequence([torch.ones(len(frames), dtype=torch.long) for frames in states], batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        projected = projector(pad_sequence(states, batch_first=True), mask)
        embeds, scale = projected["pooler_output"], projector.log_scale.exp()
        tokens = embeddings[projector.token_ids].to(embeds.dtype)
        return ctc_loss(embeds, projected["audio_embeds_mask"], projected["gate_logits"], tokens, scale, targets)
