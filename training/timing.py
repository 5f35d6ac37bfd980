"""Word-time errors, by the definitions that aligners are compared with (fa-bench, Rousso et al. 2024, McAuliffe et al. 2026)."""

from dataclasses import dataclass

import numpy as np

from .data import Row
from .label_words import match_words
from .text import normalise


@dataclass
class TimingScores:
    """
    Errors of word starts and ends against known ones, in milliseconds.

    Args:
        model, data, condition (`str`): what was scored on what, and "transcribed" (words matched to the reference; those it has
            not leave the average) or "text given".
        matched, known (`int`): words compared, of those with a known time.
        mean_ms (`float`): over starts and ends together (word boundary error). start_mean_ms, end_mean_ms, start_bias_ms,
            end_bias_ms (positive: too late), median_ms, p95_ms (`float`).
        within_50_ms, within_100_ms (`float`): shares of boundaries.
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
    within_50_ms: float
    within_100_ms: float


def known_times(row: Row) -> dict[int, tuple[float, float]]:
    """Start and end in seconds of the reference's words, by their place in it: of all ("words") or some ("anchors")."""
    if row.anchors:
        # Some have no place in the text, where its wording is not the aligner's.
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


def word_errors(row: Row, words: list[dict]) -> list[tuple[float, float]]:
    """
    Signed errors (start, end) in seconds of those words that are the same in reference and result.

    Args:
        words: `{"word", "start", "end"}` of the result, a start or end of `None` where a system knows none.
    """
    reference, heard = normalise(row.text).split(), [normalise(word["word"]) for word in words]
    known, errors = known_times(row), []
    for place, word, text in zip(match_words(reference, heard), words, heard):
        if place in known and text == reference[place] and None not in (word["start"], word["end"]):
            errors.append((word["start"] - known[place][0], word["end"] - known[place][1]))
    return errors


def score_times(rows: list[Row], words: list[list[dict]], model: str, data: str, condition: str) -> TimingScores | None:
    """
    Score the words of each row's result; `None` when nothing can be compared.
    """
    errors = [error for row, result in zip(rows, words) for error in word_errors(row, result)]
    if not errors:
        return None
    signed = 1000 * np.array(errors)
    off = np.abs(signed)
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
        within_50_ms=float((off <= 50).mean()),
        within_100_ms=float((off <= 100).mean()),
    )


def markdown(scores: list[TimingScores]) -> str:
    """A table of word-time errors."""
    lines = [
        "| model | data | words | mean start/end error | median | 95th percentile | bias start / end | within 50 / 100 ms | matched |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {item.model} | {item.data} | {item.condition} | {item.mean_ms:.0f} ms | {item.median_ms:.0f} ms | {item.p95_ms:.0f} ms | "
        f"{item.start_bias_ms:+.0f} / {item.end_bias_ms:+.0f} ms | {100 * item.within_50_ms:.0f} / {100 * item.within_100_ms:.0f} % | "
        f"{item.matched:,} of {item.known:,} |"
        for item in scores
    ]
    return "\n".join(lines) + "\n"
