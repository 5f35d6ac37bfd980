"""
Decoding an encoded batch: prompts, token budgets, greedy decoding with drafts, teacher forcing.

Greedy decoding takes the projector's own CTC text as a draft, of which the LLM checks several tokens in one pass.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin

from .ctc_voxlm import CTCPrefix, choose, ctc_frames
from .features_voxlm import halves, silence_behind
from .outputs_voxlm import VoxLMAudioOutput
from .placeholders_voxlm import marks_tokens, with_placeholders
from .processing_voxlm import VoxLMProcessor, check_context, context_length
from .request_voxlm import Request
from .segmentation_voxlm import AudioSegment, SegmentSpan
from .words_voxlm import plain_words, word_indices


# Token budget of a segment. English speech has about 4 tokens a second; generous for fast speech and for scripts that need
# a token or more per character. Chosen by hand.
TOKENS_PER_SECOND, MIN_TOKENS = 15, 16
# The same in languages that the LLM does not know: its vocabulary spells many scripts byte by byte. Chosen by hand.
FOREIGN_TOKENS_PER_SECOND = 60
# With a frame gate the number of visible frames bounds the text more tightly: what is this much longer is a loop. Chosen by
# hand: most tokens have a frame of their own, since CTC merges repeats.
TOKENS_PER_VISIBLE_FRAME = 1.25
# Draft tokens that one pass checks at most; more would often be rejected. Chosen by hand.
DRAFT_TOKENS_PER_PASS = 24
# After a wrong token the draft continues where it has the LLM's token, if that is at most this far ahead. Chosen by hand.
DRAFT_LOOKAHEAD = 4

# Options that leave the tokens of a greedy search as they are: those of sampling, of what `generate` returns and of how it
# stores its cache, and special tokens that a model knows already.
NOT_SEARCH = {
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "disable_compile",
    "do_sample",
    "eos_token_id",
    "max_cache_len",
    "max_length",
    "max_new_tokens",
    "min_p",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
}
# Inputs of `generate` that `transcribe` makes itself.
OWN_INPUTS = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "labels", "past_key_values", "audio_embeds"}
# Options that change a greedy text where they are not what the model's own generation config says.
GIVEN_TOKENS = {"eos_token_id", "suppress_tokens"}


@dataclass
class DecodedText:
    """
    The text of one segment, as the LLM decoded or scored it.

    Args:
        ids (`list[int]`): the LLM's tokens, without eos.
        ended (`bool`): whether the text ended with eos and not by its budget.
        states (`torch.Tensor` of shape `(tokens, text_size)`, *optional*): last hidden states for the alignment head.
        logprobs (`torch.Tensor` of shape `(tokens,)`, *optional*): raw log-probabilities of the tokens, in float32.
        entropies (`torch.Tensor` of shape `(tokens,)`, *optional*): of the distributions they were taken from, in nats.
        text (`str`, *optional*): without white space at either end. Where the reader proposed it, it may be spelt
            differently from what `ids` decode to.
        words (`list[str]`, *optional*): of the text, in order.
        token_words (`np.ndarray` of shape `(tokens,)`, *optional*): index of each token's word, -1 for tokens of no word.
        mean_logprob (`float`, *optional*): mean log-probability of the tokens, by the model that proposed the text.
        reader_logprobs (`list[float]`, *optional*): the reader's log-probability of each word, where it proposed the text.
        posteriors (`list[float]`, *optional*): of each word, among the hypotheses that the text was chosen from; see
            `confidence_voxlm.word_posteriors`.
        reader_ids (`list[int]`, *optional*), reader_words (`np.ndarray`, *optional*): the reader's tokens and the index of each
            one's word, -1 for tokens of no word, where it proposed the text.
        fallback (`str`, *optional*): "window" where the reader decoded the audio with silence behind it.
    """

    ids: list[int]
    ended: bool
    states: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    text: str | None = None
    words: list[str] | None = None
    token_words: np.ndarray | None = None
    mean_logprob: float | None = None
    reader_logprobs: list[float] | None = None
    posteriors: list[float] | None = None
    reader_ids: list[int] | None = None
    reader_words: np.ndarray | None = None
    fallback: str | None = None


@dataclass
class EncodedBatch:
    """
    Segments that are encoded and projected, with their prompts.

    Args:
        segments (`list[SegmentSpan]`)
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch, length)`): the prompts with one placeholder per
            projected frame.
        audio ([`VoxLMAudioOutput`])
        clips (`list[np.ndarray]`, *optional*): input features of each segment without padding, of which more can be encoded;
            `None` where the encoder's states alone were given.
        requests (`list[Request]`, *optional*): of each segment; without any, nothing is asked beyond the prompts.
        gated (`bool`): whether the frame gate says which frames carry a token.
    """

    segments: list[SegmentSpan]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    audio: VoxLMAudioOutput
    clips: list[np.ndarray] | None = None
    requests: list[Request] | None = None
    gated: bool = True

    def __post_init__(self):
        if self.requests is None:
            self.requests = [Request()] * len(self.segments)

    @functools.cached_property
    def visible_frames(self) -> list[int | None]:
        """
        Number of frames of each segment that pass the frame gate; `None` without a trained one, and in languages that the
        projector does not know.
        """
        if not self.gated or self.audio.gate_logits is None:
            return [None] * len(self.segments)
        counts = self.audio.visible_mask.sum(-1).tolist()
        return [count if request.own_language else None for count, request in zip(counts, self.requests)]

    def row(self, number: int) -> "EncodedBatch":
        """One segment by itself, without padding."""
        audio, kept = self.audio, self.attention_mask[number].bool()
        frames, projected = audio.frame_mask[number].bool(), audio.audio_embeds_mask[number].bool()
        masks = dict.fromkeys(("last_hidden_state", "projector_states", "frame_mask"), frames)
        fields = {
            name: value[number][masks.get(name, projected)].unsqueeze(0)
            for name, value in audio.items()
            if name not in ("hidden_states", "attentions")
        }
        return EncodedBatch(
            [self.segments[number]],
            self.input_ids[number][kept].unsqueeze(0),
            self.attention_mask[number][kept].unsqueeze(0),
            VoxLMAudioOutput(**fields),
            None if self.clips is None else [self.clips[number]],
            [self.requests[number]],
            self.gated,
        )


def encode(model, processor: VoxLMProcessor, segments: list[AudioSegment], requests: list[Request]) -> EncodedBatch:
    """
    Extract features, encode and project, once.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        processor ([`VoxLMProcessor`])
        segments (`list[AudioSegment]`)
        requests (`list[Request]`): of each.

    Raises:
        ValueError: for prompt and audio that leave no room in the LLM's context for a short text.
    """
    clips = processor.extract_clips([segment.waveform for segment in segments])
    features = on_device(model, processor.pad_clips(clips))
    prompts, counts = [request.prompt for request in requests], processor.count_audio_tokens(features)
    inputs = on_device(model, processor.prompt_ids(prompts, counts))
    audio = model.get_audio_features(**features)
    spans = [segment.span for segment in segments]
    return encoded_batch(model, spans, **inputs, audio=audio, clips=clips, requests=requests)


def encoded_batch(
    model, segments: list[SegmentSpan], input_ids, attention_mask, audio: VoxLMAudioOutput, clips=None, requests=None
) -> EncodedBatch:
    """[`EncodedBatch`] of what is encoded already, checked as in `encode`."""
    gated = not model.leaves_projector_out
    if gated:
        visible = model.visible_positions(input_ids, attention_mask, audio)
        check_prompt_length(model.config, visible, new_tokens=MIN_TOKENS)
    return EncodedBatch(segments, input_ids, attention_mask, audio, clips, requests, gated)


def encode_halves(model, processor: VoxLMProcessor, batch: EncodedBatch) -> EncodedBatch:
    """Both halves of the one segment of a batch, each encoded by itself behind the same prompt."""
    parts, share = halves(processor, batch.clips[0])
    features = on_device(model, processor.pad_clips(parts))
    counts, token = processor.count_audio_tokens(features), model.config.audio_token_id
    prompts = pack_prompts([with_placeholders(batch.input_ids[0], token, count) for count in counts])
    audio = model.get_audio_features(**features)
    return encoded_batch(model, batch.segments[0].divided(share), *prompts, audio, parts, batch.requests * 2)


def pack_prompts(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of unlike length as `input_ids` and `attention_mask` `(batch, length)`, padded on the left."""
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, (torch.arange(ids.shape[1], 0, -1, device=ids.device) <= lengths.unsqueeze(1)).long()


def on_device(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs where the model is."""
    return {name: value.to(model.device) for name, value in inputs.items()}


def check_prompt_length(config, attention_mask, input_ids=None, new_tokens: int = 1):
    """
    `check_context` for a batch of prompts with their audio.

    Args:
        config ([`VoxLMConfig`])
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): what it hides takes no room.
        input_ids (`torch.Tensor` of shape `(batch, length)` or, as embeddings, `(batch, length, text_size)`, *optional*): for
            prompts without a mask.
        new_tokens (`int`): how many tokens have to fit behind the prompt.
    """
    if marks_tokens(attention_mask):
        longest = int(attention_mask.sum(-1).max())
    else:
        longest = 0 if input_ids is None else input_ids.shape[1]
    check_context(context_length(config), longest, new_tokens)


def encode_with_silence(model, processor: VoxLMProcessor, clips: list[np.ndarray], seconds: float | None):
    """The encoder's output for clips with `seconds` of silence behind each, or with silence to the end of its window."""
    features = processor.pad_clips([silence_behind(processor, clip, seconds) for clip in clips])
    return model.encode_audio(**on_device(model, features))


def pack_left(visible: torch.Tensor, columns: dict[str, tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """
    Move the visible positions of each row to its right end, in order, and drop the columns that no row needs.

    Args:
        visible (`torch.Tensor` of shape `(batch, length)`): of 0 and 1, or of bool.
        columns (`dict`): name to a tensor of the same shape and the value for its padding.
    """
    visible = visible.bool()
    order = visible.long().argsort(dim=1, stable=True)[:, -max(1, int(visible.sum(1).max())) :]
    padding = ~visible.gather(1, order)
    return {name: values.gather(1, order).masked_fill(padding, fill) for name, (values, fill) in columns.items()}


def pack_inputs(model, audio: VoxLMAudioOutput, input_ids, attention_mask, **columns) -> dict[str, torch.Tensor]:
    """
    `forward`'s inputs without the frames that the gate hides, on which the LLM then spends nothing.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        audio ([`VoxLMAudioOutput`])
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch, length)`)
        **columns: more tensors of that shape, each with the value for its padding.
    """
    visible = model.visible_positions(input_ids, attention_mask, audio)
    columns |= {"input_ids": (input_ids, model.config.pad_token_id or 0), "attention_mask": (visible, 0)}
    embeds = {"audio_embeds": audio.pooler_output, "audio_embeds_mask": audio.visible_mask}
    return {**pack_left(visible, columns), **embeds}


def pack_prompt(model, batch: EncodedBatch) -> dict[str, torch.Tensor]:
    """`pack_inputs` for the prompts of a batch."""
    return pack_inputs(model, batch.audio, batch.input_ids, batch.attention_mask)


def padded_batches(items: Iterable, length_of: Callable, limit: float, size: float = math.inf) -> Iterator[list]:
    """
    Items in order, in batches whose number times their greatest length stays within `limit`, of at most `size`. An item longer
    than the limit is a batch of its own.
    """
    batch, longest = [], 0
    for item in items:
        longest = max(longest, length_of(item))
        if batch and (len(batch) == size or longest * (len(batch) + 1) > limit):
            yield batch
            batch, longest = [], length_of(item)
        batch.append(item)
    if batch:
        yield batch


def token_budgets(batch: EncodedBatch, max_new_tokens: int | None, context: int | None = None) -> list[int]:
    """
    Most tokens that the text of each segment may have: `max_new_tokens`, else a generous bound from the audio, but never more
    than fit behind the prompt into the LLM's context.
    """
    if max_new_tokens is not None:
        budgets = [max_new_tokens] * len(batch.segments)
    else:
        rows = zip(batch.segments, batch.requests, batch.visible_frames)
        budgets = [int(most_tokens(*row)) + MIN_TOKENS for row in rows]
    if context is None:
        return budgets
    audio = batch.audio
    hidden = 0 if audio.gate_logits is None else audio.audio_embeds_mask.sum(-1) - audio.visible_mask.sum(-1)
    room = context - (batch.attention_mask.sum(-1) - hidden)
    return [min(budget, most) for budget, most in zip(budgets, room.tolist())]


def most_tokens(segment: SegmentSpan, request: Request, visible_frames: int | None) -> float:
    """A generous bound of the tokens of a segment's text, from its audio."""
    if visible_frames is not None:
        return TOKENS_PER_VISIBLE_FRAME * visible_frames
    return (TOKENS_PER_SECOND if request.own_language else FOREIGN_TOKENS_PER_SECOND) * segment.duration_s


