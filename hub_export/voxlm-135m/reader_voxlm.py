"""
The audio model's own decoder, kept as a second reader of the audio beside the projector.

An encoder-decoder speech model has learnt from far more speech how its frames spell words than a projector can be taught with a few
hours. Its decoder proposes texts by beam search; LLM and projector then choose among them (`joint_voxlm`). The idea of letting an
ASR decoder and an LLM write together is that of SALSA (Mittal et al. 2024) and Whispering LLaMA (Radhakrishnan et al. 2023).
"""

from dataclasses import dataclass, replace

import torch
from torch import nn


# Audio models whose decoder can be driven step by step as below.
READER_MODELS = ("whisper",)
# A text this much worse than the best one, in nats, is given up.
BEAM_MARGIN = 6.0
# Each token makes a text less likely, so that half a recording would beat the whole: texts of unlike length are compared with so
# many nats for each token, but for those in a run of so many tokens which the text has had before: loops are not worth more.
LENGTH_REWARD, REPEATED_RUN = 0.4, 4
# Finished texts of one recording that are handed on, at most.
MOST_READINGS = 6


@dataclass
class Reading:
    """
    What the reader thinks was said.

    Args:
        ids (`list[int]`): in the audio model's vocabulary, without the token that ends the text.
        logprobs (`list[float]`): log-probability of each.
        end_logprob (`float`): log-probability of the text ending there; 0 for a text that the budget ended.
        ended (`bool`): whether it ended by itself.
        fresh (`int`): tokens outside runs that were there before. looping (`bool`): whether the last token is inside one.
    """

    ids: list[int]
    logprobs: list[float]
    end_logprob: float = 0.0
    ended: bool = True
    fresh: int = 0
    looping: bool = False

    @property
    def logprob(self) -> float:
        """Log-probability of the whole text, its end included."""
        return sum(self.logprobs) + self.end_logprob

    @property
    def worth(self) -> float:
        """What texts of unlike length are compared by."""
        return self.logprob + LENGTH_REWARD * self.fresh

    def followed_by(self, token: int, logprob: float) -> "Reading":
        """The text with one token more."""
        ids = [*self.ids, token]
        run, earlier = ids[-REPEATED_RUN:], range(len(ids) - REPEATED_RUN)
        looping = any(ids[place : place + REPEATED_RUN] == run for place in earlier)
        fresh = self.fresh + (not looping)
        if looping and not self.looping:
            fresh -= REPEATED_RUN - 1  # which did not look like a repetition yet
        return Reading(ids, [*self.logprobs, logprob], fresh=fresh, looping=looping)

    def finished(self, end_logprob: float = 0.0, ended: bool = True) -> "Reading":
        """The text as it is, ended by itself or by the budget."""
        return replace(self, end_logprob=end_logprob, ended=ended)


