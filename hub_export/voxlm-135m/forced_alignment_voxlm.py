"""Forced alignment: word times for a known text, and which of its words are not in the recording."""

from dataclasses import dataclass

import numpy as np
import torch

from .decoding_voxlm import DecodedText, EncodedBatch, encode, pack_prompt, teacher_force
from .outputs_voxlm import VoxLMAudioOutput
from .processing_voxlm import VoxLMProcessor, check_text
from .request_voxlm import Request
from .rescoring_voxlm import Hypothesis, score_hypotheses
from .segmentation_voxlm import AudioSegment
from .transcription_voxlm import Segment, VoxLMTranscription, frame_counts, timed_words
from .words_voxlm import EXTRA_WORD, OTHER_WORD, match_in_order, plain_words


# A word is taken to be in the recording when the LLM's log-probability of it, given audio and the words before, is at least
# this. Of words inserted or exchanged at random 91 % are found and 91 % of the right words kept, with voices that were not
# trained on. (The frames' posteriors divide all frames among the given words and tell them apart far worse.)
SPOKEN_FROM = -8.0


@dataclass
class KnownText:
    """
    A text to align.

    Args:
        text (`str`): as the tokenizer reproduces it.
        words (`list[str]`): of the text, in order.
    """

    text: str
    words: list[str]

    @property
    def places(self) -> list[int]:
        """Where each word begins in the text."""
        places, position = [], 0
        for word in self.words:
            places.append(self.text.index(word, position))
            position = places[-1] + len(word)
        return places


@dataclass
class ScoredText:
    """
    A known text, scored by the LLM as if it had decoded it.

    Args:
        decoded ([`DecodedText`]): with words, states and log-probabilities.
        audio ([`VoxLMAudioOutput`]): of the recording.
        num_frames (`int`): number of the alignment head's frames that belong to the recording.
    """

    decoded: DecodedText
    audio: VoxLMAudioOutput
    num_frames: int


def known_text(processor: VoxLMProcessor, text: str) -> KnownText:
    """Split a text into words.

    Raises:
        ValueError: for a text that cannot be aligned.
    """
    check_text(text, "The text to align")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    special = [token for token in ids if token in processor.special_ids]
    if special:
        token = processor.tokenizer.convert_ids_to_tokens(special[0])
        raise ValueError(f"The text to align contains the special token {token!r}, which nobody says; remove it")
    words = [word.text for word in processor.split_words(ids)]
    if not words:
        raise ValueError(f"The text to align has no words: {text!r}")
    return KnownText(processor.decode_text(ids), words)


@torch.no_grad()
def score_text(
    model, processor: VoxLMProcessor, waveform: np.ndarray, text: KnownText, prompt: str | None = None
) -> ScoredText:
    """
    Score a text as given and as a model without capitals and punctuation would write it; the likelier of the two.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        processor ([`VoxLMProcessor`])
        waveform (`np.ndarray` of shape `(samples,)`): of at most the model's window.
        text ([`KnownText`])
        prompt (`str`, *optional*): by default the trained prompt.

    Raises:
        ValueError: when there are fewer frames than words.
    """
    segment, words = AudioSegment(waveform, processor.sampling_rate), text.words
    batch = encode(model, processor, [segment], [Request(processor.render_prompt(prompt))])
    (num_frames,) = frame_counts(model, processor, batch.audio, [segment.duration_s])
    if num_frames < len(words):
        raise ValueError(
            f"The text has {len(words)} words, but the recording only {num_frames} frames to place them in"
        )
    spellings = [words] if plain_words(words) == words else [words, plain_words(words)]
    if model.times_by_attention:
        read = [read_text(model, processor, batch, text, spelt) for spelt in spellings]
        return ScoredText(max(read, key=lambda item: item.mean_logprob), batch.audio, num_frames)
    encoded = [processor.encode_words(text.text, words, spelt) for spelt in spellings]
    decoded = [DecodedText(ids, True, words=words, token_words=token_words) for ids, token_words in encoded]
    prompts = {name: value.expand(len(decoded), *value.shape[1:]) for name, value in pack_prompt(model, batch).items()}
    teacher_force(model, prompts, decoded)
    return ScoredText(max(decoded, key=lambda item: float(item.logprobs.mean())), batch.audio, num_frames)