def search_options(generation_config, options: dict) -> dict:
    """
    Those of the options that make `generate` search otherwise than greedily. A value that is the library's default changes
    nothing, and sampling is off unless the caller asks for it.

    Args:
        generation_config ([`GenerationConfig`]): of the model.
        options (`dict`): arguments of `generate`.
    """
    saved, given = _set_fields(generation_config), given_options(options)
    defaults = {"synced_gpus": False, **GenerationConfig._get_default_generation_params()}

    def changes(name: str, value) -> bool:
        return name not in NOT_SEARCH and value != [] and (name not in defaults or value != defaults[name])

    search = {name: value for name, value in {**saved, **given}.items() if changes(name, value)}
    search |= {name: given[name] for name in GIVEN_TOKENS & given.keys() if given[name] != saved.get(name)}
    return {**search, "do_sample": True} if given.get("do_sample") else search


def token_budget(options: dict) -> int | None:
    """
    The most tokens that the caller of `transcribe` allows for a segment; `None` where the audio decides.

    Args:
        options (`dict`): arguments of `generate`.

    Raises:
        ValueError: for a budget that is no whole number or below 1, for `max_length`, which counts the prompt, and for several
            texts of one segment; also for what `transcribe` gives to `generate` itself.
    """
    given = given_options(options)
    own = sorted(OWN_INPUTS & given.keys())
    if own:
        raise ValueError(
            f"`transcribe` makes {', '.join(own)} from the audio and the prompt; use `generate` to pass them"
        )
    if "max_length" in given:
        raise ValueError(
            f"`max_length={given['max_length']!r}` counts prompt and audio too, whose lengths `transcribe` decides; pass "
            "`max_new_tokens`"
        )
    if given.get("num_return_sequences", 1) != 1:
        raise ValueError(f"`transcribe` returns one text, got `num_return_sequences={given['num_return_sequences']!r}`")
    budget = given.get("max_new_tokens")
    whole = isinstance(budget, (int, np.integer)) and not isinstance(budget, bool)
    if budget is not None and not (whole and budget >= 1):
        raise ValueError(f"`max_new_tokens` must be a whole number of at least 1, got {budget!r}")
    return budget