class VoxLMReader(nn.Module):
    """
    Beam search over the audio model's own decoder on the encoder states of bare audio.

    The decoder has learnt to stop on the silence that pads recordings to its window. Bare audio has none, so learned frames
    (`end`) follow the real ones, as keys of its cross-attention alone.

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
        # Scores tokens in the place of the embeddings they are tied to, when these are packed or in 8 bits.
        self.head: nn.Module | None = None
        self.end = nn.Parameter(torch.zeros(settings["end_frames"], audio_config.d_model))
        # Which of the LLM's tokens spell each of the decoder's: those of token i are spelling[offsets[i] : offsets[i + 1]].
        self.register_buffer("spelling", torch.zeros(settings["spelling_size"], dtype=torch.int32))
        self.register_buffer("spelling_offsets", torch.zeros(audio_config.vocab_size + 1, dtype=torch.int32))

    def spell(self, ids: list[int]) -> list[list[int]]:
        """The LLM's tokens for each of the decoder's."""
        tokens = torch.tensor(ids, dtype=torch.long, device=self.spelling.device)
        bounds = zip(self.spelling_offsets[tokens].tolist(), self.spelling_offsets[tokens + 1].tolist())
        return [self.spelling[first:end].tolist() for first, end in bounds]

    @torch.no_grad()
    def forward(self, states, mask, budgets: list[int]) -> list[list[Reading]]:
        """
        The best texts of each recording of a batch, best first.

        Args:
            states (`torch.Tensor` of shape `(batch, frames, audio_size)`): of the encoder.
            mask (`torch.LongTensor` of shape `(batch, frames)`): 1 for real frames, which come first.
            budgets (`list[int]`): most tokens of each recording.
        """
        cross, mask = self._keys(states, mask)
        room = self.decoder.embed_positions.weight.shape[0] - len(self.prompt_ids)
        searches = [BeamSearch(self.num_beams, min(budget, room)) for budget in budgets]
        rows = [number for number, search in enumerate(searches) if search.open]
        cache: list = [None] * len(self.decoder.layers)
        tokens = torch.tensor([[self.prompt_ids]] * len(rows), device=states.device)
        position = 0
        while rows:
            logprobs = self._step(
                tokens, position, [[part[rows] for part in pair] for pair in cross], mask[rows], cache
            )
            position += tokens.shape[-1]
            chosen = [searches[row].advance(scores, self.eos_token_id) for row, scores in zip(rows, logprobs)]
            # Rectangular: recordings with fewer open texts repeat their first.
            width = max(len(places) for places in chosen)
            parents, still_open = [], []
            for number, (row, places) in enumerate(zip(rows, chosen)):
                if places:
                    still_open.append(row)
                    places = places + [places[0]] * (width - len(places))
                    parents += [number * tokens.shape[1] + place for place in places]
            rows = still_open
            if rows:
                parents = torch.tensor(parents, device=states.device)
                cache = [[part[parents] for part in pair] for pair in cache]
                last = [[text.ids[-1] for text in searches[row].open] for row in rows]
                last = [ids + [ids[0]] * (width - len(ids)) for ids in last]
                tokens = torch.tensor(last, device=states.device).unsqueeze(-1)
        return [search.readings() for search in searches]

    def teacher_forced(self, states, mask, ids):
        """
        Logits `(batch, tokens, vocabulary)` for texts that are known.

        Args:
            states, mask: as in `forward`; ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompt and the text.
        """
        cross, mask = self._keys(states, mask)
        return self._logits(self._states(ids.unsqueeze(1), 0, cross, mask, [None] * len(cross))).squeeze(1)

    def _keys(self, states, mask):
        """
        Keys and values of each layer's cross-attention, `(batch, heads, frames, head size)`, with the learned frames behind the real
        ones of each row, and the mask of both as booleans.
        """
        states = states.to(self.end.dtype)
        lengths, extra = mask.sum(1), len(self.end)
        states = torch.cat([states, states.new_zeros(len(states), extra, states.shape[2])], dim=1)
        places = lengths.unsqueeze(1) + torch.arange(extra, device=states.device)
        rows = torch.arange(len(states), device=states.device).unsqueeze(1)
        states = states.index_put((rows, places), self.end.expand(len(states), -1, -1))
        parts = [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in self.decoder.layers]
        keys = [[self._heads(project(states)) for project in pair] for pair in parts]
        return keys, torch.arange(states.shape[1], device=states.device) < (lengths + extra).unsqueeze(1)

    def _heads(self, hidden_states):
        """`(batch, length, size)` to `(batch, heads, length, head size)`."""
        return hidden_states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend(self, attention, queries, keys, values, mask):
        """Attention of Whisper's: `queries` `(batch, length, size)`, the others as of `_heads`."""
        queries = self._heads(attention.q_proj(queries))
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))

    def _states(self, tokens, position: int, cross, mask, cache: list):
        """
        Last hidden states `(recordings, texts, length, size)` for tokens `(recordings, texts, length)`.

        Texts of one recording are queries beside each other to the same keys `cross`; `cache` has each text's own past keys and
        values, and is extended in place.
        """
        decoder, (recordings, texts, length) = self.decoder, tokens.shape
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
            hidden_states = hidden_states + self._attend(layer.self_attn, normed, *own, causal)
            normed = layer.encoder_attn_layer_norm(hidden_states).view(recordings, texts * length, -1)
            heard = self._attend(layer.encoder_attn, normed, keys, values, mask[:, None, None])
            hidden_states = hidden_states + heard.view_as(hidden_states)
            normed = layer.final_layer_norm(hidden_states)
            hidden_states = hidden_states + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return decoder.layer_norm(hidden_states).view(recordings, texts, length, -1)

    def _logits(self, hidden_states):
        """Scores of all tokens; minus infinity for those that spell nothing, but for the end of the text."""
        silent = self.spelling_offsets.diff() == 0
        silent[self.eos_token_id] = False
        if self.head:
            scores = self.head(hidden_states)
        else:
            # From this side, since a CPU is several times slower at few rows by many columns than at many rows by few columns.
            scores = self.decoder.embed_tokens.weight @ hidden_states.flatten(0, -2).T
            scores = scores.T.contiguous().unflatten(0, hidden_states.shape[:-1])
        return scores.float().masked_fill(silent, -torch.inf)

    def _step(self, tokens, position, cross, mask, cache):
        """Log-probabilities `(recordings, texts, vocabulary)` of what follows."""
        return self._logits(self._states(tokens, position, cross, mask, cache)[:, :, -1]).log_softmax(-1)


