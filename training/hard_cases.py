"""
Conditions that word times most often fail in, made from recordings whose word times are known: long silence before the
speech, pauses between words, several utterances in one recording, noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .augment import Augmentation, draw_pauses, word_boundaries
from .data import Row
from .text import normalise
from .timing import RIGHT_WITHIN_S, word_errors


SAMPLING_RATE = 16000  # of Whisper
# All of the following, and the cases in AUGMENTED, were chosen by hand, not tuned.
# Inserted pauses: largest number, and range of lengths in seconds.
PAUSES, PAUSE_S = 3, (0.3, 1.5)
# Utterances that are joined to one recording.
IN_A_ROW = 3


def _with_pauses(row: Row, rng: np.random.Generator) -> Augmentation:
    # Where only some words have times, their starts are the only known boundaries.
    edges = [word["start"] for word in row.anchors or [] if word["index"]]
    pauses = draw_pauses(word_boundaries(row.words) if row.words else edges, PAUSES, PAUSE_S, rng)
    return Augmentation(pauses=pauses, seed=int(rng.integers(2**31)))


AUGMENTED: dict[str, Callable[[Row, np.random.Generator], Augmentation]] = {
    "1 s of silence before": lambda row, rng: Augmentation(lead_s=1.0, seed=int(rng.integers(2**31))),
    "5 s of silence before": lambda row, rng: Augmentation(lead_s=5.0, seed=int(rng.integers(2**31))),
    "pauses between words": _with_pauses,
    "noise at 10 dB": lambda row, rng: Augmentation(snr_db=10.0, seed=int(rng.integers(2**31))),
}


@dataclass
class HardCase:
    """
    Recordings made harder in one way.

    Args:
        name (`str`)
        rows (`list[Row]`): with the word times in the harder recording.
        origins (`list[list[tuple[int, int]]]`): for each row, the numbers of the plain rows it was made from, each with
            the place of its first word in the harder row's text.
    """

    name: str
    rows: list[Row]
    origins: list[list[tuple[int, int]]]


def hard_cases(rows: list[Row], load: Callable, seed: int = 0) -> list[HardCase]:
    """
    All hard cases made from some recordings with known word times.

    Args:
        load: a function from a row's audio to `(samples,)` float32 at 16 kHz.
    """
    waveforms = [load(row.audio) for row in rows]
    cases = []
    for name, draw in AUGMENTED.items():
        changes = [draw(row, np.random.default_rng([seed, number])) for number, row in enumerate(rows)]
        harder = [_moved(row, change, change(wave)) for row, change, wave in zip(rows, changes, waveforms)]
        cases.append(HardCase(name, harder, [[(number, 0)] for number in range(len(rows))]))
    groups = [range(first, first + IN_A_ROW) for first in range(0, len(rows) - IN_A_ROW + 1, IN_A_ROW)]
    joined = [_joined([rows[n] for n in group], [waveforms[n] for n in group]) for group in groups]
    origins = [list(zip(group, starts)) for group, (_, starts) in zip(groups, joined)]
    return [*cases, HardCase(f"{IN_A_ROW} utterances in a row", [row for row, _ in joined], origins)]


def _moved(row: Row, change: Augmentation, waveform: np.ndarray) -> Row:
    return replace(
        row,
        audio=waveform,
        duration=len(waveform) / SAMPLING_RATE,
        words=change.move_words(row.words) if row.words else None,
        anchors=change.move_words(row.anchors) if row.anchors else None,
    )


def _joined(rows: list[Row], waveforms: list[np.ndarray]) -> tuple[Row, list[int]]:
    """
    Rows joined to one recording, and the place of each row's first word in the joined text, normalised as in `timing`.
    """
    starts, words, anchors, place, seconds = [], [], [], 0, 0.0
    for row, waveform in zip(rows, waveforms):
        change = Augmentation(lead_s=seconds)
        starts.append(place)
        words += change.move_words(row.words or [])
        for anchor in change.move_words(row.anchors or []):
            anchors.append(anchor | {"index": None if anchor["index"] is None else anchor["index"] + place})
        place += len(normalise(row.text).split())
        seconds += len(waveform) / SAMPLING_RATE
    row = Row(
        id="+".join(row.id for row in rows),
        audio=np.concatenate(waveforms),
        text=" ".join(row.text for row in rows),
        duration=seconds,
        words=words or None,
        anchors=anchors or None,
    )
    return row, starts


@dataclass
class Robustness:
    """
    How many of the words with right times in the plain recordings still have right times in a hard case.

    Args:
        model, data, condition, case (`str`): the model, the data, "transcribed" or "text given", and the hard case.
        right (`int`): words whose start and end were at most 200 ms off in the plain recordings.
        moved (`int`): of those, words that are more than 200 ms off in the hard case.
        lost (`int`): of those, words that the text of the hard case does not contain.
    """

    model: str
    data: str
    condition: str
    case: str
    right: int
    moved: int
    lost: int

    @property
    def kept(self) -> float:
        """Share of the words that are still in the text whose times are still within 200 ms."""
        return 1 - self.moved / max(1, self.right - self.lost)


def compare(
    plain: list[dict[int, tuple[float, float]]], rows: list[Row], words: list[list[dict]], case: HardCase
) -> tuple:
    """
    Count right, moved and lost words.

    Args:
        plain: `word_errors` of each plain recording; rows: of the hard case; words: a model's result for each of them.

    Returns:
        the numbers of right, moved and lost words.
    """
    right = moved = lost = 0
    for row, result, origins in zip(rows, words, case.origins):
        errors = word_errors(row, result)
        for origin, start in origins:
            for place, before in plain[origin].items():
                if not _is_right(before):
                    continue
                right += 1
                if place + start not in errors:
                    lost += 1
                elif not _is_right(errors[place + start]):
                    moved += 1
    return right, moved, lost


def _is_right(error: tuple[float, float]) -> bool:
    return max(abs(error[0]), abs(error[1])) <= RIGHT_WITHIN_S


def markdown(scores: list[Robustness]) -> str:
    """A table of the robustness of word times."""
    lines = [
        "| model | data | words | case | right in the plain recordings | more than 200 ms off | kept | "
        "no longer in the text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {item.model} | {item.data} | {item.condition} | {item.case} | {item.right:,} | {item.moved:,} | "
        f"{100 * item.kept:.1f} % | {item.lost:,} |"
        for item in scores
    ]
    return "\n".join(lines) + "\n"
