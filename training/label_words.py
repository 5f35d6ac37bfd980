"""Word times for training: matching them to transcripts, and reading them from the formats aligners write."""

import re
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein


# Costs of the alignment: a substitution by how differently the words are spelt, at most this; a word on one side only.
SUBSTITUTION, GAP = 1.2, 0.7


def match_words(reference: list[str], timed: list[str]) -> list[int | None]:
    """
    For each timed word the place in the reference it stands for, by edit-distance alignment of the two, or `None`.

    A word spelt differently is matched to what stands at its place; words that one side has more than the other are matched
    to nothing.
    """
    costs = np.zeros((len(reference) + 1, len(timed) + 1))
    costs[:, 0], costs[0, :] = GAP * np.arange(len(reference) + 1), GAP * np.arange(len(timed) + 1)
    spelling = [[SUBSTITUTION * Levenshtein.normalized_distance(one, other) for other in timed] for one in reference]
    for row in range(1, len(reference) + 1):
        for column in range(1, len(timed) + 1):
            costs[row, column] = min(
                costs[row - 1, column - 1] + spelling[row - 1][column - 1],
                costs[row - 1, column] + GAP,
                costs[row, column - 1] + GAP,
            )
    places: list[int | None] = [None] * len(timed)
    row, column = len(reference), len(timed)
    while row and column:
        if np.isclose(costs[row, column], costs[row - 1, column - 1] + spelling[row - 1][column - 1]):
            row, column = row - 1, column - 1
            places[column] = row
        elif np.isclose(costs[row, column], costs[row - 1, column] + GAP):
            row -= 1
        else:
            column -= 1
    return places


def read_ctm(path: Path) -> dict[str, list[dict]]:
    """Words of a CTM file (NIST: recording, channel, start, duration, word) by recording, times in seconds."""
    words: dict[str, list[dict]] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip() or line.startswith(";;"):
            continue
        fields = line.split()
        if len(fields) < 5:
            raise ValueError(f"{path}:{number}: a CTM line has at least 5 fields, this one {len(fields)}: {line!r}")
        start, duration = float(fields[2]), float(fields[3])
        words.setdefault(fields[0], []).append({"word": fields[4], "start": start, "end": round(start + duration, 6)})
    return words


def read_textgrid(path: Path, tier: str = "words") -> list[dict]:
    """
    Words of an interval tier of a Praat TextGrid (long format, as the Montreal Forced Aligner writes), times in seconds.

    Raises:
        ValueError: when there is no such tier; those there are, are named.
    """
    text = Path(path).read_text()
    tiers = re.split(r"item \[\d+\]:", text)[1:]
    names = [match[1] if (match := re.search(r'name = "(.*?)"', part)) else "" for part in tiers]
    if tier not in names:
        raise ValueError(f"{path} has no tier {tier!r}; its tiers are {', '.join(map(repr, names)) or 'none'}")
    interval = re.compile(r'xmin = ([\d.]+)\s+xmax = ([\d.]+)\s+text = "((?:[^"]|"")*)"')
    return [
        {"word": word.replace('""', '"').strip(), "start": float(start), "end": float(end)}
        for start, end, word in interval.findall(tiers[names.index(tier)])
        if word.strip() and not re.fullmatch(r"<.*>|sil|sp|spn", word.strip())
    ]
