"""
Rescoring: the reader proposes hypotheses; LLM, CTC and reader choose among them by their weighted log-probabilities.

The LLM knows which words go together, CTC on the projector's frames knows how much was said, and the reader knows best which
words were said. The LLM judges with LoRA and the audio in its prompt, or (`llm_prompt` "none") as the plain language model that
it is without either.
"""

import copy
import functools
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from .confidence_voxlm import word_posteriors
from .ctc_voxlm import ANYTHING, CTCFrames, ctc_frames, text_logprobs
from .decoding_voxlm import (
    DecodedText,
    EncodedBatch,
    encode_with_silence,
    pack_prompts,
    pad_ids,
    padded_batches,
    spoken_tokens,
    stop_tokens,
    token_entropies,
)
from .loading_voxlm import without_lora
from .placeholders_voxlm import cache_of
from .processing_voxlm import VoxLMProcessor
from .reader_voxlm import LENGTH_REWARD, ReaderHypothesis, plain_piece
from .words_voxlm import REPEATED_WORDS, encode_words, longest_loop, loop_units, novel_words, plain_words


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
# A phrase that comes more often in a row is a loop of the decoder where it proposes another text, too. Chosen by hand: people do
# say "no, no, no, no".
LOOP_TIMES = 4
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
        ctc_ids (`list[int]`): as the projector's frames spell it. `ANYTHING` stands for hotwords and, where they are without
            capitals and punctuation, for words that they cannot spell: numbers in digits, words spelt letter by letter.
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
        key, logprob = tuple(plain_ids), proposed.logprob + proposed.variants
        if key in hypotheses:
            same = hypotheses[key]
            same.reader_logprob = float(np.logaddexp(same.reader_logprob, logprob))
            continue
        ids, token_words, known, ctc_ids = _judged_tokens(
            model, processor, text, surface, (plain_ids, plain_token_words), proposed.hotwords
        )
        owners = _word_owners(groups, words)
        decoded = DecodedText(
            ids,
            proposed.ended,
            text=text,
            words=surface,
            token_words=token_words,
            mean_logprob=float(np.mean(proposed.logprobs)) if proposed.ids else proposed.end_logprob,
            reader_logprobs=_word_logprobs(processor, groups, owners, proposed.logprobs),
            reader_ids=list(proposed.ids),
            reader_words=_reader_words(owners, len(proposed.ids)),
        )
        # A word that comes again earns nothing, so that loops do not.
        novel = {word: len(parts) - 1 for word, parts in zip(surface, owners) if is_unjudged(word)}
        hypotheses[key] = Hypothesis(
            decoded,
            known,
            ctc_ids,
            logprob,
            sum(novel.values()),
            reader_score=proposed.score,
            hotword_bonus=proposed.bonus,
        )
    return without_loops(list(hypotheses.values()))


def without_loops(texts: list[Hypothesis]) -> list[Hypothesis]:
    """
    The hypotheses in which no phrase comes more often in a row than anybody says it, and of which not much more is a repetition
    than of the first one; all of them if there is no such text with words.
    """
    units = [loop_units(text.decoded.words) for text in texts]
    repeated = [len(words) - novel_words(words) for words in units]
    kept = [
        text
        for text, words, count in zip(texts, units, repeated)
        if longest_loop(words) <= LOOP_TIMES and count < repeated[0] + REPEATED_WORDS
    ]
    return kept if any(text.decoded.ids for text in kept) else texts


