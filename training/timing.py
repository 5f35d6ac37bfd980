"""
Word-time errors, by the definitions used to compare aligners (fa-bench, CrisperWhisper, Qwen3-ASR, Rousso et al. 2024).
"""

import re
from dataclasses import dataclass

import numpy as np

from voxlm_hf.words_voxlm import match_words

from .data import Row
from .text import normalise


# Tolerances of word segmentation in seconds: CrisperWhisper's table uses the first, WhisperX's the second.
COLLARS_S = (0.05, 0.2)
# A word whose start or end is further off is in the wrong place; the same as WhisperX's tolerance.
RIGHT_WITHIN_S = 0.2
# Tolerances in ms for which the share of boundaries is reported. Chosen by hand, not tuned.
WITHIN_MS = (20, 50, 100, 200)


@dataclass
class TimingScores:
    """
    Errors of word starts and ends against known times, in milliseconds.

    Args:
        model, data, condition (`str`): the model, the data, and "transcribed" (words without a counterpart in the
            reference are not in the averages) or "text given".
        matched, known (`int`): words compared, and words with a known time.
        mean_ms (`float`): over starts and ends together: word boundary error (fa-bench), and, since all boundaries are
            pooled, the accumulated average shift (AAS) of Qwen3-ASR and Granite. start_mean_ms, end_mean_ms,
            start_bias_ms, end_bias_ms (positive: too late), median_ms, p95_ms (`float`).
        within_20_ms, within_50_ms, within_100_ms, within_200_ms (`float`): shares of boundaries.
        f1_50_ms, iou_50_ms, f1_200_ms, iou_200_ms (`float`, *optional*): word segmentation at these collars (see
            `segmentation`); unknown where only some words have a time.
        empty, out_of_order (`int`): words without a duration, and words that start before the previous word ends.
    """

    model: str
    data: str
    condition: str
    matched: int
    known: int
    mean_ms: float
    start_mean_ms: float
    end_mean_ms: float
    start_bias_ms: float
    end_bias_ms: float
    median_ms: float
    p95_ms: float
    within_20_ms: float
    within_50_ms: float
    within_100_ms: float
    within_200_ms: float
    f1_50_ms: float | None = None
    iou_50_ms: float | None = None
    f1_200_ms: float | None = None
    iou_200_ms: float | None = None
    empty: int = 0
    out_of_order: int = 0


def known_times(row: Row) -> dict[int, tuple[float, float]]:
    """
    Known start and end in seconds of the reference's words, by their place in it: of all words ("words") or some
    ("anchors").
    """
    if row.anchors:
        # An anchor has no place where the text has other words than the aligner's.
        return {item["index"]: (item["start"], item["end"]) for item in row.anchors if item["index"] is not None}
    if not row.words:
        return {}
    reference = normalise(row.text).split()
    places = match_words(reference, [normalise(item["word"]) for item in row.words])
    return {
        place: (item["start"], item["end"])
        for place, item in zip(places, row.words)
        if place is not None and normalise(item["word"]) == reference[place]
    }


def word_errors(row: Row, words: list[dict]) -> dict[int, tuple[float, float]]:
    """
    Signed errors (start, end) in seconds of the words that reference and result have in common, by their place in the
    reference.

    Args:
        words: `{"word", "start", "end"}` of the result; a start or end may be `None`.
    """
    reference, hypothesis = normalise(row.text).split(), [normalise(word["word"]) for word in words]
    known, errors = known_times(row), {}
    for place, word, text in zip(match_words(reference, hypothesis), words, hypothesis):
        if place in known and text == reference[place] and None not in (word["start"], word["end"]):
            errors[place] = (word["start"] - known[place][0], word["end"] - known[place][1])
    return errors