def check_flag(name: str, value):
    """
    Raises:
        ValueError: for an argument of the caller that is no bool.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}")


def given_options(options: dict) -> dict:
    """
    Options that are not `None`, those of a `generation_config` among them.

    Raises:
        ValueError: for one of another type.
    """
    given = {name: value for name, value in options.items() if value is not None}
    config = given.pop("generation_config", None)
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(f"`generation_config` must be a GenerationConfig, got {type(config).__name__}")
    return given if config is None else {**_set_fields(config), **given}


def _set_fields(generation_config) -> dict:
    """What is set in a [`GenerationConfig`]."""
    fields = generation_config.to_diff_dict()
    return {
        name: value
        for name, value in fields.items()
        if value is not None and name != "transformers_version" and not name.startswith("_")
    }


def stop_tokens(eos_token_id: int | list[int] | None) -> set[int]:
    """The ids that end a text, from `generation_config.eos_token_id`."""
    return {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])


def token_entropies(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropies in nats of log-probabilities `(..., vocabulary)`."""
    return -(logprobs.exp() * logprobs).sum(-1)


def draft_texts(model, processor: VoxLMProcessor, audio) -> list[list[int]]:
    """The greedy CTC text of each recording in the LLM's own tokenization; empty where frames are not scored as tokens."""
    # A cache with a sliding window counts tokens that the mask hides, so rejected drafts would push real ones out.
    sliding = DynamicCache(config=model.config.text_config).is_sliding
    if audio.tokens is None or any(sliding):
        return [[] for _ in audio.frame_mask]
    texts = [processor.text_prefix + processor.decode_text(row[row >= 0]).lstrip() for row in audio.tokens.cpu()]
    special = processor.special_ids
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[token for token in row if token not in special] for row in ids]


