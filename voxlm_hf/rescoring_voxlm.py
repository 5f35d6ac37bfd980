"""
Rescoring: the reader proposes hypotheses; LLM, CTC and reader choose among them by their weighted log-probabilities.

The LLM knows which words go together and has the audio in its prompt, CTC on the projector's frames knows how much was said,
and the reader knows best which words were said.
"""

import copy
import functools
import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from .ctc_voxlm import ANYTHING, CTCFrames, ctc_frames, text_logprobs
from .decoding_voxlm import (
    DecodedText,
    EncodedBatch,
    encode_with_silence,
    pad_ids,
    padded_batches,
    stop_tokens,
    token_entropies,
)
from .processing_voxlm import VoxLMProcessor
from .reader_voxlm import LENGTH_REWARD, ReaderHypothesis
from .words_voxlm import plain_words


# Text tokens that are scored over the LLM's whole vocabulary at once. Chosen for memory: from 256 to 160 the first 7 minutes
# of an hour took 257 instead of 286 MB above the loaded model.
TOKENS_AT_ONCE = 160
# CTC counts no more than this against a text, in nats for each token of the longest hypothesis: a projector knows fewer
# words than a reader, but words that a short text leaves out count in full. Chosen by hand, not tuned.
MIN_CTC_PER_TOKEN = -10.0
# The weights of the models that judge what the reader proposes. Where none has any, the reader alone decides.
JUDGES = ("llm_weight", "ctc_weight")
# A word spelt letter by letter. LLM and frames cannot judge it, and its letters are no words that would earn a bonus, so it
# would always lose against a shorter spelling ("DEREK"); the reader's own reward for length makes up for that.
SPELT_OUT = re.compile(r"\W*\w(-\w)+\W*")
# Short unpadded audio is not what a decoder has learnt from: of 5 of 41 studio sentences of 2-4 s it left out most words, and
# others it wrote twice. Its list shows it: the empty text is likelier than this (a log-probability), or the tokens of the first
# text are outside these shares of the visible frames (too few of at least three, so that single words do not count). A second
# of silence behind the audio mended as many words, or two fewer of 30, as 2, 4 and 30 s did. All chosen on 107 sentences of
# less than 5 s (ARCTIC, AN4 and a few of Common Voice), none of them for measuring; twice that is short enough.
DOUBTFUL_EMPTY, DOUBTFUL_TOKENS_PER_FRAME, DOUBT_FROM_FRAMES = -6.0, (0.75, 2.0), 3
SILENCE_S, SHORT_S = 1.0, 10.0
# Where the frames' own tokens are likelier than blanks by more than this, in nats, something was said, even when no hypothesis
# matches them. 100 generated clips of music, noise and clicks reach 4 at most, 240 clips of cut speech 17 at least.
SURE_OF_SPEECH = 10.0


@dataclass
class Hypothesis:
    """
    One text that the reader proposes.

    Args:
        decoded ([`DecodedText`]): the text in the LLM's tokens; `score_hypotheses` adds the LLM's states and scores.
        known (`torch.BoolTensor` of shape `(tokens,)`): which of the tokens the LLM can judge: all but those of hotwords and,
            where it was trained on texts without them, of digits and words spelt letter by letter.
        ctc_ids (`list[int]`): without capitals and punctuation, as the projector's frames spell it; `ANYTHING` stands for
            words that they cannot spell: numbers in digits, words spelt letter by letter, hotwords.
        reader_logprob (`float`): the reader's log-probability of the whole text.
        unjudged_tokens (`int`): number of the reader's tokens in such words, without the first of each word.
        end_logprob (`float`): the LLM's log-probability of the text ending there.
        reader_score (`float`): what the reader alone compares texts by.
        hotword_bonus (`float`): of the hotwords in it, see `biasing_voxlm`.
    """

    decoded: DecodedText
    known: torch.Tensor
    ctc_ids: list[int]
    reader_logprob: float
    unjudged_tokens: int = 0
    end_logprob: float = 0.0
    reader_score: float = 0.0
    hotword_bonus: float = 0.0

    @property
    def llm_logprob(self) -> float:
        """The LLM's log-probability of the whole text, its end included, without tokens that it cannot judge."""
        return float(self.decoded.logprobs[self.known].sum()) + self.end_logprob