def read_text(model, processor: VoxLMProcessor, batch: EncodedBatch, text: KnownText, spelt: list[str]) -> DecodedText:
    """
    A known text, scored as if the reader had proposed it, for a model whose alignment head is not trained.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader.
        batch ([`EncodedBatch`]): of the one recording.
        text ([`KnownText`])
        spelt (`list[str]`): what to write for each of its words.

    Raises:
        ValueError: for a text that is longer than the reader's context.
    """
    reader, audio, vocabulary = model.reader, batch.audio, model.reader.vocabulary(processor.tokenizer)
    spaced = [" " if not number or text.text[place - 1].isspace() else "" for number, place in enumerate(text.places)]
    rows = [vocabulary.encode(space + word) for space, word in zip(spaced, spelt)]
    reader_ids = [token for row in rows for token in row]
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    answer, room = [*reader_ids, reader.eos_token_id], reader.decoder.embed_positions.weight.shape[0]
    if len(reader.prompt_ids) + len(reader_ids) > room:
        raise ValueError(f"The text to align has {len(reader_ids)} tokens of the reader, whose context has {room}")
    ids = torch.tensor([[*reader.prompt_ids, *answer]], device=audio.last_hidden_state.device)
    logits = reader.teacher_force(audio.last_hidden_state, audio.frame_mask, ids[:, :-1])[0, -len(answer) :]
    logprobs = logits.log_softmax(-1).gather(-1, ids[0, -len(answer) :, None])[:, 0].double().cpu().numpy()
    by_word = [float(logprobs[:-1][owners == number].sum()) for number in range(len(rows))]
    tokens, token_words = processor.encode_words(text.text, text.words, spelt)
    decoded = DecodedText(
        tokens,
        True,
        words=text.words,
        token_words=token_words,
        mean_logprob=float(logprobs.mean()),
        reader_logprobs=by_word,
        reader_ids=reader_ids,
        reader_words=owners,
    )
    known = torch.ones(len(tokens), dtype=torch.bool)
    score_hypotheses(model, pack_prompt(model, batch), [[Hypothesis(decoded, known, [], float(logprobs.sum()))]])
    return decoded


def align_text(
    model, processor: VoxLMProcessor, waveform: np.ndarray, text: KnownText, prompt: str | None = None
) -> VoxLMTranscription:
    """Align a text with a recording of at most the model's window; arguments and errors as in `score_text`."""
    duration_s = len(waveform) / processor.sampling_rate
    scored = score_text(model, processor, waveform, text, prompt)
    ((words, word_scores),) = timed_words(model, processor, [scored.decoded], scored.audio, [duration_s])
    for word, score in zip(words, word_scores):
        word["spoken"] = score.get("reader", score["logprob"]) >= SPOKEN_FROM
    duration_s = round(duration_s, 3)
    return VoxLMTranscription(text.text, words, duration_s, truncated=False, word_scores=word_scores)


def align_segments(
    model, processor: VoxLMProcessor, waveform: np.ndarray, text: KnownText, prompt: str | None, segments: list[Segment]
) -> VoxLMTranscription:
    """
    Align a text with a recording longer than the window: each transcribed segment gets its share of the text.

    Args:
        model, processor, waveform, text, prompt: as in `align_text`.
        segments (`list[Segment]`): of the recording, transcribed, in order.

    Raises:
        ValueError: when there are none, or too few frames for a segment's words.
    """
    rate, given = processor.sampling_rate, text.words
    if not segments:
        raise ValueError(
            f"The text to align has {len(given)} words, but there is no speech in the {len(waveform) / rate:.1f} s"
        )
    starts = [*text.places, len(text.text)]
    words, word_scores, cuts = [], [], divide_words(given, segments)
    for segment, first, last in zip(segments, cuts[:-1], cuts[1:]):
        if first == last:
            continue
        samples = waveform[round(segment.start * rate) : round(segment.end * rate)]
        share = KnownText(text.text[starts[first] : starts[last]].strip(), given[first:last])
        part = align_text(model, processor, samples, share, prompt)
        for word in part.words:
            for edge in ("start", "end"):
                word[edge] = round(min(segment.start + word[edge], segment.end), 3)
        words += part.words
        word_scores += part.word_scores
    duration_s = round(len(waveform) / rate, 3)
    return VoxLMTranscription(text.text, words, duration_s, truncated=False, word_scores=word_scores)


def divide_words(given: list[str], segments: list[Segment]) -> list[int]:
    """
    Divide the words of a text among the segments of a recording.

    Args:
        given (`list[str]`): the words of the text.
        segments (`list[Segment]`): transcribed, in order.

    Returns:
        for each segment, and for the end, the index of its first word. Words between two segments that match neither
        transcript go to the segment with more room beside its matched words.
    """
    transcribed = [(number, word) for number, segment in enumerate(segments) for word in segment.words]
    known: dict[str, int] = {}
    numbers = [
        np.array([known.setdefault(word, len(known)) for word in plain_words(words)], dtype=np.int64)
        for words in (given, [word["word"] for _, word in transcribed])
    ]
    matches = match_in_order(
        lambda row: OTHER_WORD * (numbers[1] != numbers[0][row]), len(given), len(transcribed), EXTRA_WORD
    )
    # Of each segment the first and last word of the text that matches one of its own.
    spans: list[list[int] | None] = [None] * len(segments)
    for row, column in matches:
        number = transcribed[column][0]
        spans[number] = [spans[number][0] if spans[number] else row, row]
    cuts, before = [0], None
    for number, span in enumerate(spans):
        if span is None:
            continue
        if before is None:
            cuts += [0] * number
        else:
            left, right = segments[before], segments[number]
            earlier = left.end - left.words[-1]["end"] > right.words[0]["start"] - right.start
            cuts += [span[0] if earlier else spans[before][1] + 1] * (number - before)
        before = number
    if before is None:
        # Nothing of the transcript is in the text: to each segment by its length.
        lengths = np.cumsum([0.0] + [segment.end - segment.start for segment in segments])
        return [round(len(given) * float(length / lengths[-1])) for length in lengths]
    return cuts + [len(given)] * (len(segments) + 1 - len(cuts))
