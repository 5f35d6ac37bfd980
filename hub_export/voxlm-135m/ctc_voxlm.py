"""
CTC scores of texts by the projector's frames, for rescoring and for decoding together with the LLM.

Hybrid decoding after Watanabe et al. 2017 ("Hybrid CTC/attention architecture for end-to-end speech recognition"), with the
frames that a projector with `projector_readout="token_mixture"` scores against the LLM's tokens. CTC keeps the LLM from
leaving out what was said, and from going on when nothing more was said.
"""

from dataclasses import dataclass

import numpy as np
import torch


# Frames that carry a token with a lower probability are taken for blanks. Chosen by hand, far below the gate's threshold.
TOKEN_FROM = 0.02
# Tokens proposed by one frame, and by all frames and by the LLM for one position of the text. Chosen by hand: likely
# tokens are among the first few, and each proposal costs a forward recursion over the frames.
FRAME_TOKENS, PROPOSALS = 4, 20
# A log-probability of practically zero, but finite.
IMPOSSIBLE = -1e9
# In a whole text, a wildcard for anything that may have been said there.
ANYTHING = -1


@dataclass
class CTCFrames:
    """
    The frames of one recording that may carry a token.

    Args:
        queries (`torch.Tensor` of shape `(frames, text_size)`): their product with a token's embedding is its score.
        offsets (`torch.Tensor` of shape `(frames,)`): added to a score, they give the log-probability.
        blanks (`np.ndarray` of shape `(frames,)`): log-probabilities of carrying no token.
        best, best_logprobs (`np.ndarray` of shape `(frames, FRAME_TOKENS)`): the likeliest tokens.
    """

    queries: torch.Tensor
    offsets: torch.Tensor
    blanks: np.ndarray
    best: np.ndarray
    best_logprobs: np.ndarray

    @property
    def speech_log_odds(self) -> float:
        """How much likelier each frame's best token is than a blank, summed over the frames where it is, in nats."""
        return float(np.maximum(self.best_logprobs[:, :1].sum(1) - self.blanks, 0).sum())


def ctc_frames(model, audio) -> list[CTCFrames]:
    """The frames of each recording of a batch ([`VoxLMAudioOutput`] with `ctc_states`)."""
    embeddings, token_ids = model.get_input_embeddings().weight, model.projector.token_ids
    if token_ids is not None:
        embeddings = embeddings[token_ids]
    scaled, mask = audio.ctc_states * model.projector.log_scale.exp(), audio.audio_embeds_mask.bool()
    rows = []
    for queries, log_odds, real in zip(scaled, audio.gate_logits.float(), mask):
        kept = real & (log_odds.sigmoid() > TOKEN_FROM)
        queries, log_odds = queries[kept], log_odds[kept]
        scores = (queries @ embeddings.to(queries.dtype).T).float()
        offsets = torch.nn.functional.logsigmoid(log_odds) - scores.logsumexp(-1)
        best = scores.topk(min(FRAME_TOKENS, len(embeddings)), dim=-1)
        best_ids = best.indices if token_ids is None else token_ids[best.indices]
        rows.append(
            CTCFrames(
                queries=queries,
                offsets=offsets,
                blanks=torch.nn.functional.logsigmoid(-log_odds).double().cpu().numpy(),
                best=best_ids.cpu().numpy(),
                best_logprobs=(best.values + offsets[:, None]).double().cpu().numpy(),
            )
        )
    return rows


def text_logprobs(frames: CTCFrames, embeddings: torch.Tensor, texts: list[list[int]]) -> list[float]:
    """
    CTC log-probabilities of whole texts, given the frames of one recording.

    Args:
        frames ([`CTCFrames`])
        embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`): of the LLM.
        texts (`list[list[int]]`): token ids of each. `ANYTHING` among them costs nothing and matches any frames (the star
            token of Pratap et al. 2022).
    """
    tokens = sorted({token for text in texts for token in text if token != ANYTHING})
    place = {token: number for number, token in enumerate(tokens, 1)} | {ANYTHING: len(tokens) + 1}
    if not len(frames.blanks):
        return [IMPOSSIBLE if text else 0.0 for text in texts]
    scores = (frames.queries @ embeddings[tokens].to(frames.queries.dtype).T).float() + frames.offsets[:, None]
    blanks = torch.tensor(frames.blanks, dtype=torch.float32, device=scores.device).unsqueeze(1)
    logprobs = torch.cat([blanks, scores, torch.zeros_like(blanks)], dim=1).unsqueeze(1).expand(-1, len(texts), -1)
    losses = torch.nn.functional.ctc_loss(
        logprobs,
        torch.tensor([place[token] for text in texts for token in text], dtype=torch.long, device=scores.device),
        torch.full((len(texts),), len(frames.blanks)),
        torch.tensor([len(text) for text in texts]),
        reduction="none",
    )
    return [max(-loss, IMPOSSIBLE) for loss in losses.tolist()]