def _judged_tokens(model, processor, text: str, surface: list[str], plain: tuple, hotwords: list[str]) -> tuple:
    """
    `ids`, `token_words`, `known` and `ctc_ids` of a [`Hypothesis`].

    Args:
        text (`str`), surface (`list[str]`): the text and its words.
        plain (`tuple[list[int], np.ndarray]`): of `encode_words`, without capitals and punctuation.
        hotwords (`list[str]`): those in the text.
    """
    settings, cased = model.config.reader_config, processor.encode_words(text, surface, surface)
    hot = {word for hotword in hotwords for word in plain_words(hotword.split())}
    # Rare as they are, LLM and frames would undo hotwords.
    expected = np.array([word.removesuffix("'s") in hot for word in plain_words(surface)], dtype=bool)
    unjudged = expected | np.array([is_unjudged(word) for word in surface], dtype=bool)
    if model.config.judges_without_audio:
        (ids, words), unknown = encode_words(processor.tokenizer, text, surface, surface), expected
    else:
        (ids, words), unknown = (plain, unjudged) if settings["plain_text"] else (cased, expected)
    known = torch.tensor([not unknown[word] for word in words], dtype=torch.bool)
    ctc_ids, ctc_words = plain if processor.projector_merges is None else processor.spell_words(plain_words(surface))
    return ids, words, known, _with_wildcards(ctc_ids, unjudged[ctc_words])


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


def _reader_words(owners: list[set[int]], num_tokens: int) -> np.ndarray:
    """The index of the word that each of the reader's tokens belongs to, the first of several, -1 for none; `owners` as above."""
    words = np.full(num_tokens, -1)
    for number, parts in reversed(list(enumerate(owners))):
        words[list(parts)] = number
    return words


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
    # In languages that neither knows, the reader alone decides.
    weights = [request.judging(settings) for request in batch.requests]
    hypotheses = [
        texts
        if request.own_language or any(own[name] for name in JUDGES)
        else [max(texts, key=lambda text: text.reader_score)]
        for texts, request, own in zip(hypotheses, batch.requests, weights)
    ]
    judged = judge(model, prompt, batch, hypotheses, with_ctc=bool(settings["ctc_weight"]))
    totals = [known @ weights_of(own) for known, own in zip(judged, weights)]
    return [best_text(texts, scores) for texts, scores in zip(hypotheses, totals)]


def judge(
    model, prompt: dict, batch: EncodedBatch, hypotheses: list[list[Hypothesis]], with_ctc: bool
) -> list[np.ndarray]:
    """
    Let the LLM and, with `with_ctc`, the frames score hypotheses.

    Args:
        model, prompt, batch: see `rescore`.
        hypotheses (`list[list[Hypothesis]]`): of each segment; the LLM's scores are added to them.

    Returns:
        the `evidence` for each segment's hypotheses.
    """
    # A projector without token scores affects the text only through the LLM's prompt.
    frames = ctc_frames(model, batch.audio) if with_ctc else [None] * len(hypotheses)
    frames = [row if request.own_language else None for row, request in zip(frames, batch.requests)]
    embeddings = model.get_input_embeddings().weight
    score_hypotheses(model, prompt, hypotheses, [request.context_ids for request in batch.requests])
    return [evidence(texts, row, embeddings) for texts, row in zip(hypotheses, frames)]


def best_text(texts: list[Hypothesis], scores: np.ndarray) -> DecodedText:
    """The hypothesis with the highest score, with the posteriors of its words among all of them."""
    best = int(np.argmax(scores))
    decoded = texts[best].decoded
    decoded.posteriors = word_posteriors([text.decoded.words for text in texts], scores, best)
    return decoded


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

    def spell(token: int) -> str:
        pieces = model.reader.pieces
        if token not in pieces:
            pieces[token] = plain_piece(processor.decode_text(model.reader.to_llm_tokens([token])[0]), token)
        return pieces[token]

    def decode(audio, budgets, requests, padded=False):
        room = model.reader.prompt_room
        prompts = [request.reader_prompt(settings, room) for request in requests]
        searches = [
            functools.partial(request.hotword_search, settings, room) if request.hotwords else None
            for request in requests
        ]
        states, mask = audio.last_hidden_state, audio.frame_mask
        speller = spell if settings["distinct_words"] else None
        n_best = model.reader(states, mask, budgets, padded, prompts, searches, speller)
        return [hypotheses_of(model, processor, *row) for row in zip(n_best, budgets)]

    if in_window or (settings["in_window"] and batch.clips is not None):
        audio = encode_with_silence(model, processor, batch.clips, None)
        return decode(audio, budgets, batch.requests, padded=True)
    hypotheses = decode(batch.audio, budgets, batch.requests)
    longest_s = min(SHORT_S, processor.audio_window_s - SILENCE_S)
    doubtful = [
        row
        for row, (segment, texts, frames) in enumerate(zip(batch.segments, hypotheses, batch.visible_frames))
        if look_twice and segment.duration_s <= longest_s and in_doubt(processor, texts, frames)
    ]
    if doubtful:
        audio = encode_with_silence(model, processor, [batch.clips[row] for row in doubtful], SILENCE_S)
        again = decode(audio, [budgets[row] for row in doubtful], [batch.requests[row] for row in doubtful])
        for row, texts in zip(doubtful, again):
            for text in texts:
                text.decoded.fallback = "window"
            hypotheses[row] = texts
    return hypotheses