def hypotheses_of(model, processor: VoxLMProcessor, n_best: list, budget: float = math.inf) -> list[Hypothesis]:
    """
    The n-best list of one recording in the LLM's tokens; of texts that differ in capitals and punctuation only, the likeliest,
    with the probability of all of them.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader.
        processor ([`VoxLMProcessor`])
        n_best (`list[ReaderHypothesis]`): likeliest first.
        budget (`float`): most tokens of the LLM.
    """
    hypotheses: dict[tuple[int, ...], Hypothesis] = {}
    for proposed in n_best:
        groups = model.reader.to_llm_tokens(proposed.ids)
        proposed, groups = _within_budget(proposed, groups, budget)
        flat = [token for group in groups for token in group]
        text, words = processor.decode_text(flat).strip(), processor.split_words(flat)
        surface = [word.text for word in words]
        plain_ids, plain_token_words = processor.encode_words(text, surface, plain_words(surface))
        key = tuple(plain_ids)
        if key in hypotheses:
            same = hypotheses[key]
            same.reader_logprob = float(np.logaddexp(same.reader_logprob, proposed.logprob))
            continue
        hot = {word for hotword in proposed.hotwords for word in plain_words(hotword.split())}
        # Rare as they are, LLM and frames would undo hotwords.
        expected = np.array([word.removesuffix("'s") in hot for word in plain_words(surface)], dtype=bool)
        unjudged = expected | np.array([is_unjudged(word) for word in surface], dtype=bool)
        if model.config.reader_config["plain_text"]:
            ids, token_words = plain_ids, plain_token_words
            known = torch.tensor([not unjudged[word] for word in token_words], dtype=torch.bool)
        else:
            ids, token_words = processor.encode_words(text, surface, surface)
            known = torch.tensor([not expected[word] for word in token_words], dtype=torch.bool)
        owners = _word_owners(groups, words)
        decoded = DecodedText(
            ids,
            proposed.ended,
            text=text,
            words=surface,
            token_words=token_words,
            mean_logprob=float(np.mean(proposed.logprobs)) if proposed.ids else proposed.end_logprob,
            reader_logprobs=_word_logprobs(processor, groups, owners, proposed.logprobs),
        )
        # A word that comes again earns nothing, so that loops do not.
        novel = {word: len(parts) - 1 for word, parts in zip(surface, owners) if is_unjudged(word)}
        ctc_ids = _with_wildcards(plain_ids, unjudged[plain_token_words])
        hypotheses[key] = Hypothesis(
            decoded,
            known,
            ctc_ids,
            proposed.logprob,
            sum(novel.values()),
            reader_score=proposed.score,
            hotword_bonus=proposed.bonus,
        )
    return list(hypotheses.values())


def is_unjudged(word: str) -> bool:
    """Whether a word has digits or is spelt letter by letter ("D-E-R-E-K."), which plain text never has."""
    return any(char.isdigit() for char in word) or SPELT_OUT.fullmatch(word) is not None


def _within_budget(proposed: ReaderHypothesis, groups: list[list[int]], budget: float):
    """The hypothesis, and the LLM's tokens for each of its tokens, cut to `budget` tokens of the LLM."""
    kept = int((np.cumsum([len(group) for group in groups]) <= budget).sum())
    if kept < len(groups):
        proposed = ReaderHypothesis(proposed.ids[:kept], proposed.logprobs[:kept], ended=False)
    return proposed, groups[:kept]


def _with_wildcards(ids: list[int], unknown: np.ndarray) -> list[int]:
    """Token ids with one `ANYTHING` for every run of `unknown` tokens."""
    marked = [ANYTHING if flag else token for token, flag in zip(ids, unknown)]
    return [token for token, before in zip(marked, [None, *marked]) if token != ANYTHING or before != ANYTHING]


def _word_owners(groups: list[list[int]], words: list) -> list[set[int]]:
    """
    Which of the reader's tokens each word is made of.

    Args:
        groups (`list[list[int]]`): the LLM's tokens for each of the reader's.
        words (`list[Word]`): of the LLM's tokens one after another.
    """
    owners = [number for number, group in enumerate(groups) for _ in group]
    return [{owners[token] for token in word.tokens} for word in words]


def _word_logprobs(processor, groups: list[list[int]], owners: list[set[int]], logprobs: list[float]) -> list[float]:
    """
    The reader's log-probability of each word.

    Args:
        groups (`list[list[int]]`): the LLM's tokens for each of the reader's.
        owners (`list[set[int]]`): the reader's tokens of each word.
        logprobs (`list[float]`): of the reader's tokens.
    """
    # Punctuation is not part of what was said, unless the word is nothing else (or a character of several tokens).
    audible = [any(char.isalnum() for char in processor.decode_text(group)) for group in groups]
    spoken = [[part for part in sorted(word) if audible[part]] or sorted(word) for word in owners]
    return [sum(logprobs[part] for part in word) for word in spoken]


