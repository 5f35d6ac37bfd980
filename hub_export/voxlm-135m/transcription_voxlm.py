"""Results: the segments of a transcription, words with times and confidences, and joining segments to recordings."""

import difflib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

from .alignment_voxlm import NO_BYTE, spell_words
from .attention_times_voxlm import attention_scores
from .confidence_voxlm import word_confidence
from .decoding_voxlm import DecodedText, pad_ids
from .legacy_voxlm import dtw_word_times
from .outputs_voxlm import VoxLMAudioOutput
from .processing_voxlm import VoxLMProcessor
from .timing_voxlm import AlignmentScores, word_times
from .words_voxlm import join_texts


# Two overlapping segments mean the same word when its centres are no further apart than this. Chosen by hand: longer than a
# word takes, shorter than a repetition.
SAME_WORD_S = 0.5
# What is left, at least, of a word that has to make room for the one before it: one frame of Whisper.
SHORTEST_WORD_S = 0.02


@dataclass
class Segment:
    """
    The transcription of one segment of a recording.

    Args:
        start, end (`float`): in seconds of the recording.
        text (`str`)
        words (`list[dict]`), word_scores (`list[dict]`): see [`VoxLMTranscription`].
        mean_logprob (`float`, *optional*): mean log-probability of the text's tokens, in nats.
        truncated (`bool`): whether the token budget ended the text.
        gates (`list[str]`): quality gates that the text fires, see `fallback_voxlm.fired_gates`.
        fallback (`str` or `float`, *optional*): the fallback that the text comes from, when the first text fired a gate (see
            `fallback_voxlm.with_fallback`) or the reader's list was in doubt (see `rescoring_voxlm.propose`): "window",
            "halves", "projector", or the temperature of a sample.
        rejected (`str`, *optional*): a text that was taken for music or noise, and is not part of the result.
        ids (`list[int]`, *optional*): the tokens of the text, where the LLM wrote it by itself.
    """

    start: float
    end: float
    text: str = ""
    words: list[dict] = field(default_factory=list)
    word_scores: list[dict] = field(default_factory=list)
    mean_logprob: float | None = None
    truncated: bool = False
    gates: list[str] = field(default_factory=list)
    fallback: str | float | None = None
    rejected: str | None = None
    ids: list[int] | None = None

    def summary(self) -> dict:
        """The segment as an item of `VoxLMTranscription.segments`."""
        names = ("start", "end", "text", "mean_logprob", "gates", "fallback", "rejected")
        return {name: getattr(self, name) for name in names}


@dataclass
class VoxLMTranscription(ModelOutput):
    """
    The result for one recording; also a dict (`result["text"]`).

    Args:
        text (`str`): the transcript.
        words (`list[dict]`): `{"word", "start", "end", "confidence"}` in order, times in seconds of the recording, confidence
            in 0..1; empty when times were not asked for.
        duration (`float`): length of the recording in seconds.
        truncated (`bool`): whether the token budget ended the text of a segment before the model did.
        word_scores (`list[dict]`): what the confidence of each word is computed from: `{"logprob", "entropy"}`, the LLM's raw
            log-probability of its tokens together and the highest entropy among them, in nats; where the reader proposed the
            text also "reader", its log-probability, and "posterior", see `confidence_voxlm.word_posteriors`.
        segments (`list[dict]`): the segments that the recording was split into: `{"start", "end", "text", "mean_logprob",
            "gates", "fallback", "rejected"}`, see [`Segment`].
        language (`str`, *optional*): code of the language, as given or detected; `None` without a reader, and where the
            language of a recording without speech was to be detected.
        language_probability (`float`, *optional*): of a detected language.
        error (`str`, *optional*): why one recording of several could not be transcribed. This and the language are keys of the
            dict in any case.
    """

    text: str | None = None
    words: list[dict] | None = None
    duration: float | None = None
    truncated: bool | None = None
    word_scores: list[dict] | None = None
    segments: list[dict] | None = None
    language: str | None = None
    language_probability: float | None = None
    error: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("language", "language_probability", "error"):
            self[name] = getattr(self, name)  # the library leaves out what is `None`


def error_line(error: BaseException) -> str:
    """An error in one line, as results and messages have it."""
    return " ".join(str(error).split()) or type(error).__name__


