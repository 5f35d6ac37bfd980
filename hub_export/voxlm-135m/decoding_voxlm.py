"""Greedy decoding with drafts: the projector's own reading of the audio, checked by the LLM several tokens at a time."""

from dataclasses import dataclass

import numpy as np
import torch

from .ctc_voxlm import CTCPrefix, choose


# Tokens of the draft that one pass may check; more would often be thrown away.
DRAFT_TOKENS_PER_PASS = 24
# After a word the draft has wrong, it goes on where it says the LLM's last token again, if that is at most so far ahead.
DRAFT_LOOKAHEAD = 4

# Options that leave a greedy search as it is, in a saved generation config and as arguments of `transcribe`.
PLAIN_OPTIONS = {"do_sample", "max_new_tokens", "temperature", "top_k", "top_p"}
PLAIN_FIELDS = {
    *PLAIN_OPTIONS,
    "bos_token_id",
    "eos_token_id",
    "max_length",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "suppress_tokens",
    "transformers_version",
    "use_cache",
}


@dataclass
class DecodedText:
    """
    Token ids of a batch of recordings and what the LLM thought when it wrote them.

    Args:
        ids (`list[list[int]]`): text tokens of each row, without eos.
        ended (`list[bool]`): whether the row ended with eos and not by its budget.
        states (`torch.Tensor` of shape `(batch, tokens, text_size)`, *optional*): last hidden state that predicted each token.
        logprobs (`torch.Tensor` of shape `(batch, tokens)`, *optional*): raw log-probability of each token, in float32.
        entropies (`torch.Tensor` of shape `(batch, tokens)`, *optional*): of the raw distribution it was drawn from, in nats.
        written (`list[Written]`, *optional*): where the tokens are not the very text: the text and its words.
    """

    ids: list[list[int]]
    ended: list[bool]
    states: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    written: list["Written"] | None = None


@dataclass
class Written:
    """
    A text that a reader wrote and the LLM has read, in words that both have tokens for.

    Args:
        text (`str`): without white space at its ends.
        words (`list[str]`): of the text, in order.
        token_words (`np.ndarray` of shape `(tokens,)`): number of the word that each of the LLM's tokens belongs to.
        reader_logprobs (`list[float]`): log-probability of each word by the reader.
        mean_logprob (`float`): of the reader's tokens.
    """

    text: str
    words: list[str]
    token_words: np.ndarray
    reader_logprobs: list[float]
    mean_logprob: float


def is_plain_greedy(generation_config, options: dict) -> bool:
    """Whether `generate` with this config and these arguments would be a bare greedy search; `do_sample` is off unless given."""
    fields = {key for key in generation_config.to_diff_dict() if not key.startswith("_")}
    return not options.get("do_sample") and set(options) <= PLAIN_OPTIONS and fields <= PLAIN_FIELDS


def next_draft(draft: list[int], position: int, token: int) -> int:
    """
    Where to go on in the draft after the LLM wrote `token` instead of `draft[position]`.

    Args:
        draft: tokens the projector reads; position: of the first one that is not used up.
    """
    ahead = draft[position : position + DRAFT_LOOKAHEAD]
    return position + (ahead.index(token) if token in ahead else 0) + 1


def stop_tokens(eos_token_id: int | list[int] | None) -> set[int]:
    """The ids that end a text, from `generation_config.eos_token_id`."""
    return {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])