def rescore(
    model,
    processor: VoxLMProcessor,
    prompt: dict,
    budgets: list[int],
    batch: EncodedBatch,
    look_twice: bool = False,
    in_window: bool = False,
) -> list[DecodedText]:
    """
    The best hypothesis of each segment of a batch.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader.
        processor ([`VoxLMProcessor`])
        prompt (`dict`): of `decoding_voxlm.pack_prompt`.
        budgets (`list[int]`): most tokens of each segment.
        batch ([`EncodedBatch`])
        look_twice (`bool`): whether lists that are in doubt are replaced, see `propose`. Not with a caller's budget, which
            also makes texts short.
        in_window (`bool`): whether the reader decodes each segment padded with silence to the encoder's window.
    """
    settings = model.config.reader_config
    hypotheses = propose(model, processor, budgets, batch, look_twice, in_window)
    # A projector without token scores affects the text only through the LLM's prompt.
    frames = ctc_frames(model, batch.audio) if settings["ctc_weight"] else [None] * len(hypotheses)
    embeddings = model.get_input_embeddings().weight
    weights = [request.judging(settings) for request in batch.requests]
    hypotheses = [
        texts if any(own[name] for name in JUDGES) else [max(texts, key=lambda text: text.reader_score)]
        for texts, own in zip(hypotheses, weights)
    ]
    score_hypotheses(model, prompt, hypotheses)
    totals = [
        total_scores(texts, row if own["ctc_weight"] else None, embeddings, own)
        for texts, row, own in zip(hypotheses, frames, weights)
    ]
    return [texts[int(np.argmax(scores))].decoded for texts, scores in zip(hypotheses, totals)]


def propose(
    model, processor: VoxLMProcessor, budgets: list[int], batch: EncodedBatch, look_twice: bool, in_window: bool
) -> list[list[Hypothesis]]:
    """
    The reader's hypotheses for each segment of a batch. With `look_twice`, a list for a short segment that is in doubt is
    replaced by the list for the same segment with a second of silence behind it.

    Args:
        model, processor, budgets, batch, look_twice, in_window: see `rescore`.
    """

    settings = model.config.reader_config

    def decode(audio, budgets, requests, padded=False):
        room = model.reader.prompt_room
        prompts = [request.reader_prompt(settings, room) for request in requests]
        searches = [
            functools.partial(request.hotword_search, settings, room) if request.hotwords else None
            for request in requests
        ]
        n_best = model.reader(audio.last_hidden_state, audio.frame_mask, budgets, padded, prompts, searches)
        return [hypotheses_of(model, processor, *row) for row in zip(n_best, budgets)]

    if in_window:
        audio = encode_with_silence(model, processor, batch.segments, None)
        return decode(audio, budgets, batch.requests, padded=True)
    hypotheses = decode(batch.audio, budgets, batch.requests)
    longest_s = min(SHORT_S, processor.audio_window_s - SILENCE_S)
    doubtful = [
        row
        for row, (segment, texts, frames) in enumerate(zip(batch.segments, hypotheses, batch.visible_frames))
        if look_twice and segment.duration_s <= longest_s and in_doubt(texts, frames)
    ]
    if doubtful:
        audio = encode_with_silence(model, processor, [batch.segments[row] for row in doubtful], SILENCE_S)
        again = decode(audio, [budgets[row] for row in doubtful], [batch.requests[row] for row in doubtful])
        for row, texts in zip(doubtful, again):
            for text in texts:
                text.decoded.fallback = "window"
            hypotheses[row] = texts
    return hypotheses


def in_doubt(texts: list[Hypothesis], visible_frames: int | None) -> bool:
    """
    Whether the reader's list suggests that it left out or repeated something: the empty text is likely although something was
    said, or the first text has far fewer or far more tokens than there are frames that carry one.

    Args:
        texts (`list[Hypothesis]`): of one segment, the reader's best first.
        visible_frames (`int`, *optional*): number of frames that carry a token, for models with a frame gate.
    """
    empty = max((text.reader_logprob for text in texts if not text.decoded.ids), default=-math.inf)
    if visible_frames is None:
        return empty > DOUBTFUL_EMPTY
    if visible_frames == 0:
        return False
    fewest, most = (share * visible_frames for share in DOUBTFUL_TOKENS_PER_FRAME)
    tokens = len(texts[0].decoded.ids)
    too_few = visible_frames >= DOUBT_FROM_FRAMES and (empty > DOUBTFUL_EMPTY or tokens < fewest)
    return too_few or tokens > most