def in_doubt(processor: VoxLMProcessor, texts: list[Hypothesis], visible_frames: int | None) -> bool:
    """
    Whether the reader's list suggests that it left out or repeated something: the empty text is likely although something was
    said, or the first text has far fewer or far more tokens than there are frames that carry one.

    Args:
        processor ([`VoxLMProcessor`])
        texts (`list[Hypothesis]`): of one segment, the reader's best first.
        visible_frames (`int`, *optional*): number of frames that carry a token, for models with a frame gate.
    """
    empty = max((text.reader_logprob for text in texts if not text.decoded.ids), default=-math.inf)
    if visible_frames is None:
        return empty > DOUBTFUL_EMPTY
    if visible_frames == 0:
        return False
    fewest, most = (share * visible_frames for share in DOUBTFUL_TOKENS_PER_FRAME)
    tokens = spoken_tokens(processor, texts[0].decoded)
    too_few = visible_frames >= DOUBT_FROM_FRAMES and (empty > DOUBTFUL_EMPTY or tokens < fewest)
    return too_few or tokens > most


def weights_of(settings: dict) -> np.ndarray:
    """The weight of each column of `evidence`, from `config.reader_config`."""
    return np.array([1.0, settings["llm_weight"], settings["ctc_weight"], settings["word_bonus"], LENGTH_REWARD])


def evidence(texts: list[Hypothesis], frames: CTCFrames | None, embeddings: torch.Tensor) -> np.ndarray:
    """
    What hypotheses are chosen by, `(hypotheses, 5)`: the log-probabilities of reader (with the bonus of hotwords), LLM and CTC,
    the number of words that do not repeat others, and the number of tokens in words that only the reader can judge. The
    reader's is minus infinity for the empty text where CTC is sure of speech.

    Args:
        texts (`list[Hypothesis]`): of one recording, scored by the LLM.
        frames ([`CTCFrames`], *optional*): of the recording.
        embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`): of the LLM.
    """
    ctc = [0.0] * len(texts)
    if frames is not None:
        least = MIN_CTC_PER_TOKEN * max(len(text.ctc_ids) for text in texts)
        ctc = text_logprobs(frames, embeddings, [text.ctc_ids for text in texts])
        ctc = [max(score, least) if text.decoded.ids else score for text, score in zip(texts, ctc)]
    # The frames decide whether anything was said: a model that knows none of the words prefers the empty text.
    sure = frames is not None and frames.speech_log_odds > SURE_OF_SPEECH
    possible = [bool(text.decoded.ids) or not sure and score >= max(ctc) for text, score in zip(texts, ctc)]
    return np.array(
        [
            [
                text.reader_logprob + text.hotword_bonus if is_possible else -np.inf,
                text.llm_logprob,
                score,
                novel_words(loop_units(text.decoded.words)),
                text.unjudged_tokens,
            ]
            for text, score, is_possible in zip(texts, ctc, possible)
        ]
    )