def next_draft(draft: list[int], position: int, token: int) -> int:
    """
    Where the draft continues after the LLM chose `token` instead of `draft[position]`.

    Args:
        draft (`list[int]`): tokens.
        position (`int`): of the first one that is not used up.
        token (`int`)
    """
    ahead = draft[position : position + DRAFT_LOOKAHEAD]
    return position + (ahead.index(token) if token in ahead else 0) + 1


class _GreedyRow:
    """One row of `greedy_decode` while its text grows."""

    def __init__(self, budget: int, draft: list[int], prefix: CTCPrefix | None):
        self.budget, self.draft, self.prefix, self.place = budget, draft, prefix, 0
        self.ids: list[int] = []
        self.ended = False
        self.states, self.logprobs, self.entropies = [], [], []

    @property
    def finished(self) -> bool:
        """Whether the text ended by itself or has used up its budget."""
        return self.ended or len(self.ids) >= self.budget

    def next_chunk(self) -> list[int]:
        """The draft tokens that the next pass checks."""
        room = self.budget - len(self.ids) - 1
        return [] if self.finished else self.draft[self.place : self.place + min(DRAFT_TOKENS_PER_PASS, room)]

    def advance(self, chunk, likeliest, logprobs, entropies, states, ctc_weight: float, stops: set[int]) -> int:
        """
        Accept the tokens of the chunk that the LLM predicts as well, and one token of its own; returns the number of those
        that agreed.

        Args:
            chunk (`list[int]`): of `next_chunk`.
            likeliest (`list[int]`): the LLM's likeliest token at each position.
            logprobs (`torch.Tensor` of shape `(positions, vocabulary)`), entropies `(positions,)`, states `(positions, size)`:
                of the pass over the row's last token and the chunk.
        """
        chosen: list[int] = []
        for position in range(len(chunk) + 1):
            if self.prefix is None:
                chosen.append(likeliest[position])
            else:
                chosen.append(choose(logprobs[position], self.prefix, ctc_weight, stops))
            if position == len(chunk) or chosen[-1] != chunk[position]:
                break
        agreed = len(chosen) - 1
        # The draft never holds a stop token, so only the LLM's own last token can be one.
        self.ended = chosen[-1] in stops
        kept = len(chosen) - self.ended
        self.ids += chosen[:kept]
        self.states.append(states[:kept])
        tokens = torch.tensor(chosen[:kept], dtype=torch.long, device=logprobs.device).unsqueeze(-1)
        self.logprobs.append(logprobs[:kept].gather(-1, tokens).squeeze(-1))
        self.entropies.append(entropies[:kept])
        self.place = next_draft(self.draft, self.place + agreed, chosen[-1])
        return agreed

    def decoded(self) -> DecodedText:
        """The finished text with its states, log-probabilities and entropies."""
        if not self.ids:
            return DecodedText([], self.ended)
        parts = (torch.cat(part) for part in (self.states, self.logprobs, self.entropies))
        return DecodedText(self.ids, self.ended, *parts)


