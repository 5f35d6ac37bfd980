"""
Warm start of the projector by CTC against the LLM's own token embeddings; no pass through the LLM.

The gate's log-odds say whether a frame carries a piece of text (CTC's blank is its complement), the projector's output says
which: a piece's score is the dot product of its embedding with the output (`training.pieces` says which pieces).
"""

import math
import random

import jiwer
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .data import LengthBatchSampler
from .pieces import encode_pieces, piece_vocabulary, short_piece_tokenizer


def ctc_loss(embeds, mask, speech_logits, token_embeddings, scale, targets):
    """
    CTC over a factorised distribution: carries a token or not, and if so, which.

    Args:
        embeds (`torch.Tensor` of shape `(batch, frames, text_size)`), mask (`(batch, frames)`), speech_logits (same).
        token_embeddings (`torch.Tensor` of shape `(tokens, text_size)`): of the tokens in the softmax.
        targets (`list[list[int]]`): for each row, indices into `token_embeddings`.

    Returns:
        the mean loss per target token.
    """
    tokens = (embeds @ token_embeddings.T).float() * scale
    speech_logits = speech_logits.float().unsqueeze(-1)
    blank = nn.functional.logsigmoid(-speech_logits)
    logprobs = torch.cat([blank, nn.functional.logsigmoid(speech_logits) + tokens.log_softmax(-1)], dim=-1)
    lengths = torch.tensor([len(target) for target in targets])
    labels = torch.tensor([token + 1 for target in targets for token in target], dtype=torch.long)
    losses = nn.functional.ctc_loss(
        logprobs.transpose(0, 1), labels, mask.sum(1), lengths, reduction="none", zero_infinity=True
    )
    return losses.sum() / lengths.sum().clamp(min=8)


def disturb(frames: torch.Tensor, noise: float) -> torch.Tensor:
    """Encoder states `(frames, size)` with noise of a strength drawn up to `noise`, and a few spans of them set to zero."""
    frames = frames + noise * random.random() * torch.randn_like(frames)
    for _ in range(len(frames) // 100 + 1):
        start, width = random.randrange(len(frames)), random.randint(1, 12)
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


def choose_pieces(model, processor, texts: list[str], merges: int):
    """Make the model's projector read the pieces that `texts` need; returns their tokenizer."""
    pieces = short_piece_tokenizer(processor.tokenizer, merges)
    model.set_projector_vocabulary(piece_vocabulary(pieces, texts))
    return pieces


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
    Train the projector of `model` in place.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a frame gate.
        dataset: sequence of rows with "states" `(frames, audio_size)` and "text"; `dataset.lengths` gives their frames.
        dev_rows: rows to report the greedy word error rate on.
        merges: see `training.pieces`. noise: see `disturb`.

    Raises:
        ValueError: for a model without a frame gate.
    """
    if model.projector.gate is None:
        raise ValueError("The warm start trains the frame gate as CTC's blank: set `frame_gate_threshold`")
    pieces = choose_pieces(model, processor, dataset.texts, merges)
    place = {token: index for index, token in enumerate(model.projector.token_ids.tolist())}
    targets = [[place[token] for token in encode_pieces(pieces, text) if token in place] for text in dataset.texts]
    embeddings = model.get_input_embeddings().weight.detach()
    if float(model.projector.log_scale.detach()) == 0.0:  # untrained
        model.projector.log_scale.data.fill_(math.log(20 / embeddings.norm(dim=1).mean() ** 2))
    optimizer = torch.optim.AdamW(model.projector.parameters(), learning_rate, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1, step / steps)))),
    )
    batches = LengthBatchSampler(dataset.lengths, frames_per_batch)
    step, progress = 0, tqdm(total=steps, desc="CTC", unit="step")
    while step < steps:
        for batch in batches:
            states = [disturb(dataset[index]["states"], noise) for index in batch]
            mask = pad_sequence([torch.ones(len(frames), dtype=torch.long) for frames in states], batch_first=True)
            with torch.autocast("cpu", torch.bfloat16):
                embeds, projected_mask, speech, _ = model.projector(pad_sequence(states, batch_first=True), mask)
                loss = ctc_loss(
                    embeds,
                    projected_mask,
                    speech,
                    embeddings[model.projector.token_ids].to(embeds.dtype),
                    model.projector.log_scale.exp(),
                    [targets[index] for index in batch],
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.projector.parameters(), 1.0)
            optimizer.step(), schedule.step(), progress.update()
            step += 1
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
            if step % eval_steps == 0 or step == steps:
                rate = 100 * greedy_wer(model, processor, dev_rows) if dev_rows else float("nan")
                tqdm.write(f"step {step}: loss {float(loss.detach()):.3f}, greedy CTC WER {rate:.1f} %")
            if step == steps:
                break
        batches.set_epoch(step)
