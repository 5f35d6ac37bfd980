"""
The reader: the audio model's own decoder, kept to propose hypotheses.

An encoder-decoder speech model has learnt from far more speech how its frames are spelt than a projector can be taught with
a few hours. Its decoder proposes an n-best list by beam search; LLM and projector rescore it (`rescoring_voxlm`). Letting an
ASR decoder and an LLM decode together is the idea of SALSA (Mittal et al. 2024) and Whispering LLaMA (Radhakrishnan et al.
2023).
"""

import functools
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import initialization as init

from .biasing_voxlm import BiasState, Hotwords, ReaderVocabulary
from .language_voxlm import language_code


# Audio models whose decoder can be driven step by step as below.
READER_MODELS = ("whisper",)
# A hypothesis this much less likely than the best one, in nats, is dropped: e^6, about 400 times. Chosen by hand.
BEAM_MARGIN = 6.0
# Every token makes a text less likely, so half a recording would beat the whole: hypotheses of unlike length are compared
# with this many nats for each token, except in a run of REPEATED_RUN tokens that the text has had before, so that loops gain
# nothing. Chosen by hand after segments of 20-28 s ended after their first sentence (WER of the first 20 minutes of
# LibriSpeech dev-clean, 10 speakers: 5.46 % with it); not tuned.
LENGTH_REWARD, REPEATED_RUN = 0.4, 4
# Candidates that one step looks at, for each hypothesis that it may keep: the likeliest may end a text or be a variant.
CANDIDATES = 3
# How many steps a likelier hypothesis with the same words may be behind: as many punctuation marks.
REMEMBERED = 4
# Ends the words of a finished text, so that they are no beginning of others.
END_OF_WORDS = "\n"
# Longest n-best list of one recording, without the empty text. Chosen by hand: one more than the shipped model's beams.
MAX_HYPOTHESES = 6


@dataclass
class ReaderHypothesis:
    """
    A text as the reader proposes it, in the audio model's vocabulary.

    Args:
        ids (`list[int]`): without the token that ends the text.
        logprobs (`list[float]`): log-probability of each.
        end_logprob (`float`): log-probability of the text ending there; 0 for a text that the budget ended.
        ended (`bool`): whether it ended by itself.
        novel_tokens (`int`): number of tokens outside runs that the text has had before.
        repeating (`bool`): whether the last token is inside such a run.
        bias ([`BiasState`]), bonus (`float`): the hotwords in it and what they have earned, see `biasing_voxlm`.
        hotwords (`list[str]`): those in a finished text.
        shift (`float`): what makes its log-probability one behind the prompt of the others, see `with_hotword_texts`.
        words (`str`): the text without capitals and punctuation, where the search compares texts by their words.
        prefixes (`tuple[tuple[str, float], ...]`): `words` as they were lately, each with the log-probability of then.
        variants (`float`): what variants in capitals and punctuation add to the log-probability of the words.
    """

    ids: list[int]
    logprobs: list[float]
    end_logprob: float = 0.0
    ended: bool = True
    novel_tokens: int = 0
    repeating: bool = False
    bias: BiasState = BiasState()
    bonus: float = 0.0
    shift: float = 0.0
    hotwords: list[str] = field(default_factory=list)
    words: str = ""
    prefixes: tuple[tuple[str, float], ...] = ()
    variants: float = 0.0

    @property
    def logprob(self) -> float:
        """Log-probability of the whole text, its end included."""
        return sum(self.logprobs) + self.end_logprob + self.shift

    @property
    def score(self) -> float:
        """What hypotheses of unlike length are compared by."""
        return self.logprob + LENGTH_REWARD * self.novel_tokens + self.bonus

    def followed_by(self, token: int, logprob: float) -> "ReaderHypothesis":
        """The hypothesis with one more token."""
        ids = [*self.ids, token]
        run, earlier = ids[-REPEATED_RUN:], range(len(ids) - REPEATED_RUN)
        repeating = any(ids[place : place + REPEATED_RUN] == run for place in earlier)
        novel_tokens = self.novel_tokens + (not repeating)
        if repeating and not self.repeating:
            novel_tokens -= REPEATED_RUN - 1  # which did not look like a repetition yet
        return ReaderHypothesis(ids, [*self.logprobs, logprob], novel_tokens=novel_tokens, repeating=repeating)

    def finished(self, end_logprob: float = 0.0, ended: bool = True) -> "ReaderHypothesis":
        """The hypothesis as it is, ended by itself or by the budget."""
        return replace(self, end_logprob=end_logprob, ended=ended)