def join_segments(
    segments: list[Segment], duration_s: float, error: str | None = None, spoken: dict | None = None
) -> VoxLMTranscription:
    """The transcription that consists of consecutive segments; `spoken` is that of its [`Request`]."""
    return VoxLMTranscription(
        text=join_texts([segment.text for segment in segments]),
        words=[word for segment in segments for word in segment.words],
        duration=round(duration_s, 3),
        truncated=any(segment.truncated for segment in segments),
        word_scores=[score for segment in segments for score in segment.word_scores],
        segments=[segment.summary() for segment in segments],
        **(spoken or {}),
        error=error,
    )


def merge_segments(segments: list[Segment]) -> Segment:
    """
    Consecutive segments as one. It fires every gate that one of them fires, and its `mean_logprob` is the lowest of theirs;
    rejected segments do not count unless all are.
    """
    kept = [segment for segment in segments if segment.rejected is None] or segments
    whole = join_segments(kept, 0.0)
    return Segment(
        start=segments[0].start,
        end=segments[-1].end,
        text=whole.text,
        words=whole.words,
        word_scores=whole.word_scores,
        mean_logprob=min((item.mean_logprob for item in kept if item.mean_logprob is not None), default=None),
        truncated=whole.truncated,
        gates=sorted({gate for segment in kept for gate in segment.gates}),
        rejected=kept[0].rejected,
    )


def trim_overlap(left: Segment, right: Segment):
    """Drop, in place, the words that two overlapping segments both contain."""
    kept, dropped = join_point(left.words, right.words, right.start, left.end)
    for segment, words in ((left, slice(0, kept)), (right, slice(dropped, None))):
        ends, position = [], 0
        for word in segment.words:
            position = segment.text.index(word["word"], position) + len(word["word"])
            ends.append(position)
        first, last = words.start or 0, len(ends) if words.stop is None else words.stop
        segment.text = segment.text[ends[first - 1] if first else 0 : ends[last - 1] if last else 0].strip()
        segment.words, segment.word_scores = segment.words[words], segment.word_scores[words]
    border_s = max([right.start, *(word["end"] for word in left.words[-1:])])
    shift_into_order(right.words, border_s)
    left.end = right.start = round(border_s, 3)


def join_point(left: list[dict], right: list[dict], start_s: float, end_s: float) -> tuple[int, int]:
    """
    Where to join the words of two segments that both contain `start_s`..`end_s`.

    Where both have the same words there, the longest common run joins them; else the middle of the stretch does.

    Args:
        left, right (`list[dict]`): words with "word", "start", "end" in seconds of the recording.

    Returns:
        how many words of `left` to keep, and how many of `right` to drop.
    """
    centres = [[(word["start"] + word["end"]) / 2 for word in words] for words in (left, right)]
    first = sum(centre < start_s for centre in centres[0])
    count = sum(centre <= end_s for centre in centres[1])
    texts = [[word["word"].casefold() for word in words] for words in (left[first:], right[:count])]
    match = difflib.SequenceMatcher(None, *texts, autojunk=False).find_longest_match()
    same = zip(centres[0][first + match.a :][: match.size], centres[1][match.b :][: match.size])
    if match.size and all(abs(one - other) <= SAME_WORD_S for one, other in same):
        return first + match.a + match.size, match.b + match.size
    halfway = (start_s + end_s) / 2
    return sum(centre < halfway for centre in centres[0]), sum(centre < halfway for centre in centres[1])


def shift_into_order(words: list[dict], from_s: float):
    """Shift words, in place, that begin before `from_s` or before the end of the word in front of them."""
    for word in words:
        word["start"] = max(word["start"], from_s)
        word["end"] = max(word["end"], round(word["start"] + SHORTEST_WORD_S, 3))
        from_s = word["end"]


def timed_words(
    model, processor: VoxLMProcessor, texts: list[DecodedText], audio: VoxLMAudioOutput, durations_s: list[float]
) -> list[tuple[list[dict], list[dict]]]:
    """
    Words with times and confidences of a batch of texts.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        processor ([`VoxLMProcessor`])
        texts (`list[DecodedText]`): with states, words and log-probabilities.
        audio ([`VoxLMAudioOutput`]): of the same batch.
        durations_s (`list[float]`): length of each recording in seconds.

    Returns:
        for each text its `words` (times in seconds from the start of `audio`) and `word_scores`, see [`VoxLMTranscription`].
    """
    if model.times_by_attention:
        times = attention_times(model, processor, texts, audio, durations_s)
    else:
        times = find_times(model, processor, texts, audio, durations_s)
    return [words_with_times(model, text, found) for text, found in zip(texts, times)]