class BeamSearch:
    """
    The texts of one recording while they are written.

    Args:
        width (`int`): most texts at a time; budget (`int`): most tokens.
    """

    def __init__(self, width: int, budget: int):
        self.width, self.budget = width, budget
        self.open = [Reading([], [])] if budget > 0 else []
        self.finished: list[Reading] = []
        self.nothing: Reading | None = None

    def advance(self, logprobs, eos_token_id: int) -> list[int]:
        """
        Write one token more; returns which of the texts so far each of the new ones goes on from.

        Args:
            logprobs (`torch.Tensor` of shape `(texts, vocabulary)`): of the next token; rows beyond the open texts are ignored.
        """
        logprobs = logprobs[: len(self.open)]
        totals = logprobs + logprobs.new_tensor([text.logprob for text in self.open]).unsqueeze(1)
        best = totals.flatten().topk(min(2 * self.width, totals.numel())).indices.tolist()
        if self.nothing is None:
            self.nothing = Reading([], [], float(logprobs[0, eos_token_id]))
        done = sorted((text.worth for text in self.finished), reverse=True)
        # What is worth less than enough finished texts will hardly be worth more in the end.
        floor = max([-float("inf"), *(worth - BEAM_MARGIN for worth in done[:1]), *done[MOST_READINGS - 1 :]])
        likeliest = float(totals.max())
        texts, parents = [], []
        for index in best:
            parent, token = divmod(index, logprobs.shape[1])
            before, logprob = self.open[parent], float(logprobs[parent, token])
            if before.logprob + logprob < likeliest - BEAM_MARGIN:
                break
            if token == eos_token_id:
                text = before.finished(logprob)
                if before.ids and text.worth >= floor:
                    self.finished.append(text)
            elif len(texts) < self.width:
                text = before.followed_by(token, logprob)
                if text.worth >= floor:
                    texts.append(text)
                    parents.append(parent)
        self.open = texts
        if texts and len(texts[0].ids) >= self.budget:
            self.finished += [text.finished(ended=False) for text in texts if not self.finished]
            self.open = []
        return parents if self.open else []

    def readings(self) -> list[Reading]:
        """
        The finished texts, best first, none of them hopeless; and behind them, hopeless or not, that nothing was said, which
        others may know better.
        """
        ranked = sorted(self.finished, key=lambda text: -text.worth)[:MOST_READINGS]
        likely = [text for text in ranked if text.worth >= ranked[0].worth - BEAM_MARGIN]
        return [*likely, self.nothing or Reading([], [], ended=False)]


def spelling_table(audio_tokenizer, tokenizer, suppressed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which of the LLM's tokens spell each token of the audio model: all of them in a row, and where each one's begin.

    Tokens that are special, suppressed, or that the LLM's tokenizer cannot write exactly are spelt by none; the reader never writes
    them. Both tokenizers must work on bytes, as those of Whisper and of most LLMs do.

    Raises:
        ValueError: when hardly any token can be spelt.
    """
    special, vocabulary = set(audio_tokenizer.all_special_ids) | set(suppressed), tokenizer.get_vocab()
    strings = audio_tokenizer.convert_ids_to_tokens(list(range(len(audio_tokenizer))))
    texts = [audio_tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in range(len(strings))]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    written = tokenizer.batch_decode(encoded, clean_up_tokenization_spaces=False)
    spellings: list[list[int]] = []
    for token, (string, text, ids, again) in enumerate(zip(strings, texts, encoded, written)):
        if token in special or token in audio_tokenizer.added_tokens_decoder:
            spellings.append([])
        elif "\ufffd" in text:  # a part of a character, byte by byte
            parts = [vocabulary.get(char) for char in string]
            spellings.append([] if None in parts else parts)
        else:
            spellings.append(ids if again == text else [])
    spelt = sum(bool(ids) for ids in spellings)
    if spelt < len(spellings) / 2:
        raise ValueError(
            f"The LLM's tokenizer can write only {spelt} of the {len(spellings)} tokens of the audio model: a reader needs "
            "tokenizers that both work on bytes"
        )
    lengths = torch.tensor([0] + [len(ids) for ids in spellings])
    flat = [token for ids in spellings for token in ids]
    return torch.tensor(flat, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)


def prompt_ids(generation_config, language: str) -> list[int]:
    """
    What the texts of Whisper's decoder begin with: start, language, task, no timestamps.

    Args:
        generation_config ([`GenerationConfig`]): of the audio model; language (`str`): its code, such as "en".

    Raises:
        ValueError: for a language the model does not know.
    """
    start = [generation_config.decoder_start_token_id]
    if getattr(generation_config, "is_multilingual", False):
        languages = generation_config.lang_to_id
        if f"<|{language}|>" not in languages:
            raise ValueError(f"The audio model does not know the language {language!r}; it knows {' '.join(languages)}")
        start += [languages[f"<|{language}|>"], generation_config.task_to_id["transcribe"]]
    return [*start, generation_config.no_timestamps_token_id]