@torch.no_grad()
def greedy_decode(
    model, prompt: dict, budgets: list[int], drafts: list[list[int]], prefixes: list[CTCPrefix] | None = None
) -> list[DecodedText]:
    """
    Greedy search in about as many passes as the drafts have mistakes.

    Every pass feeds each row its last token and the next tokens of its draft; those that the LLM predicts as well are
    accepted, followed by one token of its own (speculative decoding, Leviathan et al. 2023, with a CTC draft in place of a
    small model). The cache is only appended to: rejected tokens stay in it, hidden by the attention mask. With empty drafts
    it is the ordinary loop, one token a pass.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        prompt (`dict`): of `pack_prompt`.
        budgets (`list[int]`): most tokens of each row.
        drafts (`list[list[int]]`): proposed text of each row.
        prefixes (`list[CTCPrefix]`, *optional*): a new one for each row. Each token is then the likeliest by LLM and CTC
            together, the latter with weight `config.ctc_weight`.
    """
    stops = stop_tokens(model.generation_config.eos_token_id)
    suppressed = torch.tensor(model.generation_config.suppress_tokens or [], dtype=torch.long, device=model.device)
    rows = [_GreedyRow(*parts) for parts in zip(budgets, drafts, prefixes or [None] * len(budgets))]
    mask, device = prompt["attention_mask"], prompt["input_ids"].device
    pending, cache = prompt["input_ids"], None
    audio = {name: prompt[name] for name in ("audio_embeds", "audio_embeds_mask")}
    while not all(row.finished for row in rows):
        chunks = [row.next_chunk() for row in rows]
        width = max(map(len, chunks))
        chunk_ids, chunk_mask = pending.new_zeros(len(rows), width), mask.new_zeros(len(rows), width)
        for number, chunk in enumerate(chunks):
            chunk_ids[number, : len(chunk)] = torch.tensor(chunk, dtype=pending.dtype, device=device)
            chunk_mask[number, : len(chunk)] = 1
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
        audio, cache, states = {}, output.past_key_values, output.hidden_states[-1][:, -width - 1 :]
        logprobs = output.logits.float().log_softmax(-1)
        del output  # the logits are as large as all hidden states together
        entropies = torch.stack([token_entropies(row) for row in logprobs])  # row by row, to save memory
        logprobs.index_fill_(-1, suppressed, -torch.inf)
        likeliest = logprobs.argmax(-1).tolist()
        for number, row in enumerate(rows):
            if not row.finished:
                scores = likeliest[number], logprobs[number], entropies[number], states[number]
                agreed = row.advance(chunks[number], *scores, model.config.ctc_weight, stops)
                mask[number, mask.shape[1] - width + agreed :] = 0
        # A finished row continues with a token that nothing sees.
        last = [[row.ids[-1] if row.ids else 0] for row in rows]
        pending = torch.tensor(last, dtype=pending.dtype, device=device)
        mask = torch.cat([mask, mask.new_tensor([[int(not row.finished)] for row in rows])], dim=1)
    return [row.decoded() for row in rows]


