"""Other people's forced aligners, as teachers of word times and as peers to be measured beside."""

import functools
import re

import numpy as np

from voxlm_hf.alignment_voxlm import dtw_word_times
from voxlm_hf.forced_alignment_voxlm import read_text

from .text import normalise


# What PocketSphinx's acoustic model was trained on, and the length of its frames.
SPHINX_RATE, SPHINX_FRAME_S = 16000, 0.01
# The original VoxLM's grid: projected frames of 80 ms, the width of its median filter in them.
ORIGINAL_FRAME_S, ORIGINAL_MEDIAN = 0.08, 7


@functools.cache
def _sphinx():
    from pocketsphinx import Decoder

    return Decoder(lm=None, samprate=SPHINX_RATE, loglevel="FATAL")


def sphinx_words(waveform: np.ndarray, text: str) -> list[dict] | None:
    """
    Word times by PocketSphinx's forced alignment (PyPI `pocketsphinx`, which ships its English model).

    Args:
        waveform: `(samples,)` float32 at 16 kHz; text: what is said in it.

    Returns:
        `{"word", "start", "end"}` in seconds, or `None` where a word is not in its dictionary or it finds no path.
    """
    decoder, words = _sphinx(), normalise(text).split()
    if not words or any(decoder.lookup_word(word) is None for word in words):
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


def original_words(model, waveform: np.ndarray, text: str) -> list[dict]:
    """
    Word times by the original VoxLM's recipe on our alignment head's scores: attention on frames of 80 ms, median filter, plain DTW.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]); waveform: `(samples,)` at the model's rate, of at most its window; text: what is said.

    Returns:
        `{"word", "start", "end"}` in seconds.
    """
    processor = model.get_processor()
    read = read_text(model, processor, waveform, text)
    scores = read.scores.tokens[0, :, : read.num_frames].cpu().numpy()
    weights = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    together = round(ORIGINAL_FRAME_S / read.frame_s)
    weights = np.add.reduceat(weights, np.arange(0, weights.shape[1], together), axis=1)
    duration_s = len(waveform) / processor.sampling_rate
    times = dtw_word_times(weights, read.token_words, ORIGINAL_FRAME_S, duration_s, ORIGINAL_MEDIAN)
    return [{"word": word, "start": start, "end": end} for word, (start, end) in zip(read.words, times)]


def agreed_words(ours: list[dict], theirs: list[dict] | None, within_s: float = 0.05) -> list[dict]:
    """
    The words on whose start and end two aligners of one text agree, edges in the middle between the two.

    Args:
        ours, theirs: `{"word", "start", "end"}` of the same words; `None` where an aligner found nothing.
    """
    if theirs is None or len(ours) != len(theirs):
        return []
    return [
        {"word": one["word"], **{edge: round((one[edge] + other[edge]) / 2, 3) for edge in ("start", "end")}}
        for one, other in zip(ours, theirs)
        if all(abs(one[edge] - other[edge]) <= within_s for edge in ("start", "end"))
    ]