def total_scores(
    texts: list[Hypothesis], frames: CTCFrames | None, embeddings: torch.Tensor, settings: dict
) -> list[float]:
    """
    The weighted log-probability of each hypothesis of one recording, minus infinity for the empty text where CTC is sure of
    speech.

    Args:
        texts (`list[Hypothesis]`): scored by the LLM.
        frames ([`CTCFrames`], *optional*): of the recording.
        embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`): of the LLM.
        settings (`dict`): `config.reader_config`.
    """
    ctc = [0.0] * len(texts)
    if frames is not None:
        least = MIN_CTC_PER_TOKEN * max(len(text.ctc_ids) for text in texts)
        ctc = text_logprobs(frames, embeddings, [text.ctc_ids for text in texts])
        ctc = [max(score, least) if text.decoded.ids else score for text, score in zip(texts, ctc)]
    totals = [
        text.reader_logprob
        + settings["llm_weight"] * text.llm_logprob
        + settings["ctc_weight"] * ctc_score
        + settings["word_bonus"] * len(text.decoded.words)
        + LENGTH_REWARD * text.unjudged_tokens
        + text.hotword_bonus
        for text, ctc_score in zip(texts, ctc)
    ]
    # The frames decide whether anything was said: a model that knows none of the words prefers the empty text.
    sure = frames is not None and frames.speech_log_odds > SURE_OF_SPEECH
    return [
        -np.inf if not text.decoded.ids and (sure or ctc_score < max(ctc)) else total
        for text, ctc_score, total in zip(texts, ctc, totals)
    ]


def score_hypotheses(model, prompt: dict, hypotheses: list[list[Hypothesis]]):
    """
    Let the LLM score each hypothesis of each recording, in place. Each prompt goes through the LLM once, and so does each
    hypothesis.

    Args:
        prompt (`dict`): of the recordings, padded on the left.
        hypotheses (`list[list[Hypothesis]]`): of each recording.
    """
    output = model(**prompt, use_cache=True, logits_to_keep=1, output_hidden_states=True)
    cache, mask = output.past_key_values, prompt["attention_mask"]
    first_logprobs = output.logits[:, -1].float().log_softmax(-1)
    first_states = output.hidden_states[-1][:, -1]
    del output
    suppressed = model.generation_config.suppress_tokens or []
    stops = sorted(stop_tokens(model.generation_config.eos_token_id))
    rows = [(number, text) for number, texts in enumerate(hypotheses) for text in texts]
    for batch in padded_batches(rows, lambda row: len(row[1].decoded.ids), TOKENS_AT_ONCE):
        owners = torch.tensor([number for number, _ in batch], device=mask.device)
        lengths = [len(text.decoded.ids) for _, text in batch]
        ids = pad_ids([text.decoded.ids for _, text in batch], mask.device)
        logprobs, states = first_logprobs[owners].unsqueeze(1), first_states[owners].unsqueeze(1)
        if ids.shape[1]:
            real = torch.arange(ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)
            output = model(
                input_ids=ids,
                attention_mask=torch.cat([mask[owners], real.to(mask)], dim=1),
                past_key_values=_select_cache_rows(cache, owners),
                use_cache=True,
                output_hidden_states=True,
            )
            logprobs = torch.cat([logprobs, output.logits.float().log_softmax(-1)], dim=1)
            states = torch.cat([states, output.hidden_states[-1]], dim=1)
            del output
        entropies = torch.stack([token_entropies(row) for row in logprobs])
        logprobs[..., suppressed] = -torch.inf
        states = model.text_states(states, 1)
        for row, ((_, text), length) in enumerate(zip(batch, lengths)):
            text.decoded.logprobs = logprobs[row, :length].gather(-1, ids[row, :length].unsqueeze(-1)).squeeze(-1)
            # Copies, so that the padded batch can be freed.
            text.decoded.entropies, text.decoded.states = entropies[row, :length].clone(), states[row, :length].clone()
            text.end_logprob = float(logprobs[row, length, stops].max()) if stops else 0.0


def _select_cache_rows(cache, rows: torch.Tensor):
    """A copy of the LLM's cache with these rows of its batch, each as often as it is named."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.reorder_cache(rows)
    return copied