def token_entropies(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropies in nats of log-probabilities `(..., vocabulary)`."""
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def greedy_decode(
    model, prompt: dict, budgets: list[int], drafts: list[list[int]], prefixes: list[CTCPrefix] | None = None
) -> DecodedText:
    """
    The ids of a greedy search, with the LLM's states, in as many passes as the drafts have mistakes (and some more).

    Every pass feeds each row its last token and the next tokens of its draft; those that the LLM predicts as well are
    accepted, with one token of its own behind them (speculative decoding, Leviathan et al. 2023, with a CTC draft in the
    place of a small model). The cache is only appended to: rejected tokens stay in it, hidden by the attention mask. With
    empty drafts it is the ordinary loop, one token a pass.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        prompt (`dict`): `input_ids` `(batch, length)` padded on the left, `attention_mask`, `audio_embeds` and
            `audio_embeds_mask`, as `forward` takes them.
        budgets (`list[int]`): most tokens of each row; drafts (`list[list[int]]`): guessed text of each row.
        prefixes (`list[CTCPrefix]`, *optional*): of each row, new; then each token is the one that LLM and frames together, these
            with `config.ctc_weight`, find likeliest.
    """
    stops = stop_tokens(model.generation_config.eos_token_id)
    suppressed = model.generation_config.suppress_tokens or []
    mask, device = prompt["attention_mask"], prompt["input_ids"].device
    count = len(budgets)
    ids, places = [[] for _ in range(count)], [0] * count
    ended, finished = [False] * count, [budget < 1 for budget in budgets]
    states, logprobs, entropies = ([[] for _ in range(count)] for _ in range(3))
    audio = {name: prompt[name] for name in ("audio_embeds", "audio_embeds_mask")}
    pending, cache = prompt["input_ids"], None
    while not all(finished):
        chunks = [
            [] if finished[row] else drafts[row][places[row] : places[row] + min(DRAFT_TOKENS_PER_PASS, room)]
            for row, room in enumerate(budget - len(done) - 1 for budget, done in zip(budgets, ids))
        ]
        width = max(map(len, chunks))
        chunk_ids = pending.new_zeros(count, width)
        chunk_mask = mask.new_zeros(count, width)
        for row, chunk in enumerate(chunks):
            chunk_ids[row, : len(chunk)] = torch.tensor(chunk, dtype=pending.dtype, device=device)
            chunk_mask[row, : len(chunk)] = 1
        mask = torch.cat([mask, chunk_mask], dim=1)
        output = model(
            input_ids=torch.cat([pending, chunk_ids], dim=1),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=width + 1,
            output_hidden_states=True,
            **audio,
        )
        cache, hidden = output.past_key_values, output.hidden_states[-1][:, -width - 1 :]
        raw = output.logits.float().log_softmax(-1)
        del output  # the logits are as large as the whole model's states
        entropy = torch.stack([token_entropies(row) for row in raw])  # row by row, for the memory's sake
        raw[..., suppressed] = -torch.inf
        likeliest = raw.argmax(-1).tolist()
        for row in range(count):
            if finished[row]:
                continue
            taken: list[int] = []
            for position in range(len(chunks[row]) + 1):
                if prefixes is None:
                    taken.append(likeliest[row][position])
                else:
                    taken.append(choose(raw[row, position], prefixes[row], model.config.ctc_weight, stops))
                if position == len(chunks[row]) or taken[-1] != chunks[row][position]:
                    break
            agreed = len(taken) - 1
            # The draft never holds a stop token, so only the LLM's own last token can be one.
            ended[row] = taken[-1] in stops
            kept = len(taken) - ended[row]
            ids[row] += taken[:kept]
            states[row].append(hidden[row, :kept])
            chosen = torch.tensor(taken[:kept], dtype=torch.long, device=device).unsqueeze(-1)
            logprobs[row].append(raw[row, :kept].gather(-1, chosen).squeeze(-1))
            entropies[row].append(entropy[row, :kept])
            finished[row] = ended[row] or len(ids[row]) >= budgets[row]
            places[row] = next_draft(drafts[row], places[row] + agreed, taken[-1])
            mask[row, mask.shape[1] - width + agreed :] = 0
        # A finished row goes on with a token that nothing sees.
        pending = torch.tensor([[row[-1] if row else 0] for row in ids], dtype=pending.dtype, device=device)
        mask = torch.cat([mask, mask.new_tensor([[int(not done)] for done in finished])], dim=1)
    return DecodedText(
        ids=ids,
        ended=ended,
        states=_pad(
            [torch.cat(row) if row else torch.zeros(0, model.config.text_config.hidden_size) for row in states]
        ),
        logprobs=_pad([torch.cat(row) if row else torch.zeros(0) for row in logprobs]),
        entropies=_pad([torch.cat(row) if row else torch.zeros(0) for row in entropies]),
    )


def _pad(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([row.to(rows[0].device) for row in rows], batch_first=True)