class VoxLMReader(nn.Module):
    """
    Beam search with the audio model's own decoder over encoder states of unpadded audio.

    The decoder has learnt to stop on the silence that pads recordings to its window. Unpadded audio has none, so learned
    frames (`end`) follow the real ones, as keys of the cross-attention only. Audio that fills the window needs none.

    Args:
        config ([`VoxLMConfig`]): with a `reader_config`.
        decoder (`nn.Module`): of the audio model, with `embed_tokens`, `embed_positions`, `layers` and `layer_norm`.
    """

    def __init__(self, config, decoder: nn.Module):
        super().__init__()
        settings, audio_config = config.reader_config, config.audio_config
        self.prompt_ids, self.eos_token_id = settings["prompt_ids"], settings["eos_token_id"]
        self.num_beams = settings["num_beams"]
        self.num_heads = audio_config.decoder_attention_heads
        self.decoder = decoder
        # Replaces the embeddings as the output layer when weights are packed or in 8 bits.
        self.head: nn.Module | None = None
        self.end = nn.Parameter(torch.zeros(settings["end_frames"], audio_config.d_model))
        # The LLM's tokens for the decoder's token i are spelling[offsets[i] : offsets[i + 1]].
        self.register_buffer("spelling", torch.zeros(settings["spelling_size"], dtype=torch.int32))
        self.register_buffer("spelling_offsets", torch.zeros(audio_config.vocab_size + 1, dtype=torch.int32))
        self._vocabulary: ReaderVocabulary | None = None
        # Of tokens that have come up, what `plain_piece` makes of them.
        self.pieces: dict[int, str] = {}

    def init_own_tensors(self):
        """Initialise what is in no layer."""
        for tensor in (self.end, self.spelling, self.spelling_offsets):
            init.zeros_(tensor)

    def to_llm_tokens(self, ids: list[int]) -> list[list[int]]:
        """The LLM's tokens for each of the decoder's tokens `ids`."""
        tokens = torch.tensor(ids, dtype=torch.long, device=self.spelling.device)
        bounds = zip(self.spelling_offsets[tokens].tolist(), self.spelling_offsets[tokens + 1].tolist())
        return [self.spelling[first:end].tolist() for first, end in bounds]

    @property
    def prompt_room(self) -> int:
        """Most tokens of context and hotwords in a prompt: half of the decoder's context, as in Whisper."""
        return self.decoder.embed_positions.weight.shape[0] // 2 - 1

    def vocabulary(self, tokenizer) -> ReaderVocabulary:
        """What the reader's tokens spell, made when it is first needed. `tokenizer` is the LLM's."""
        if self._vocabulary is None:
            self._vocabulary = ReaderVocabulary(self.spelling, self.spelling_offsets, tokenizer)
        return self._vocabulary

    @torch.no_grad()
    def forward(
        self,
        states,
        mask,
        budgets: list[int],
        padded: bool = False,
        prompts: list[list[int]] | None = None,
        hotwords: list[Callable | None] | None = None,
        spell: Callable[[int], str] | None = None,
    ) -> list[list[ReaderHypothesis]]:
        """
        The n-best list of each recording of a batch, best first.

        Args:
            states (`torch.Tensor` of shape `(batch, frames, audio_size)`): of the encoder.
            mask (`torch.LongTensor` of shape `(batch, frames)`): 1 for real frames, which come first.
            budgets (`list[int]`): token budget of each recording.
            padded (`bool`): whether the audio was padded to the encoder's window with silence, as the decoder learnt it.
            prompts (`list[list[int]]`, *optional*): what the decoder starts from, by default the config's prompt. Recordings
                whose prompts are of the same length are searched together.
            hotwords (`list[Callable]`, *optional*): for each recording `None` or a function that returns, for the ids of its best
                text, [`Hotwords`] and a prompt for a second search, so that wrong hotwords push nothing out of the first one's.
            spell (`Callable`, *optional*): see [`BeamSearch`].
        """
        prompts = prompts or [self.prompt_ids] * len(budgets)
        cross, mask = self._cross_attention_inputs(states, mask, self.end[:0] if padded else self.end)
        begin = functools.partial(BeamSearch, self.num_beams)
        room = self.decoder.embed_positions.weight.shape[0]
        plain = {
            row: (prompt, begin(min(budgets[row], room - len(prompt)), spell)) for row, prompt in enumerate(prompts)
        }
        n_best = self._search_all(plain, cross, mask)
        again = {}
        for row, sought in enumerate(hotwords or []):
            if sought is not None:
                words, prompt = sought(n_best[row][0].ids)
                again[row] = (prompt, begin(min(budgets[row], room - len(prompt)), hotwords=words))
        for row, biased in self._search_all(again, cross, mask).items():
            prompt, search = again[row]
            lost = self._lost_by(prompt, n_best[row][0], *_select_rows(cross, mask, [row]))
            n_best[row] = with_hotword_texts(n_best[row], biased, search.hotwords, lost)
        return list(n_best.values())

    def _lost_by(self, prompt: list[int], text: ReaderHypothesis, cross, mask) -> float:
        """
        How much less likely, in nats, a text is behind another prompt than that which it was found with; of a long text, as much
        of it as fits behind the prompt. `cross` and `mask` are of its one recording.
        """
        answer = [*text.ids, *([self.eos_token_id] if text.ended else [])]
        answer = answer[: self.decoder.embed_positions.weight.shape[0] - len(prompt)]
        ids = torch.tensor([[[*prompt, *answer]]], device=mask.device)
        hidden_states = self._hidden_states(ids[..., :-1], 0, cross, mask, [None] * len(cross))
        logits = self._logits(hidden_states[0, 0, len(prompt) - 1 :], self._forbidden_tokens())
        behind = float(logits.log_softmax(-1).gather(-1, ids[0, 0, len(prompt) :, None]).sum())
        return sum([*text.logprobs, text.end_logprob][: len(answer)]) - behind

    def _search_all(
        self, asked: dict[int, tuple[list[int], "BeamSearch"]], cross, mask
    ) -> dict[int, list[ReaderHypothesis]]:
        """
        The n-best lists of some recordings of a batch.

        Args:
            asked (`dict[int, tuple[list[int], BeamSearch]]`): prompt and search by recording.
            cross, mask: of `_cross_attention_inputs`, for all recordings.
        """
        searches = {row: search for row, (_, search) in asked.items()}
        lengths: dict[int, list[int]] = {}
        for row, (prompt, search) in asked.items():
            if search.open:
                lengths.setdefault(len(prompt), []).append(row)
        for rows in lengths.values():
            self._search(searches, rows, [asked[row][0] for row in rows], *_select_rows(cross, mask, rows))
        return {row: search.n_best() for row, search in searches.items()}

    def _search(self, searches: dict, rows: list[int], prompts: list[list[int]], cross, mask):
        """
        Run the searches of some recordings to their ends.

        Args:
            searches (`dict[int, BeamSearch]`): by recording.
            rows (`list[int]`): recordings whose `prompts` (`list[list[int]]`) have the same length.
            cross, mask: of `_cross_attention_inputs`, for these recordings.
        """
        cache: list = [None] * len(self.decoder.layers)
        tokens = torch.tensor(prompts, device=mask.device).unsqueeze(1)
        forbidden, position, prefix = self._forbidden_tokens(), 0, None
        while rows:
            hidden_states = self._hidden_states(tokens, position, cross, mask, cache, prefix)[:, :, -1]
            logprobs = self._logits(hidden_states, forbidden).log_softmax(-1)
            if position == 0 and tokens.shape[-1] > len(self.prompt_ids):
                # A long prompt is kept once for all hypotheses of a recording, not copied with each of them in each step.
                prefix, cache = cache, [None] * len(cache)
            position += tokens.shape[-1]
            chosen = [searches[row].advance(scores, self.eos_token_id) for row, scores in zip(rows, logprobs)]
            still_open = [number for number, places in enumerate(chosen) if places]
            if not still_open:
                break
            # Rectangular: recordings with fewer open hypotheses repeat their first.
            width = max(map(len, chosen))
            parents = [
                number * tokens.shape[1] + place
                for number in still_open
                for place in chosen[number] + [chosen[number][0]] * (width - len(chosen[number]))
            ]
            parents = torch.tensor(parents, device=mask.device)
            cache = [None if pair is None else [part[parents] for part in pair] for pair in cache]
            if len(still_open) < len(rows):
                rows = [rows[number] for number in still_open]
                prefix = prefix and _select_rows(prefix, mask, still_open)[0]
                cross, mask = _select_rows(cross, mask, still_open)
            last = [[text.ids[-1] for text in searches[row].open] for row in rows]
            last = [ids + [ids[0]] * (width - len(ids)) for ids in last]
            tokens = torch.tensor(last, device=mask.device).unsqueeze(-1)

    @torch.no_grad()
    def language_probabilities(self, states, mask, languages: dict[str, int], padded: bool = False) -> torch.Tensor:
        """
        Probabilities `(batch, languages)` of the languages that may be spoken, by one step of the decoder.

        Args:
            states, mask, padded: as in `forward`.
            languages (`dict[str, int]`): the decoder's token for each.
        """
        cross, mask = self._cross_attention_inputs(states, mask, self.end[:0] if padded else self.end)
        start = torch.tensor([[self.prompt_ids[:1]]] * len(states), device=states.device)
        hidden_states = self._hidden_states(start, 0, cross, mask, [None] * len(cross))[:, 0, -1]
        nothing = torch.zeros_like(self._forbidden_tokens())
        return self._logits(hidden_states, nothing)[:, list(languages.values())].softmax(-1)

    def teacher_force(self, states, mask, ids) -> torch.Tensor:
        """
        Logits `(batch, tokens, vocabulary)` for known texts.

        Args:
            states, mask: as in `forward`.
            ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompt and the text.
        """
        cross, mask = self._cross_attention_inputs(states, mask, self.end)
        hidden_states = self._hidden_states(ids.unsqueeze(1), 0, cross, mask, [None] * len(cross))
        return self._logits(hidden_states, self._forbidden_tokens()).squeeze(1)

    @torch.no_grad()
    def cross_attention(self, states, mask, ids, heads: list[tuple[int, int]], padded: bool = False) -> torch.Tensor:
        """
        What heads of the cross-attention look at while the decoder is given a text.

        Args:
            states, mask, padded: as in `forward`.
            ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompt and the text.
            heads (`list[tuple[int, int]]`): layer and number of each.

        Returns:
            `(batch, heads, tokens, frames)` weights, those of frames behind the audio included.
        """
        cross, mask = self._cross_attention_inputs(states, mask, self.end[:0] if padded else self.end)
        queries: dict[int, torch.Tensor] = {}
        hooks = [
            self.decoder.layers[layer].encoder_attn.q_proj.register_forward_hook(
                lambda module, inputs, output, layer=layer: queries.update({layer: self._heads(output)})
            )
            for layer in {layer for layer, _ in heads}
        ]
        try:
            self._hidden_states(ids.unsqueeze(1), 0, cross, mask, [None] * len(cross))
        finally:
            for hook in hooks:
                hook.remove()
        size = self.decoder.layers[0].encoder_attn.head_dim
        scores = [
            queries[layer][:, head] @ cross[layer][0][:, head].transpose(1, 2) / size**0.5 for layer, head in heads
        ]
        return torch.stack(scores, dim=1).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)

    def _cross_attention_inputs(self, states, mask, end):
        """
        Keys and values of each layer's cross-attention, `(batch, heads, frames, head size)`, with the frames `end` behind
        the real ones of each row, and the boolean mask of both.
        """
        states = states.to(end.dtype)
        lengths, extra = mask.sum(1), len(end)
        states = torch.cat([states, states.new_zeros(len(states), extra, states.shape[2])], dim=1)
        places = lengths.unsqueeze(1) + torch.arange(extra, device=states.device)
        rows = torch.arange(len(states), device=states.device).unsqueeze(1)
        states = states.index_put((rows, places), end.expand(len(states), -1, -1))
        projections = [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in self.decoder.layers]
        cross = [[self._heads(project(states)) for project in pair] for pair in projections]
        return cross, torch.arange(states.shape[1], device=states.device) < (lengths + extra).unsqueeze(1)

    def _heads(self, hidden_states):
        """`(batch, length, size)` to `(batch, heads, length, head size)`."""
        return hidden_states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend(self, attention, queries, keys, values, mask):
        """Whisper's attention: `queries` `(batch, length, size)`, keys and values as of `_heads`."""
        queries = self._heads(attention.q_proj(queries))
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))

    def _attend_behind(self, attention, queries, keys, values, prefix, recordings: int):
        """
        Self-attention of one token of each hypothesis to its own past and to the prompt.

        Args:
            queries (`torch.Tensor` of shape `(recordings * hypotheses, 1, size)`), keys, values (as of `_heads`): of hypotheses.
            prefix: keys and values of the prompts, as of `_heads`, one row for each recording.
        """
        queries = self._heads(attention.q_proj(queries)) * (queries.shape[-1] // self.num_heads) ** -0.5
        grouped = queries.squeeze(2).unflatten(0, (recordings, -1)).transpose(1, 2)
        shared = (grouped @ prefix[0].transpose(-1, -2)).transpose(1, 2).flatten(0, 1).unsqueeze(2)
        weights = torch.cat([shared, queries @ keys.transpose(-1, -2)], dim=-1).softmax(-1)
        shared, own = weights.tensor_split([prefix[0].shape[2]], dim=-1)
        shared = shared.squeeze(2).unflatten(0, (recordings, -1)).transpose(1, 2) @ prefix[1]
        mixed = own @ values + shared.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))

    def _hidden_states(self, tokens, position: int, cross, mask, cache: list, prefix: list | None = None):
        """
        Last hidden states `(recordings, hypotheses, length, size)` for tokens `(recordings, hypotheses, length)`.

        The hypotheses of one recording are queries beside each other to the same keys `cross`. `cache` holds the past keys
        and values of each hypothesis and is extended in place. With a `prefix`, the keys and values of each recording's prompt,
        the cache holds what is behind it, and `length` is 1.
        """
        decoder, (recordings, hypotheses, length) = self.decoder, tokens.shape
        places = decoder.embed_positions.weight[position : position + length]
        hidden_states = decoder.embed_tokens(tokens.flatten(0, 1)) + places
        total = position + length
        causal = torch.ones(length, total, dtype=torch.bool, device=tokens.device).tril(position)
        for number, (layer, (keys, values)) in enumerate(zip(decoder.layers, cross)):
            normed = layer.self_attn_layer_norm(hidden_states)
            own = [self._heads(part(normed)) for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
            if cache[number] is not None:
                own = [torch.cat(pair, dim=2) for pair in zip(cache[number], own)]
            cache[number] = own
            if prefix is None:
                attended = self._attend(layer.self_attn, normed, *own, causal)
            else:
                attended = self._attend_behind(layer.self_attn, normed, *own, prefix[number], recordings)
            hidden_states = hidden_states + attended
            normed = layer.encoder_attn_layer_norm(hidden_states).view(recordings, hypotheses * length, -1)
            attended = self._attend(layer.encoder_attn, normed, keys, values, mask[:, None, None])
            hidden_states = hidden_states + attended.view_as(hidden_states)
            normed = layer.final_layer_norm(hidden_states)
            hidden_states = hidden_states + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return decoder.layer_norm(hidden_states).view(recordings, hypotheses, length, -1)

    def _forbidden_tokens(self) -> torch.Tensor:
        """`(vocabulary,)` of bool: tokens that the LLM cannot spell, except the one that ends the text."""
        forbidden = self.spelling_offsets.diff() == 0
        forbidden[self.eos_token_id] = False
        return forbidden

    def _logits(self, hidden_states, forbidden):
        """Scores of all tokens `(..., vocabulary)`, minus infinity for forbidden ones."""
        if self.head is not None:
            scores = self.head(hidden_states)
        else:
            # From this side, since a CPU multiplies many rows by few columns several times faster than the reverse.
            scores = self.decoder.embed_tokens.weight @ hidden_states.flatten(0, -2).T
            scores = scores.T.contiguous().unflatten(0, hidden_states.shape[:-1])
        return scores.float().masked_fill(forbidden, -torch.inf)


def _select_rows(cross, mask, rows: list[int]):
    """Cross-attention inputs of some recordings of a batch; the very same tensors when they are all of them."""
    if len(rows) == len(mask):
        return cross, mask
    return [[part[rows] for part in pair] for pair in cross], mask[rows]


class BeamSearch:
    """
    The hypotheses of one recording while they grow. Of those with the same words, which differ in capitals and punctuation
    only, the likeliest goes on: variants of one text would take the places of other texts.

    Args:
        width (`int`): most hypotheses at a time.
        budget (`int`): most tokens.
        spell (`Callable`, *optional*): function from a token to what it adds to a text's words, see `plain_piece`. Without one
            all texts are different.
        hotwords ([`Hotwords`], *optional*): what earns a hypothesis a bonus.
    """

    def __init__(
        self, width: int, budget: int, spell: Callable[[int], str] | None = None, hotwords: Hotwords | None = None
    ):
        self.width, self.budget, self.spell, self.hotwords = width, budget, spell, hotwords
        # The best log-probability of any hypothesis with these words, and those of the variants that were dropped for it.
        self.likeliest: dict[str, float] = {}
        self.dropped: dict[str, set[float]] = {}
        self.open = [ReaderHypothesis([], [])] if budget > 0 else []
        self.finished: list[ReaderHypothesis] = []
        self.empty: ReaderHypothesis | None = None

    def advance(self, logprobs, eos_token_id: int) -> list[int]:
        """
        Extend the open hypotheses by one token.

        Args:
            logprobs (`torch.Tensor` of shape `(hypotheses, vocabulary)`): of the next token; rows beyond the open hypotheses
                are ignored.

        Returns:
            for each new open hypothesis, the index of the one that it extends.
        """
        logprobs = logprobs[: len(self.open)]
        totals = logprobs + logprobs.new_tensor([text.logprob + text.bonus for text in self.open]).unsqueeze(1)
        changes = None
        if self.hotwords is not None:
            changes = torch.stack([self.hotwords.changes(text.bias) for text in self.open]).to(totals)
            totals = totals + changes
        best = totals.flatten().topk(min(CANDIDATES * self.width, totals.numel())).indices.tolist()
        if self.empty is None:
            self.empty = ReaderHypothesis([], [], float(logprobs[0, eos_token_id]))
        done = sorted((text.score for text in self.finished), reverse=True)
        # What scores below enough finished hypotheses will hardly score above them in the end.
        floor = max([-float("inf"), *(score - BEAM_MARGIN for score in done[:1]), *done[MAX_HYPOTHESES - 1 :]])
        likeliest = float(totals.max())
        grown, parents = [], []
        for index in best:
            parent, token = divmod(index, logprobs.shape[1])
            before, logprob = self.open[parent], float(logprobs[parent, token])
            bonus = 0.0 if changes is None else before.bonus + float(changes[parent, token])
            if before.logprob + logprob + bonus < likeliest - BEAM_MARGIN:
                break
            if token == eos_token_id:
                text = replace(before.finished(logprob), bonus=bonus)
                if before.ids and text.score >= floor:
                    self._finish(text)
            elif len(grown) < self.width:
                text = self._with_words(before, before.followed_by(token, logprob))
                if self.hotwords is not None:
                    text = replace(text, bias=self.hotwords.advance(before.bias, token), bonus=bonus)
                # The likeliest goes on in any case: what was likelier with the same words may have come to nothing.
                if text.score >= floor and (self._is_likeliest(text) or not grown):
                    grown.append(text)
                    parents.append(parent)
        self.open = grown
        if grown and len(grown[0].ids) >= self.budget:
            self.finished += [text.finished(ended=False) for text in grown if not self.finished]
            self.open = []
        return parents if self.open else []

    def _with_words(self, before: ReaderHypothesis, text: ReaderHypothesis) -> ReaderHypothesis:
        """A hypothesis that is `before` and one more token, with its words."""
        if self.spell is None:
            return text
        piece = self.spell(text.ids[-1])
        if not piece:
            return replace(text, words=before.words, prefixes=before.prefixes)
        words = before.words + piece
        return replace(text, words=words, prefixes=(*before.prefixes[1 - REMEMBERED :], (words, text.logprob)))

    def _is_likeliest(self, text: ReaderHypothesis) -> bool:
        """Whether no likelier hypothesis has, or lately had, the same words; punctuation puts it some steps behind others."""
        for words, logprob in text.prefixes:
            if self.likeliest.get(words, -float("inf")) > logprob:
                self.dropped.setdefault(words, set()).add(logprob)
                return False
        self.likeliest.update(text.prefixes[-1:])
        return True

    def _finish(self, text: ReaderHypothesis):
        """Add a finished hypothesis, in the place of a variant that is less likely."""
        if self.spell is not None:
            words = text.words + END_OF_WORDS
            text = replace(text, words=words, prefixes=((words, text.logprob),))
            if not self._is_likeliest(text):
                return
            for variant in self.finished:
                if variant.words == words:
                    self.dropped.setdefault(words, set()).add(variant.logprob)
            self.finished = [other for other in self.finished if other.words != words]
        self.finished.append(text)

    def _with_variants(self, text: ReaderHypothesis) -> ReaderHypothesis:
        """A finished hypothesis with the probability of the variants that were dropped on its way."""
        shares = [
            sum(math.exp(logprob - self.likeliest[words]) for logprob in logprobs)
            for words, logprobs in self.dropped.items()
            if text.words.startswith(words)
        ]
        return replace(text, variants=sum(map(math.log1p, shares)))

    def n_best(self) -> list[ReaderHypothesis]:
        """
        The finished hypotheses within `BEAM_MARGIN` of the best, best first; last, whatever its score, the empty text, which
        the other models may know better.
        """
        ranked = sorted(self.finished, key=lambda text: -text.score)[:MAX_HYPOTHESES]
        likely = [text for text in ranked if text.score >= ranked[0].score - BEAM_MARGIN]
        return [*map(self._with_variants, likely), self.empty or ReaderHypothesis([], [], ended=False)]


def with_hotword_texts(
    plain: list[ReaderHypothesis], biased: list[ReaderHypothesis], hotwords: Hotwords, lost: float
) -> list[ReaderHypothesis]:
    """
    The n-best list of a search without hotwords and, between it and the empty text, the hypotheses of a search with them that
    have more of them than its best one and, with their bonus, are likelier.

    Both searches started from other prompts. So that their log-probabilities can be compared, those of the second are shifted by
    what the best text of the first lost by the other prompt, and by what its variants add to it.

    Args:
        plain, biased (`list[ReaderHypothesis]`): of `BeamSearch.n_best`.
        hotwords ([`Hotwords`])
        lost (`float`): by the best text, in nats.
    """
    plain, biased = ([with_found(text, hotwords) for text in texts] for texts in (plain, biased))
    had, known = plain[0].bonus, [text.ids for text in plain]
    more = [text for text in biased[:-1] if text.bonus > had and text.ids not in known]
    # LLM and frames do not judge hotwords, so a text with one has to be the likelier one by the reader already.
    more = [text for text in more if text.logprob + lost + text.bonus > plain[0].logprob + had]
    return [*plain[:-1], *(replace(text, shift=lost + plain[0].variants) for text in more), plain[-1]]


def with_found(text: ReaderHypothesis, hotwords: Hotwords) -> ReaderHypothesis:
    """A finished hypothesis with the hotwords in it and their bonus."""
    state = BiasState(found=hotwords.found_in(text.ids))
    return replace(text, hotwords=[hotwords.words[number] for number in state.found], bonus=hotwords.bonus(state))


def plain_piece(text: str, token: int) -> str:
    """
    What a token adds to a text's words: lower case, without punctuation and symbols other than apostrophes inside words.

    Args:
        text (`str`): what the token spells; with a replacement character where it is a part of one.
        token (`int`): its id, which stands for what cannot be compared by letters.
    """
    if "\ufffd" in text:
        return f"<{token}>"
    text = text.replace("’", "'").replace("-", " ")
    kept = [
        char.lower()
        for place, char in enumerate(text)
        if unicodedata.category(char)[0] not in "PS" or char == "'" and text[place + 1 : place + 2].isalpha()
    ]
    return "".join(kept) if any(not char.isspace() for char in kept) else ""


def token_table(audio_tokenizer, tokenizer, suppressed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The LLM's tokens for each token of the audio model: all of them in one row, and the offsets at which each one's begin.

    Special and suppressed tokens, and those that the LLM's tokenizer cannot reproduce exactly, have none; the reader never
    proposes them. Both tokenizers must work on bytes, as those of Whisper and of most LLMs do.

    Raises:
        ValueError: when fewer than half of the tokens have any.
    """
    special, vocabulary = set(audio_tokenizer.all_special_ids) | set(suppressed), tokenizer.get_vocab()
    strings = audio_tokenizer.convert_ids_to_tokens(list(range(len(audio_tokenizer))))
    texts = [audio_tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in range(len(strings))]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.batch_decode(encoded, clean_up_tokenization_spaces=False)
    rows: list[list[int]] = []
    for token, (string, text, ids, again) in enumerate(zip(strings, texts, encoded, decoded)):
        if token in special or token in audio_tokenizer.added_tokens_decoder:
            rows.append([])
        elif "\ufffd" in text:  # part of a character, byte by byte
            parts = [vocabulary.get(char) for char in string]
            rows.append([] if None in parts else parts)
        else:
            rows.append(ids if again == text else [])
    spelt = sum(bool(ids) for ids in rows)
    if spelt < len(rows) / 2:
        raise ValueError(
            f"The LLM's tokenizer can spell only {spelt} of the {len(rows)} tokens of the audio model: a reader needs "
            "tokenizers that both work on bytes"
        )
    lengths = torch.tensor([0] + [len(ids) for ids in rows])
    flat = [token for ids in rows for token in ids]
    return torch.tensor(flat, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)


def decoder_prompt(generation_config, language: str) -> dict:
    """
    Fields of `config.reader_config`: "prompt_ids", the tokens that Whisper's decoder starts from (start, language, task, no
    timestamps), and the "language" and "languages" among them.

    Args:
        generation_config ([`GenerationConfig`]): of the audio model.
        language (`str`): see `language_voxlm.language_code`.

    Raises:
        ValueError: for a language that the model does not know.
    """
    start, languages = [generation_config.decoder_start_token_id], {}
    if getattr(generation_config, "is_multilingual", False):
        languages = {name.strip("<|>"): token for name, token in generation_config.lang_to_id.items()}
    language = language_code(language, {"languages": languages, "language": "en"})
    if languages:
        start += [languages[language], generation_config.task_to_id["transcribe"]]
    prompt = [*start, generation_config.no_timestamps_token_id]
    return {"prompt_ids": prompt, "language": language, "languages": languages}
