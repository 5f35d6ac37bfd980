"""
Warm start of the projector by CTC against the LLM's own token embeddings; no pass through the LLM.

The gate's log-odds say whether a frame carries a token (CTC's blank is its complement), the projector's output says which:
a token's score is its embedding's dot product with the output. The softmax runs over the batch's tokens and a few thousand
sampled ones.
"""

import argparse
import math
import random
from pathlib import Path

import jiwer
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from training.features import FeatureCache
from voxlm_hf import VoxLMForSpeechSeq2Seq


SAMPLED_TOKENS, MAX_FRAMES_PER_BATCH = 2000, 8000


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


def disturb(states: list[torch.Tensor], noise: float) -> list[torch.Tensor]:
    """Noise of a strength drawn for each row, and a few spans of frames set to zero."""
    disturbed = []
    for frames in states:
        frames = frames + noise * random.random() * torch.randn_like(frames)
        for _ in range(len(frames) // 100 + 1):
            start, width = random.randrange(len(frames)), random.randint(1, 12)
            frames[start : start + width] = 0
        disturbed.append(frames)
    return disturbed


def batches(caches: list[FeatureCache]):
    """Endless batches of rows of like length, capped by frames."""
    rows = [(cache, index) for cache in caches for index in range(len(cache))]
    while True:
        random.shuffle(rows)
        for first in range(0, len(rows), 400):
            batch: list = []
            for cache, index in sorted(rows[first : first + 400], key=lambda row: row[0].rows[row[1]]["frames"]):
                if batch and (len(batch) + 1) * cache.rows[index]["frames"] > MAX_FRAMES_PER_BATCH:
                    yield batch
                    batch = []
                batch.append(cache[index])
            if batch:
                yield batch


@torch.no_grad()
def greedy_wer(model, rows: list[dict]) -> float:
    """Word error rate of the projector alone, decoded greedily by CTC."""
    references, hypotheses = [], []
    for row in rows:
        states = row["states"].unsqueeze(0)
        embeds, _, speech = model.projector(states, torch.ones(states.shape[:2], dtype=torch.long))
        tokens = (embeds[0] @ model.get_input_embeddings().weight.T).argmax(-1)
        tokens[~model.projector.keep(speech[0])] = -1
        ids = torch.unique_consecutive(tokens)
        references.append(row["text"] or "-")
        hypotheses.append(model.processor.decode(ids[ids >= 0]).strip() or "-")
    return jiwer.wer(references, hypotheses)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="composed model to start from")
    parser.add_argument("--output", required=True)
    parser.add_argument("--caches", type=Path, nargs="+", required=True, help="feature caches, without suffix")
    parser.add_argument("--dev-caches", type=Path, nargs="*", default=[], help="caches to report the error rate on")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=1.0)
    arguments = parser.parse_args()
    random.seed(0), torch.manual_seed(0)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model)
    tokenizer = model.get_processor().tokenizer
    size = model.config.audio_hidden_size
    caches = [FeatureCache(path, size) for path in arguments.caches]
    embeddings = model.get_input_embeddings().weight.detach()
    norm = embeddings.norm(dim=1).mean()
    model.projector.log_scale.data.fill_(math.log(20 / norm**2))
    counts = torch.ones(len(embeddings))
    for cache in caches:
        for row in cache.rows:
            ids = tokenizer(" " + row["text"].lower())["input_ids"]
            counts.scatter_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    optimizer = torch.optim.AdamW(model.projector.parameters(), arguments.learning_rate, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 200) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / arguments.steps))),
    )
    progress = tqdm(zip(range(arguments.steps), batches(caches)), total=arguments.steps)
    for step, batch in progress:
        states = disturb([row["states"] for row in batch], arguments.noise)
        mask = pad_sequence([torch.ones(len(frames), dtype=torch.long) for frames in states], batch_first=True)
        ids = [tokenizer(" " + row["text"])["input_ids"] if row["text"] else [] for row in batch]
        sampled = torch.multinomial(counts.sqrt(), SAMPLED_TOKENS).tolist()
        tokens = sorted({token for row in ids for token in row} | set(sampled))
        place = {token: index for index, token in enumerate(tokens)}
        with torch.autocast("cpu", torch.bfloat16):
            embeds, projected_mask, speech = model.projector(pad_sequence(states, batch_first=True), mask)
        loss = ctc_loss(
            embeds, projected_mask, speech, embeddings[tokens].to(embeds.dtype), model.projector.log_scale.exp(),
            [[place[token] for token in row] for row in ids],
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.projector.parameters(), 1.0)
        optimizer.step(), schedule.step()
        progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if step % 500 == 499:
            for path in arguments.dev_caches:
                cache = FeatureCache(path, size)
                rate = greedy_wer(model, [cache[index] for index in range(min(100, len(cache)))])
                tqdm.write(f"step {step + 1}: {path.name} greedy CTC WER {100 * rate:.1f} %")
    model.save_pretrained(arguments.output)
    model.processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