def segmentation(reference: list[dict], words: list[dict], collar_s: float) -> tuple[int, int, int, list[float]]:
    """
    Word segmentation as CrisperWhisper's evaluation defines it: a reference word is found when an unused predicted word
    is the same and starts and ends within the collar of it; the first such word is used, whatever the order.

    Args:
        reference, words: `{"word", "start", "end"}` in seconds; the comparison is by lower-case letters alone.

    Returns:
        the numbers of words found, missed and inserted, and the intersection over union of each word found.
    """
    found, overlaps, free = 0, [], [word for word in words if None not in (word["start"], word["end"])]
    for known in reference:
        for number, word in enumerate(free):
            near = all(abs(word[edge] - known[edge]) <= collar_s for edge in ("start", "end"))
            if near and _letters(word["word"]) == _letters(known["word"]):
                common = min(word["end"], known["end"]) - max(word["start"], known["start"])
                whole = max(word["end"], known["end"]) - min(word["start"], known["start"])
                overlaps.append(max(0.0, common) / whole if whole > 0 else 1.0)
                found += 1
                del free[number]
                break
    return found, len(reference) - found, len(words) - found, overlaps


def _letters(word: str) -> str:
    return re.sub("[^a-z]", "", word.lower())


def score_segmentation(rows: list[Row], words: list[list[dict]], collar_s: float) -> tuple[float, float] | None:
    """
    F1 and mean intersection over union, pooled over all rows; `None` unless all words of the rows have known times.
    """
    if not all(row.words for row in rows if row.text) or not any(row.words for row in rows):
        return None
    counts = [segmentation(row.words or [], result, collar_s) for row, result in zip(rows, words)]
    found, missed, extra = (sum(count[place] for count in counts) for place in range(3))
    overlaps = [overlap for count in counts for overlap in count[3]]
    return 2 * found / max(1, 2 * found + missed + extra), float(np.mean(overlaps)) if overlaps else 0.0


def score_times(rows: list[Row], words: list[list[dict]], model: str, data: str, condition: str) -> TimingScores | None:
    """Score the words of each row's result; `None` when no word can be compared."""
    errors = [error for row, result in zip(rows, words) for error in word_errors(row, result).values()]
    if not errors:
        return None
    # Rounded to microseconds, so that an error of exactly 20 ms is within 20 ms.
    signed = (1000 * np.array(errors)).round(3)
    off = np.abs(signed)
    timed = [[word for word in result if None not in (word["start"], word["end"])] for result in words]
    f1, iou = zip(*(score_segmentation(rows, words, collar) or (None, None) for collar in COLLARS_S))
    return TimingScores(
        model=model,
        data=data,
        condition=condition,
        matched=len(errors),
        known=sum(len(known_times(row)) for row in rows),
        mean_ms=float(off.mean()),
        start_mean_ms=float(off[:, 0].mean()),
        end_mean_ms=float(off[:, 1].mean()),
        start_bias_ms=float(signed[:, 0].mean()),
        end_bias_ms=float(signed[:, 1].mean()),
        median_ms=float(np.median(off)),
        p95_ms=float(np.percentile(off, 95)),
        **{f"within_{limit}_ms": float((off <= limit).mean()) for limit in WITHIN_MS},
        f1_50_ms=f1[0],
        iou_50_ms=iou[0],
        f1_200_ms=f1[1],
        iou_200_ms=iou[1],
        empty=sum(word["end"] <= word["start"] for result in timed for word in result),
        out_of_order=sum(
            right["start"] < left["end"] for result in timed for left, right in zip(result[:-1], result[1:])
        ),
    )


def markdown(scores: list[TimingScores]) -> str:
    """A table of word-time errors."""
    lines = [
        "| model | data | words | mean start/end error (AAS) | median | 95th percentile | bias start / end | "
        "within 20 / 50 / 100 / 200 ms | F1, IoU at 50 ms | F1, IoU at 200 ms | empty / out of order | matched |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in scores:
        shares = (item.within_20_ms, item.within_50_ms, item.within_100_ms, item.within_200_ms)
        collars = ((item.f1_50_ms, item.iou_50_ms), (item.f1_200_ms, item.iou_200_ms))
        cells = [
            item.model,
            item.data,
            item.condition,
            f"{item.mean_ms:.0f} ms",
            f"{item.median_ms:.0f} ms",
            f"{item.p95_ms:.0f} ms",
            f"{item.start_bias_ms:+.0f} / {item.end_bias_ms:+.0f} ms",
            " / ".join(f"{100 * share:.0f}" for share in shares) + " %",
            *("-" if f1 is None else f"{f1:.2f}, {iou:.2f}" for f1, iou in collars),
            f"{item.empty} / {item.out_of_order}",
            f"{item.matched:,} of {item.known:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