def beginning_of_text(model, contexts: list[list[int]]) -> dict[str, torch.Tensor]:
    """
    The prompts of texts for a plain language model: its token for a text's beginning, else for its end, else padding, and behind
    it the context of each (ids, empty for none).
    """
    ends = sorted(stop_tokens(model.config.eos_token_id))
    tokens = [token for token in (model.config.bos_token_id, *ends, model.config.pad_token_id) if token is not None]
    ids, mask = pack_prompts([torch.tensor([tokens[0], *ids], device=model.device) for ids in contexts])
    return {"input_ids": ids, "attention_mask": mask}


def score_hypotheses(
    model, prompt: dict | None, hypotheses: list[list[Hypothesis]], contexts: list[list[int]] | None = None
):
    """
    Let the LLM score each hypothesis of each recording, in place: behind its prompt or, where `llm_prompt` is "none", without
    LoRA behind the token for the beginning of a text. Each prompt goes through the LLM once, and so does what a hypothesis
    shares with the beginning of its recording's first one.

    Args:
        prompt (`dict`, *optional*): of the recordings, padded on the left; not needed where `llm_prompt` is "none".
        hypotheses (`list[list[Hypothesis]]`): of each recording.
        contexts (`list[list[int]]`, *optional*): the LLM's ids of the text before each recording, where `llm_prompt` is "none".
    """
    without_audio = model.config.judges_without_audio
    prompt = beginning_of_text(model, contexts or [[]] * len(hypotheses)) if without_audio else prompt
    longest = max((len(text.decoded.ids) for texts in hypotheses for text in texts), default=0)
    families = [(row, texts) for row, texts in enumerate(hypotheses) if texts]
    if prompt["input_ids"].shape[1] + 2 * longest > _smallest_window(model):
        # What a mask hides in the cache would push out what it does not.
        families = [(row, [text]) for row, texts in families for text in texts]
    with without_lora(model.language_model) if without_audio else nullcontext():
        for group in padded_batches(families, lambda family: len(family[1][0].decoded.ids), TOKENS_AT_ONCE):
            _score_families(model, prompt, group)


def _smallest_window(model) -> float:
    """Most tokens that every layer of the LLM's cache keeps."""
    layers = DynamicCache(config=model.config.text_config).layers
    return min((layer.sliding_window for layer in layers if layer.is_sliding), default=math.inf)


def _score_families(model, prompt: dict, families: list[tuple[int, list[Hypothesis]]]):
    """
    `score_hypotheses` for some hypotheses: the first of each family in one pass, and in others what the rest do not share.

    Args:
        prompt (`dict`): of all recordings.
        families (`list[tuple[int, list[Hypothesis]]]`): rows of the prompt, and texts behind each.
    """
    rows = torch.tensor([row for row, _ in families], device=prompt["input_ids"].device)
    prompt = {name: value[rows] for name, value in prompt.items()}
    ids, real = pad_texts([texts[0].decoded.ids for _, texts in families], rows.device)
    mask = torch.cat([prompt["attention_mask"], real], dim=1)
    inputs = {**prompt, "input_ids": torch.cat([prompt["input_ids"], ids], dim=1), "attention_mask": mask}
    output = model(**inputs, use_cache=True, logits_to_keep=ids.shape[1] + 1, output_hidden_states=True)
    cache, passed = cache_of(output), _Pass(model, output, ids.shape[1] + 1)
    del output
    branches = []
    for family, (_, texts) in enumerate(families):
        for text in texts:
            scores, shared = _TextScores(text), common_prefix(texts[0].decoded.ids, text.decoded.ids)
            scores.add(passed, family, shared + 1)
            branches.append((family, scores, shared))
    del passed  # as large as the logits
    unshared = [branch for branch in branches if branch[2] < len(branch[1].ids)]
    for batch in padded_batches(unshared, lambda branch: len(branch[1].ids) - branch[2], TOKENS_AT_ONCE):
        _score_branches(model, cache, mask, prompt["input_ids"].shape[1], batch)
    for _, scores, _ in branches:
        scores.fill_in(model)


