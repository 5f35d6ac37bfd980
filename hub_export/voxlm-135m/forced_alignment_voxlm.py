"""Forced alignment: word times for a text that is given, and which of its words are not in the recording."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .alignment_voxlm import AlignmentScores, word_times
from .audio_voxlm import is_batch, one_for_each
from .decoding_voxlm import DecodedText
from .processing_voxlm import plain_words
from .transcription_voxlm import (
    VoxLMTranscription,
    confidences,
    prompt_with_audio,
    read_states,
    transcribe,
    word_scores,
)


# A word is taken to be in the recording when the LLM's log-probability of it, given audio and the words before, is at least this.
# Words put into or exchanged in texts at random: 91 % found, 91 % of the right words kept, with voices that were not trained on
# (the frames' own posteriors, which share all frames among the words that are given, tell them apart far worse).
SPOKEN_FROM = -8.0
# Costs of matching a given text to what was heard: another word at the same place, a word on one side only.
OTHER_WORD, EXTRA_WORD = 1.0, 0.7


@torch.no_grad()
def align(model, processor, audio, text, prompt=None, sampling_rate: int | None = None):
    """
    Times of the words of a known text.

    A recording longer than the model's window is transcribed first; where what was heard matches the text, the text is shared out
    among the pieces.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]), processor ([`VoxLMProcessor`])
        audio: one recording or a list of them, of any kind `audio_voxlm.read_audio` takes. Recordings are held in memory as a
            whole, and of a long one a byte for each pair of a given and a heard word (an hour: 100 MB).
        text (`str` or `list[str]`): what is said in it, one for each recording; any script and symbol the tokenizer can write.
        prompt (`str` or `list[str]`, *optional*): see `transcribe`.
        sampling_rate (`int`, *optional*): of bare arrays, by default the model's.

    Returns:
        [`VoxLMTranscription`] (or a list of them for a list) with the words as they were given: in order, none empty, inside
        the recording. `"spoken"` of a word is `False` where the model believes that it is not in the recording; its times are
        then only the place where it would have been. `"confidence"` is that of the word given the words before it.

    Raises:
        ValueError: for a text without words, one that is no string, a number of texts that is not that of the recordings, or
            audio that cannot be read, is long and without speech, or has less frames than the text has words.
    """
    waveforms = processor.load_batch(audio, sampling_rate)
    texts = text if is_batch(audio) else [text]
    if isinstance(texts, str) or len(texts) != len(waveforms):
        raise ValueError(f"Got {'one text' if isinstance(texts, str) else len(texts)} for {len(waveforms)} recordings")
    prompts = one_for_each(prompt, len(waveforms))
    for item in texts:
        check_text(processor, item)
    window = int(model.config.audio_window_s * processor.sampling_rate)
    results = [
        (_align_pieces if len(waveform) > window else _align)(model, processor, waveform, item, request)
        for waveform, item, request in zip(waveforms, texts, prompts)
    ]
    return results if is_batch(audio) else results[0]


def check_text(processor, text: str):
    """Raise a `ValueError` for a text that cannot be aligned."""
    if not isinstance(text, str):
        raise ValueError(f"The text to align must be a string, got {type(text).__name__}")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    special = [token for token in ids if token in processor.special_ids]
    if special:
        token = processor.tokenizer.convert_ids_to_tokens(special[0])
        raise ValueError(f"The text to align holds the special token {token!r}, which nobody says; remove it")
    if not processor.split_words(ids):
        raise ValueError(f"The text to align has no words: {text!r}")


@dataclass
class AlignedText:
    """
    What the model thinks of a text that is given.

    Args:
        words (`list[str]`): as given. token_words: `(tokens,)` the word of each token.
        decoded ([`DecodedText`]): the LLM's states and log-probabilities of the tokens.
        scores ([`AlignmentScores`]): of the tokens at the frames, of which `num_frames`, of `frame_s` seconds each, are real.
    """

    words: list[str]
    token_words: np.ndarray
    decoded: DecodedText
    scores: AlignmentScores
    num_frames: int
    frame_s: float


@torch.no_grad()
def read_text(model, processor, waveform: np.ndarray, text: str, prompt: str | None = None) -> AlignedText:
    """
    Read a text as if the model had written it.

    Args:
        waveform: `(samples,)` of at most the model's window; text: see `check_text`.

    Raises:
        ValueError: when there are less frames than words.
    """
    duration_s = len(waveform) / processor.sampling_rate
    inputs = processor.apply_transcription_request(waveform, prompt=prompt).to(model.device)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    surface = [word.text for word in processor.split_words(ids)]
    features = {name: value for name, value in inputs.items() if name.startswith(processor.feature_name)}
    audio = model.get_audio_features(**features)
    frame_s = processor.frame_s * model.alignment.frames_per_key
    # A model fed the full window has frames of silence after the recording's end.
    num_frames = min(int(model.alignment.keys_of(audio)[1].sum()), max(1, round(duration_s / frame_s)))
    if num_frames < len(surface):
        raise ValueError(
            f"The text has {len(surface)} words, but the recording only {num_frames} frames to place them in"
        )
    # As given, or as a model that writes no capitals and punctuation would write it: whichever this model finds likelier.
    candidates = [surface] if plain_words(surface) == surface else [surface, plain_words(surface)]
    readings = [
        _read(model, inputs, audio, *processor.encode_words(processor.decode_text(ids), surface, words))
        for words in candidates
    ]
    best, token_words = max(readings, key=lambda item: float(item[0].logprobs.mean()))
    scores = model.align_scores(best.states, torch.tensor(best.ids, device=model.device), audio)
    return AlignedText(surface, token_words, best, scores, num_frames, frame_s)


def _align(model, processor, waveform: np.ndarray, text: str, prompt: str | None) -> VoxLMTranscription:
    duration_s = len(waveform) / processor.sampling_rate
    read = read_text(model, processor, waveform, text, prompt)
    width = model.config.alignment_median_width
    times = word_times(read.scores, 0, read.token_words, read.num_frames, read.frame_s, duration_s, read.words, width)
    places = [np.flatnonzero(read.token_words == word).tolist() for word in range(len(read.words))]
    raw = word_scores(read.decoded, 0, places)
    return VoxLMTranscription(
        text=text,
        words=[
            {
                "word": word,
                "start": start,
                "end": end,
                "confidence": confidence,
                "spoken": score["logprob"] >= SPOKEN_FROM,
            }
            for word, (start, end), confidence, score in zip(read.words, times, confidences(raw, model.config), raw)
        ],
        duration=round(duration_s, 3),
        truncated=False,
        word_scores=raw,
    )


def _align_pieces(model, processor, waveform: np.ndarray, text: str, prompt: str | None) -> VoxLMTranscription:
    """A recording longer than the window: each piece that `transcribe` makes of it gets its share of the text."""
    rate = processor.sampling_rate
    pieces = list(transcribe(model, processor, waveform, prompt, stream=True))
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    given = [word.text for word in processor.split_words(ids)]
    if not pieces:
        raise ValueError(
            f"The text to align has {len(given)} words, but no speech is heard in {len(waveform) / rate:.1f} s"
        )
    written, starts, position = processor.decode_text(ids), [], 0
    for word in given:
        starts.append(written.index(word, position))
        position = starts[-1] + len(word)
    starts.append(len(written))
    words, scores = [], []
    cuts = share_words(given, [(piece.segments[0], piece.words) for piece in pieces])
    for piece, first, last in zip(pieces, cuts[:-1], cuts[1:]):
        if first == last:
            continue
        start_s, end_s = piece.segments[0]["start"], piece.segments[0]["end"]
        samples = waveform[round(start_s * rate) : round(end_s * rate)]
        part = _align(model, processor, samples, written[starts[first] : starts[last]].strip(), prompt)
        for word in part.words:
            word["start"], word["end"] = (round(min(start_s + word[edge], end_s), 3) for edge in ("start", "end"))
        words += part.words
        scores += part.word_scores
    return VoxLMTranscription(
        text=text, words=words, duration=round(len(waveform) / rate, 3), truncated=False, word_scores=scores
    )


def share_words(given: list[str], pieces: list[tuple[dict, list[dict]]]) -> list[int]:
    """
    Share the words of a text out among the pieces of a recording.

    Args:
        given: the words of the text.
        pieces: of each piece its "start" and "end" in seconds, and the words that were heard in it, in order.

    Returns:
        for each piece, and for the end, the number of its first word. Words between two pieces of which nothing was heard
        go to the piece that has more room beside what was heard.
    """
    heard = [(number, word) for number, (_, words) in enumerate(pieces) for word in words]
    known: dict[str, int] = {}
    numbers = [
        np.array([known.setdefault(word, len(known)) for word in plain_words(words)], dtype=np.int64)
        for words in (given, [word["word"] for _, word in heard])
    ]
    matches = match_in_order(
        lambda row: OTHER_WORD * (numbers[1] != numbers[0][row]), len(given), len(heard), EXTRA_WORD
    )
    # Of each piece the first and last word of the text that was heard in it, and the seconds left at either end.
    spans: list[list[int] | None] = [None] * len(pieces)
    for row, column in matches:
        piece = heard[column][0]
        spans[piece] = [spans[piece][0] if spans[piece] else row, row]
    cuts, before = [0], None
    for number, span in enumerate(spans):
        if span is None:
            continue
        if before is not None:
            room = pieces[before][0]["end"] - pieces[before][1][-1]["end"]
            earlier = room > pieces[number][1][0]["start"] - pieces[number][0]["start"]
            cut = span[0] if earlier else spans[before][1] + 1
            cuts += [cut] * (number - before)
        else:
            cuts += [0] * number
        before = number
    if before is None:
        # Nothing that was heard is in the text: to each piece by its length.
        lengths = np.cumsum([0.0] + [place["end"] - place["start"] for place, _ in pieces])
        return [round(len(given) * float(length / lengths[-1])) for length in lengths]
    return cuts + [len(given)] * (len(pieces) + 1 - len(cuts))


def match_in_order(costs: Callable[[int], np.ndarray], rows: int, columns: int, gap: float) -> list[tuple[int, int]]:
    """
    The cheapest way to match two sequences in order (Needleman and Wunsch 1970).

    Args:
        costs: from a row's number to `(columns,)` costs of matching it with each column; rows, columns: lengths of the sequences;
        gap: cost of an item that is matched with nothing.

    Returns:
        matched pairs of row and column, in order.
    """
    skipped = gap * np.arange(columns + 1)
    total = skipped.copy()
    # 0: matched, 1: the row is skipped, 2: the column is.
    steps = np.full((rows + 1, columns + 1), 2, dtype=np.int8)
    for row in range(1, rows + 1):
        above, both = total + gap, total[:-1] + costs(row - 1)
        best = above.copy()
        best[1:] = np.minimum(both, above[1:])
        # Skipping columns chains along the row; taken off beforehand, their cost leaves a running minimum.
        total = np.minimum.accumulate(best - skipped) + skipped
        steps[row, 0] = 1
        steps[row, 1:] = np.where(total[1:] < best[1:] - 1e-9, 2, both > above[1:] + 1e-9)
    pairs, row, column = [], rows, columns
    while row and column:
        step = int(steps[row, column])
        if step == 0:
            pairs.append((row - 1, column - 1))
        row, column = row - (step != 2), column - (step != 1)
    return pairs[::-1]


def _read(model, inputs, audio, ids: list[int], token_words: np.ndarray):
    """The LLM's states for a text, and `(tokens,)` the word of each token."""
    decoded = DecodedText(ids=[ids], ended=[True])
    read_states(model, prompt_with_audio(model, inputs, audio), decoded)
    return decoded, token_words
