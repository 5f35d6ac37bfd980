"""Word times of training rows to the targets of the alignment head."""

import math

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .alignment_voxlm import NO_BYTE, spell_words
from .timing_voxlm import close_gaps
from .words_voxlm import Word, match_words, word_indices


# Nothing is said in the first second after the last timed word, and beyond it nothing is known. Chosen by hand: with
# a second of pause behind every text the alignment head learns where texts end.
KNOWN_PAUSE_S = 1.0


def check_rows(rows: list[dict]):
    """
    Raises:
        ValueError: without rows, for a row without text or audio, and for rows of which some have audio and some states.
    """
    if not rows:
        raise ValueError("There are no rows to collate")
    kind = "states" if "states" in rows[0] else "audio"
    for number, row in enumerate(rows):
        missing = [name for name in ("text", kind) if row.get(name) is None]
        if missing:
            raise ValueError(
                f"Row {number} of the batch has no {' and no '.join(map(repr, missing))}, only {sorted(row)}; each row needs 'text' "
                "and 'audio', or 'text' and 'states' in all rows"
            )


def word_time_targets(
    words: list[list[Word]], timed: list[list[dict] | None], labels: torch.Tensor, frame_s: float
) -> dict[str, torch.Tensor]:
    """
    `token_words`, `spelling`, `spelling_words`, `word_times` and `frame_times` of a batch, as the model's `forward` takes
    them.

    Args:
        words (`list[list[Word]]`): of each row's answer, by position among its labels.
        timed (`list[list[dict]]`): see `word_targets`, of each row.
        labels (`torch.LongTensor` of shape `(batch, length)`): -100 outside the answers.
        frame_s (`float`): seconds per encoder frame.
    """
    token_words, spelt, targets = torch.full_like(labels, -100), [], []
    for number, (row_words, row_timed) in enumerate(zip(words, timed)):
        positions = torch.nonzero(labels[number] != -100)[:, 0]
        indices = torch.from_numpy(word_indices(row_words, len(positions)))
        token_words[number, positions] = indices.masked_fill(indices < 0, -100)
        spelt.append([torch.tensor(part) for part in spell_words([word.text for word in row_words])])
        targets.append(word_targets(row_timed, [word.text for word in row_words], frame_s))
    word_times, frame_times = (
        pad_sequence(tensors, batch_first=True, padding_value=float("nan")) for tensors in zip(*targets)
    )
    spelling, owners = (
        pad_sequence(parts, batch_first=True, padding_value=padding)
        for parts, padding in zip(zip(*spelt), (NO_BYTE, -1))
    )
    return {
        "token_words": token_words,
        "spelling": spelling,
        "spelling_words": owners.masked_fill(owners < 0, -100),
        "word_times": word_times,
        "frame_times": frame_times,
    }


def word_targets(timed: list[dict] | None, words: list[str], frame_s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Word times of a transcript, and the frames for which it is known what is said in them.

    Args:
        timed (`list[dict]`, *optional*): `{"word", "start", "end"}` in seconds.
        words (`list[str]`): the words of the transcript, which may be spelt differently.
        frame_s (`float`): seconds per encoder frame.

    Returns:
        `(words, 2)` starts and ends in seconds, with short gaps closed as in the model's results, NaN for words without
        a time; and `(frames,)` centres of the frames in seconds, NaN where the target is unknown: where a word is
        spoken that the transcript lacks, and around a word of the transcript that has no time.
    """
    times = np.full((len(words), 2), np.nan)
    if not timed:
        return torch.tensor(times, dtype=torch.float32), torch.full((1,), torch.nan)
    frames = (np.arange(round((timed[-1]["end"] + KNOWN_PAUSE_S) / frame_s)) + 0.5) * frame_s
    for item, place in zip(timed, match_words(words, [item["word"] for item in timed])):
        start = max(0.0, item["start"])
        if place is None:
            frames[int(start / frame_s) : math.ceil(item["end"] / frame_s)] = np.nan
        else:
            times[place] = start, max(item["end"], start + frame_s / 2)
    has_time = np.flatnonzero(~np.isnan(times[:, 0]))
    times[has_time] = close_gaps(times[has_time])
    for word in np.flatnonzero(np.isnan(times[:, 0])):
        before, after = has_time[has_time < word], has_time[has_time > word]
        start = times[before[-1], 1] if len(before) else 0.0
        frames[int(start / frame_s) : math.ceil(times[after[0], 0] / frame_s) if len(after) else None] = np.nan
    return torch.tensor(times, dtype=torch.float32), torch.tensor(frames, dtype=torch.float32)
