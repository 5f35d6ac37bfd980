"""Forced aligners of other projects: teachers of word times, and baselines in an evaluation."""

import functools
import math
import re
import shutil
import subprocess

import numpy as np
import torch
from pocketsphinx import Decoder

from voxlm_hf.decoding_voxlm import DecodedText
from voxlm_hf.forced_alignment_voxlm import known_text, score_text
from voxlm_hf.legacy_voxlm import dtw_word_times
from voxlm_hf.transcription_voxlm import find_times, score_texts

from .text import normalise


# Sampling rate that PocketSphinx's English model was trained on, and the length of its frames, 100 a second by default.
SPHINX_RATE, SPHINX_FRAME_S = 16000, 0.01
# What PocketSphinx takes of a pause before a word and after it, in seconds: the medians of its errors on 60 sentences by
# festival with exact times. Between words without a pause its median error is below 1 ms.
SPHINX_EXCESS_S = (0.013, 0.024)
# As in the original VoxLM: the length of its projected frames, and the width of its median filter in frames.
ORIGINAL_FRAME_S, ORIGINAL_MEDIAN = 0.08, 7


@functools.cache
def _sphinx():
    return Decoder(lm=None, samprate=SPHINX_RATE, loglevel="FATAL")


def spelt_phones(word: str) -> str | None:
    """
    A word's phones by flite's letter-to-sound rules, as PocketSphinx's dictionary writes them; `None` where flite is not
    installed or knows none.
    """
    if shutil.which("flite") is None:
        return None
    printed = subprocess.run(
        ["flite", "-ps", "-t", word, "-o", "none"], capture_output=True, text=True, check=True
    ).stdout
    # Flite's schwa is a phone of its own, CMU's dictionary writes it as an unstressed "AH".
    phones = [{"ax": "ah"}.get(phone, phone).upper() for phone in printed.split() if phone != "pau"]
    return " ".join(phones) or None


def sphinx_words(waveform: np.ndarray, text: str) -> list[dict] | None:
    """
    Word times by PocketSphinx's forced alignment (PyPI `pocketsphinx`, which ships its English model).

    Args:
        waveform: `(samples,)` float32 at 16 kHz; text: its transcript.

    Returns:
        `{"word", "start", "end"}` in seconds, or `None` where its dictionary lacks a word that flite cannot pronounce
        either, or it finds no alignment.
    """
    decoder, words = _sphinx(), normalise(text).split()
    for word in words:
        if decoder.lookup_word(word) is None:
            phones = spelt_phones(word)
            if phones is None:
                return None
            decoder.add_word(word, phones, True)
    if not words:
        return None
    decoder.set_align_text(" ".join(words))
    decoder.start_utt()
    decoder.process_raw((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    found = [
        {
            "word": re.sub(r"\(\d+\)$", "", segment.word),
            "start": round(segment.start_frame * SPHINX_FRAME_S, 3),
            "end": round((segment.end_frame + 1) * SPHINX_FRAME_S, 3),
        }
        for segment in decoder.seg() or ()
        if not segment.word.startswith(("<", "["))
    ]
    return found if [word["word"] for word in found] == words else None


@torch.no_grad()
def own_words(model, waveform: np.ndarray, text: str) -> list[dict]:
    """
    Word times by a VoxLM model's alignment head, without a pass through the LLM where the head reads the spelling.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]); waveform: `(samples,)` at the model's rate, of at most its window; text: its
            transcript.

    Returns:
        `{"word", "start", "end"}` in seconds.
    """
    if not model.alignment.from_spelling:
        return model.align(waveform, text).words
    processor = model.get_processor()
    features = processor.extract_features([waveform])
    audio = model.encode_audio(**{name: value.to(model.device) for name, value in features.items()})
    decoded = DecodedText([], True, words=text.split())
    (times,) = find_times(model, processor, [decoded], audio, [len(waveform) / processor.sampling_rate])
    return [{"word": word, "start": start, "end": end} for word, (start, end) in zip(decoded.words, times)]


@torch.no_grad()
def original_words(model, waveform: np.ndarray, text: str) -> list[dict]:
    """
    Word times by the original VoxLM's method from our alignment head's scores: attention over frames of 80 ms, median
    filter, plain DTW.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]); waveform: `(samples,)` at the model's rate, of at most its window; text: its
            transcript.

    Returns:
        `{"word", "start", "end"}` in seconds.
    """
    processor = model.get_processor()
    scored = score_text(model, processor, waveform, known_text(processor, text))
    found, (owners,) = score_texts(model, [scored.decoded], scored.audio)
    scores = found.tokens[0, :, : scored.num_frames].cpu().numpy()
    weights = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    together = round(ORIGINAL_FRAME_S / (processor.frame_s * model.alignment.frames_per_key))
    weights = np.add.reduceat(weights, np.arange(0, weights.shape[1], together), axis=1)
    duration_s = len(waveform) / processor.sampling_rate
    times = dtw_word_times(weights, owners, ORIGINAL_FRAME_S, duration_s, ORIGINAL_MEDIAN)
    return [{"word": word, "start": start, "end": end} for word, (start, end) in zip(scored.decoded.words, times)]


def tightened(words: list[dict]) -> list[dict]:
    """
    PocketSphinx's words without what it takes of the pauses around them (`SPHINX_EXCESS_S`), none shorter than one of its
    frames.

    Args:
        words: `{"word", "start", "end"}` in seconds, in order.
    """
    before = [0.0, *(word["end"] for word in words)]
    after = [*(word["start"] for word in words[1:]), math.inf]
    result = []
    for word, left, right in zip(words, before, after):
        start = word["start"] + (SPHINX_EXCESS_S[0] if word["start"] > left else 0.0)
        end = word["end"] - (SPHINX_EXCESS_S[1] if word["end"] < right else 0.0)
        start = min(start, word["end"] - SPHINX_FRAME_S)
        result.append({"word": word["word"], "start": start, "end": max(end, start + SPHINX_FRAME_S)})
    return result


def agreed_words(ours: list[dict], theirs: list[dict] | None, within_s: float = 0.05) -> list[dict]:
    """
    The words on whose start and end two aligners of one text agree, with the mean of both as their times.

    Args:
        ours, theirs: `{"word", "start", "end"}` of the same words; `None` where an aligner found nothing.
        within_s: largest difference in seconds that counts as agreement; chosen by hand, not tuned.
    """
    if theirs is None or len(ours) != len(theirs):
        return []
    return [
        {"word": one["word"], **{edge: round((one[edge] + other[edge]) / 2, 3) for edge in ("start", "end")}}
        for one, other in zip(ours, theirs)
        if all(abs(one[edge] - other[edge]) <= within_s for edge in ("start", "end"))
    ]