class CTCPrefix:
    """
    A growing text and the CTC probability that the recording begins with it.

    Args:
        frames ([`CTCFrames`])
        embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`): of the LLM.
    """

    def __init__(self, frames: CTCFrames, embeddings: torch.Tensor):
        self.frames, self.embeddings = frames, embeddings
        # Log-probabilities that the frames up to each one spell the text, and that the last one is a token or a blank.
        self.token = np.full(len(frames.blanks), IMPOSSIBLE)
        self.blank = np.cumsum(frames.blanks)
        self.last, self.logprob = None, 0.0
        self.scored: dict[int, tuple] = {}

    def proposals(self) -> list[int]:
        """Tokens that the frames after the text may carry."""
        if not len(self.token):
            return []
        before = np.append(0.0 if self.last is None else IMPOSSIBLE, np.logaddexp(self.token, self.blank)[:-1])
        likely = (before[:, None] + self.frames.best_logprobs).ravel()
        return self.frames.best.ravel()[np.argsort(-likely)[:PROPOSALS]].tolist()

    def score(self, tokens: list[int]) -> np.ndarray:
        """Log-probability of each of `tokens` coming next, `(tokens,)`."""
        count, frames = len(tokens), len(self.token)
        if not frames:
            return np.full(count, IMPOSSIBLE)
        ids = torch.tensor(tokens, device=self.embeddings.device)
        scores = self.frames.queries @ self.embeddings[ids].to(self.frames.queries.dtype).T
        logprobs = (scores.float() + self.frames.offsets[:, None]).double().cpu().numpy()
        either = np.logaddexp(self.token, self.blank)
        # The same token again needs a blank between.
        again = np.array([token == self.last for token in tokens])
        before = np.where(again, self.blank[:, None], either[:, None])
        arrivals = np.full((frames, count), IMPOSSIBLE)
        arrivals[0] = logprobs[0] + (0.0 if self.last is None else IMPOSSIBLE)
        arrivals[1:] = before[:-1] + logprobs[1:]
        token, blank = np.full((frames, count), IMPOSSIBLE), np.full((frames, count), IMPOSSIBLE)
        token[0] = arrivals[0]
        for frame in range(1, frames):
            token[frame] = np.logaddexp(token[frame - 1] + logprobs[frame], arrivals[frame])
            blank[frame] = np.logaddexp(token[frame - 1], blank[frame - 1]) + self.frames.blanks[frame]
        reached = np.logaddexp.reduce(arrivals, axis=0)
        self.scored = {one: (token[:, place], blank[:, place], reached[place]) for place, one in enumerate(tokens)}
        return reached - self.logprob

    def end_score(self) -> float:
        """Log-probability of the text ending here."""
        if not len(self.token):
            return 0.0 if self.last is None else IMPOSSIBLE
        return float(np.logaddexp(self.token[-1], self.blank[-1])) - self.logprob

    def append(self, token: int):
        """Extend the text by a token of the last `score`."""
        self.token, self.blank, self.logprob = self.scored[token]
        self.last = token


def choose(logprobs: torch.Tensor, prefix: CTCPrefix, weight: float, stops: set[int]) -> int:
    """
    The likeliest token by LLM and CTC together, appended to the prefix unless it is a stop token.

    Args:
        logprobs (`torch.Tensor` of shape `(vocabulary,)`): of the LLM.
        prefix ([`CTCPrefix`])
        weight (`float`): of the CTC log-probabilities.
        stops (`set[int]`): tokens that end a text.
    """
    proposed = {*logprobs.topk(min(PROPOSALS, len(logprobs))).indices.tolist(), *prefix.proposals()}
    tokens = sorted(proposed - stops)
    scores = logprobs[tokens].double().cpu().numpy() + weight * prefix.score(tokens)
    stop = max(stops, key=lambda token: float(logprobs[token]), default=None)
    best = int(scores.argmax()) if tokens else None
    if stop is not None:
        end = float(logprobs[stop]) + weight * prefix.end_score()
        if best is None or end >= scores[best]:
            return stop
    prefix.append(tokens[best])
    return tokens[best]