def find_times(
    model, processor: VoxLMProcessor, texts: list[DecodedText], audio: VoxLMAudioOutput, durations_s: list[float]
) -> list[list[tuple[float, float]]]:
    """
    `(start, end)` of each word of a batch of texts, in seconds from the start of `audio`; arguments as of `timed_words`. A head
    that reads the spelling needs no more of a text than its words.
    """
    scores, owners = score_texts(model, texts, audio)
    frame_s, median_width = processor.frame_s * model.alignment.frames_per_key, model.config.alignment_median_width
    results = []
    for row, (text, num_frames) in enumerate(zip(texts, frame_counts(model, processor, audio, durations_s))):
        if median_width is None:
            times = word_times(scores, row, owners[row], num_frames, frame_s, durations_s[row], text.words)
        else:
            weights = scores.tokens[row, : len(text.ids), :num_frames].exp().cpu().numpy()
            duration_s = min(durations_s[row], num_frames * frame_s)
            times = dtw_word_times(weights, text.token_words, frame_s, duration_s, median_width)
        results.append(times)
    return results


def score_texts(model, texts: list[DecodedText], audio: VoxLMAudioOutput) -> tuple[AlignmentScores, list[np.ndarray]]:
    """
    The alignment head's scores of a batch of texts, and for each text the index of the word of each row of `scores.tokens`,
    negative for rows of no word; arguments as in `timed_words`.
    """
    if model.alignment.from_spelling:
        spelt = [spell_words(text.words or []) for text in texts]
        spelling = pad_ids([ids or [NO_BYTE] for ids, _ in spelt], model.device)
        return model.align_spelling(spelling, audio), [np.array(owners, dtype=int) for _, owners in spelt]
    # A text without tokens has no states.
    empty = torch.zeros(0, model.config.text_config.hidden_size, device=model.device)
    states = pad_sequence([text.states if text.ids else empty for text in texts], batch_first=True)
    scores = model.align_scores(states, pad_ids([text.ids for text in texts], states.device), audio)
    return scores, [text.token_words for text in texts]


def attention_times(
    model, processor: VoxLMProcessor, texts: list[DecodedText], audio: VoxLMAudioOutput, durations_s: list[float]
) -> list[list[tuple[float, float]]]:
    """As `find_times`, for texts of the reader, by its cross-attention."""
    scores, results = attention_scores(model, texts, audio), []
    for row, (text, count) in enumerate(zip(texts, audio.frame_mask.sum(-1).tolist())):
        frames = min(count, max(1, round(durations_s[row] / processor.frame_s)))
        results.append(
            word_times(scores, row, text.reader_words, frames, processor.frame_s, durations_s[row], text.words)
        )
    return results


def words_with_times(model, text: DecodedText, times: list[tuple[float, float]]) -> tuple[list[dict], list[dict]]:
    """`words` and `word_scores` of one text, see [`VoxLMTranscription`]."""
    raw = word_scores(text)
    confidences = [word_confidence(score, model.config.confidence_calibration) for score in raw]
    words = [
        {"word": word, "start": start, "end": end, "confidence": round(confidence, 4)}
        for word, (start, end), confidence in zip(text.words, times, confidences)
    ]
    return words, raw


def frame_counts(model, processor: VoxLMProcessor, audio: VoxLMAudioOutput, durations_s: list[float]) -> list[int]:
    """
    Number of the alignment head's frames that belong to each recording: a model that is fed the full window has frames of
    silence behind the recording's end.
    """
    frame_s = processor.frame_s * model.alignment.frames_per_key
    counts = model.alignment.keys_of(audio)[1].sum(-1).tolist()
    return [min(count, max(1, round(duration_s / frame_s))) for count, duration_s in zip(counts, durations_s)]


def word_scores(text: DecodedText) -> list[dict]:
    """`word_scores` of [`VoxLMTranscription`] for the words of a text."""
    scores = []
    for number in range(len(text.words)):
        tokens = np.flatnonzero(text.token_words == number)
        if not len(tokens):  # its characters are in a token that belongs to the word after it
            tokens = np.searchsorted(text.token_words, [number])
        # The probability of a word is the product over its tokens: all of them are needed to write it.
        logprob, entropy = text.logprobs[tokens].sum(), text.entropies[tokens].max()
        scores.append({"logprob": round(float(logprob), 4), "entropy": round(float(entropy), 4)})
    for score, logprob in zip(scores, text.reader_logprobs or []):
        score["reader"] = round(logprob, 4)
    for score, posterior in zip(scores, text.posteriors or []):
        score["posterior"] = round(posterior, 4)
    return scores