def draft_and_decode(
    model, processor: VoxLMProcessor, prompt: dict, budgets: list[int], batch: EncodedBatch
) -> list[DecodedText]:
    """
    `greedy_decode` with the drafts and, with a `config.ctc_weight`, the CTC scores of a projector that scores the LLM's own
    tokens.
    """
    prefixes = None
    if model.config.ctc_weight and model.config.projector_merges is None:
        embeddings = model.get_input_embeddings().weight
        prefixes = [CTCPrefix(frames, embeddings) for frames in ctc_frames(model, batch.audio)]
    return greedy_decode(model, prompt, budgets, draft_texts(model, processor, batch.audio), prefixes)


def generate_text(model, prompt: dict, budgets: list[int], generate_kwargs: dict) -> list[DecodedText]:
    """The best of `generate_texts`."""
    return [texts[0][0] for texts in generate_texts(model, prompt, budgets, generate_kwargs)]


def generate_texts(
    model, prompt: dict, budgets: list[int], generate_kwargs: dict, count: int = 1
) -> list[list[tuple[DecodedText, float]]]:
    """
    Decode with the library's `generate`, for beams, sampling and whatever else its options ask for.

    The prompt is passed as embeddings, so that penalties on repetition apply to the text alone.

    Returns:
        for each row the best `count` texts with, where beams give them, their log-probabilities.
    """
    options = {"do_sample": False, **generate_kwargs, "max_new_tokens": max(budgets)}
    options.pop("return_dict_in_generate", None)  # what this function returns does not depend on it
    if count > 1:
        options |= {"num_return_sequences": count, "length_penalty": 0.0, "output_scores": True}
    embeds = model.merge_audio(prompt["input_ids"], None, prompt["audio_embeds"], prompt["audio_embeds_mask"])
    inputs = {"inputs_embeds": embeds, "attention_mask": prompt["attention_mask"], "return_dict_in_generate": True}
    output = GenerationMixin.generate(
        model, **inputs, **options
    )  # the library's own: audio and prompt are merged already
    # Each row at its own budget, so that its text does not depend on the rest of the batch.
    stops, rows = stop_tokens(model.generation_config.eos_token_id), output.sequences.tolist()
    logprobs = output.sequences_scores.tolist() if count > 1 else [0.0] * len(rows)
    texts = [_until_stop(row[: budgets[number // count]], stops) for number, row in enumerate(rows)]
    pairs = list(zip(texts, logprobs))
    return [pairs[first : first + count] for first in range(0, len(pairs), count)]


def _until_stop(ids: list[int], stops: set[int]) -> DecodedText:
    """The ids before the first stop token."""
    ends = [position for position, token in enumerate(ids) if token in stops]
    return DecodedText(ids[: ends[0]], True) if ends else DecodedText(ids, False)


@torch.no_grad()
def teacher_force(model, prompt: dict, texts: list[DecodedText]):
    """
    Fill in the states, log-probabilities and entropies of texts, in place, by one pass over prompts and texts.

    The pass sees the tokens that generation saw, so the states are those of the text that was chosen.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        prompt (`dict`): of `pack_prompt`.
        texts (`list[DecodedText]`): with `ids`, one for each row.
    """
    text_ids = pad_ids([text.ids for text in texts], prompt["input_ids"].device)
    longest = text_ids.shape[1]
    lengths = torch.tensor([len(text.ids) for text in texts], device=text_ids.device)
    text_mask = (torch.arange(longest, device=text_ids.device) < lengths.unsqueeze(1)).to(prompt["attention_mask"])
    output = model(
        **{
            **prompt,
            "input_ids": torch.cat([prompt["input_ids"], text_ids], dim=1),
            "attention_mask": torch.cat([prompt["attention_mask"], text_mask], dim=1),
        },
        output_hidden_states=True,
        logits_to_keep=longest + 1,
        use_cache=False,
    )
    hidden_states = output.hidden_states[-1]
    states = model.text_states(hidden_states, hidden_states.shape[1] - longest)
    distributions = output.logits[:, :-1].float().log_softmax(-1)
    logprobs = distributions.gather(-1, text_ids.unsqueeze(-1)).squeeze(-1)
    entropies = token_entropies(distributions)
    for row, text in enumerate(texts):
        length = len(text.ids)
        text.states, text.logprobs, text.entropies = (
            states[row, :length],
            logprobs[row, :length],
            entropies[row, :length],
        )


def split_decoded(processor: VoxLMProcessor, text: DecodedText):
    """Fill in, in place, the text and words of ids that the LLM decoded; a text of the reader has them already."""
    if text.text is None:
        words = processor.split_words(text.ids)
        text.text = processor.decode_text(text.ids).strip()
        text.words, text.token_words = [word.text for word in words], word_indices(words, len(text.ids))
    if text.mean_logprob is None and text.ids and text.logprobs is not None:
        text.mean_logprob = float(text.logprobs.mean())


def spoken_tokens(processor: VoxLMProcessor, text: DecodedText) -> int:
    """How many tokens the projector's frames would need for a split text."""
    if processor.projector_merges is None:
        return len(text.ids)
    return len(processor.spell_words(plain_words(text.words))[0])


def pad_ids(rows: list[list[int]], device) -> torch.Tensor:
    """Token ids of rows of unlike length, `(batch, tokens)`, padded on the right with 0."""
    return pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in rows], batch_first=True).to(device)