def _score_branches(
    model, cache, mask: torch.Tensor, prompt_length: int, branches: list[tuple[int, "_TextScores", int]]
):
    """
    The LLM's scores of what texts do not share with the first of their family.

    Args:
        cache: of the first texts behind their prompts, one row for each family; left as it is.
        mask (`torch.Tensor` of shape `(families, length)`): of the tokens in the cache.
        prompt_length (`int`): how many of them are the prompt's.
        branches (`list[tuple[int, _TextScores, int]]`): the family of each text, and how many tokens it shares.
    """
    families = torch.tensor([family for family, _, _ in branches], device=mask.device)
    shared = torch.tensor([count for _, _, count in branches], device=mask.device).unsqueeze(1)
    ids, real = pad_texts([scores.ids[count:] for _, scores, count in branches], mask.device)
    past = mask[families] * (torch.arange(mask.shape[1], device=mask.device) - prompt_length < shared)
    output = model(
        input_ids=ids,
        attention_mask=torch.cat([past, real], dim=1),
        past_key_values=_select_cache_rows(cache, families),
        use_cache=True,
        output_hidden_states=True,
    )
    passed = _Pass(model, output, ids.shape[1])
    for row, (_, scores, count) in enumerate(branches):
        scores.add(passed, row, len(scores.ids) - count)


class _Pass:
    """
    What the LLM says after each of the last `count` positions of a pass.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        output: of the pass, with hidden states.
        count (`int`)
    """

    def __init__(self, model, output, count: int):
        self.logprobs = output.logits.float().log_softmax(-1)
        self.entropies = torch.stack([token_entropies(row) for row in self.logprobs])  # row by row, to save memory
        self.logprobs[..., model.generation_config.suppress_tokens or []] = -torch.inf
        stops = sorted(stop_tokens(model.generation_config.eos_token_id))
        self.ends = self.logprobs[..., stops].amax(-1) if stops else torch.zeros_like(self.entropies)
        self.states = output.hidden_states[-1][:, -count:]


class _TextScores:
    """The LLM's scores of one text, gathered from passes over parts of it."""

    def __init__(self, text: Hypothesis):
        self.text, self.ids = text, text.decoded.ids
        self.logprobs, self.entropies, self.states = [], [], []

    def add(self, passed: _Pass, row: int, count: int):
        """What the first `count` positions of a row of a pass say about the text's next tokens, or its end."""
        known = sum(map(len, self.logprobs))
        ids = torch.tensor(self.ids[known : known + count], dtype=torch.long, device=passed.states.device)
        # Copies, so that the padded batch can be freed.
        self.logprobs.append(passed.logprobs[row, : len(ids)].gather(-1, ids.unsqueeze(-1)).squeeze(-1))
        self.entropies.append(passed.entropies[row, : len(ids)].clone())
        self.states.append(passed.states[row, :count].clone())
        if len(ids) < count:
            self.text.end_logprob = float(passed.ends[row, len(ids)])

    def fill_in(self, model):
        """Write the scores into the text."""
        decoded = self.text.decoded
        decoded.logprobs, decoded.entropies = torch.cat(self.logprobs), torch.cat(self.entropies)
        decoded.states = model.text_states(torch.cat(self.states).unsqueeze(0), 1)[0]


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    differ = (place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1])
    return next(differ, min(len(one), len(other)))


def pad_texts(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """`pad_ids`, and a mask of the same shape that is 1 for tokens."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = pad_ids(rows, device)
    return ids, (torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)).long()


def _select_cache_rows(cache, rows: torch.Tensor):
    """A copy of the LLM's cache with these rows of its batch, each as often as it is named."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.reorder_cache(rows)
    return copied
