"""Long recordings: cut into pieces the model can take, and the pieces' words joined again."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np


# A pause at least this long (seconds) ends a piece; what remains of it at either side is PAUSE_KEPT_S.
PAUSE_ENDS_S, PAUSE_KEPT_S = 2.0, 0.3
# The shortest pause that is cut in without overlap.
SHORTEST_PAUSE_S = 0.09
# Where a cut has to fall in speech, both pieces hold this much around it.
OVERLAP_S = 2.0
# Two pieces mean the same word when its middles are no further apart than this.
SAME_WORD_S = 0.5
# What is left of a word, at least, that has to make room for the one before it.
SHORTEST_WORD_S = 0.02


@dataclass
class Piece:
    """
    A stretch of one recording.

    Args:
        start (`int`): its first sample in the recording.
        waveform (`np.ndarray` of shape `(samples,)`)
        active (`float`): seconds of it that may be speech.
        overlap (`int`): samples that it shares with the piece before it, 0 where the cut fell into a pause.
        continues (`bool`): whether the next piece overlaps this one.
    """

    start: int
    waveform: np.ndarray = field(repr=False)
    active: float
    overlap: int = 0
    continues: bool = False


class Buffer:
    """
    The part of a stream that is not cut yet, and which frames of it are active.

    Args:
        blocks: of mono samples; activity: a voice activity detector of `activity_voxlm`, new.
    """

    def __init__(self, blocks: Iterable[np.ndarray], activity):
        self.blocks, self.activity, self.frame = iter(blocks), activity, activity.frame
        self.start, self.samples, self.active = 0, np.zeros(0, dtype=np.float32), np.zeros(0, dtype=bool)
        self.ended = False

    def fill(self, size: int):
        """Read until more than `size` samples are there, or all."""
        while not self.ended and len(self.samples) <= size:
            block = next(self.blocks, None)
            self.ended = block is None
            if not self.ended:
                self.samples = np.concatenate([self.samples, block])
            judged = len(self.active) * self.frame
            new = self.samples[judged:]
            # The last frame of a recording is filled up with silence.
            missing = -len(new) % self.frame
            new = np.pad(new, (0, missing)) if self.ended else new[: len(new) // self.frame * self.frame]
            if len(new):
                self.active = np.append(self.active, self.activity(new))

    def drop(self, frames: int):
        """Forget the first frames."""
        self.samples, self.active = self.samples[frames * self.frame :], self.active[frames:]
        self.start += frames * self.frame


def cut(blocks: Iterable[np.ndarray], activity, rate: int, longest_s: float) -> Iterator[Piece]:
    """
    Cut a stream of audio into pieces of at most `longest_s`, in pauses where there are some.

    A recording that fits one piece stays whole. Longer ones lose their pauses of more than two seconds. Where no pause is
    found, two pieces share up to `OVERLAP_S` around the quietest tenth of a second. What holds no activity makes no piece.
    Little more than one piece is in memory.

    Args:
        blocks: of mono samples, of any size; activity: a voice activity detector of `activity_voxlm`, new.
        rate: in Hz.
    """
    buffer, longest = Buffer(blocks, activity), int(longest_s * rate)
    frame, kept = buffer.frame, round(PAUSE_KEPT_S * rate / activity.frame)
    # A quarter more than a piece, so that no scrap too short to be heard is left over at the end.
    reserve = longest // 4
    buffer.fill(longest + reserve)
    if len(buffer.samples) <= longest:
        if buffer.active.any():
            yield Piece(0, buffer.samples, float(buffer.active.sum()) * frame / rate)
        return
    overlap = 0
    while len(buffer.samples):
        if not overlap:
            silent = int(buffer.active.argmax()) if buffer.active.any() else len(buffer.active)
            buffer.drop(max(0, silent - kept))
        buffer.fill(longest + reserve)
        if not buffer.active.any():
            if buffer.ended:
                return
            continue
        room = len(buffer.samples)
        if room > longest:
            room = min(longest, room - reserve)
        end, shared = _end_of_piece(buffer, rate, room, min(OVERLAP_S, longest_s / 4))
        active = buffer.active[: -(-end // frame)]
        if active.any():
            heard = end if shared else min(end, (len(active) - int(active[::-1].argmax()) + kept) * frame)
            seconds = float(active.sum()) * frame / rate
            yield Piece(buffer.start, buffer.samples[:heard], seconds, overlap, continues=shared > 0)
        else:
            shared = 0
        buffer.drop(-(-(end - shared) // frame))
        overlap = shared


def _end_of_piece(buffer: Buffer, rate: int, room: int, overlap_s: float) -> tuple[int, int]:
    """Where a piece of at most `room` samples ends, and how many samples of it the next one shall repeat."""
    frame = buffer.frame
    frames = room // frame
    pauses = [(first, last) for first, last in _runs(~buffer.active[:frames]) if first > 0]
    long = [(first, last) for first, last in pauses if (last - first) * frame >= PAUSE_ENDS_S * rate]
    if long:
        first, last = long[0]
        return (last - round(PAUSE_KEPT_S * rate / frame)) * frame, 0
    if room == len(buffer.samples):
        return room, 0
    # A long piece if there is a pause for it, else a shorter one.
    for earliest in (frames // 2, frames // 4):
        late = [(max(first, earliest), last) for first, last in pauses]
        late = [(first, last) for first, last in late if (last - first) * frame >= SHORTEST_PAUSE_S * rate]
        if late:
            first, last = max(late, key=lambda run: (run[1] - run[0], run[1]))
            return (first + last) // 2 * frame, 0
    half = round(overlap_s / 2 * rate / frame)
    middle = quietest(buffer.samples, room // 2, room - half * frame, rate) // frame
    return (middle + half) * frame, 2 * half * frame


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of `True`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def quietest(samples: np.ndarray, first: int, last: int, rate: int) -> int:
    """The middle of the quietest tenth of a second of `samples[first:last]`, as a sample number."""
    hop = max(1, rate // 100)
    energy = np.add.reduceat(samples[first:last].astype(np.float64) ** 2, np.arange(0, last - first, hop))
    smooth = np.convolve(energy, np.ones(10), mode="same")
    return first + int(smooth[:-1].argmin()) * hop + hop // 2


def halves(piece: Piece, rate: int) -> list[Piece]:
    """The piece in two, cut at the quietest place between its first and its last quarter."""
    size = len(piece.waveform)
    middle = quietest(piece.waveform, size // 4, size - size // 4, rate)
    parts = [(piece.start, piece.waveform[:middle]), (piece.start + middle, piece.waveform[middle:])]
    return [Piece(start, waveform, piece.active * len(waveform) / size) for start, waveform in parts]


def stitch(left: list[dict], right: list[dict], start_s: float, end_s: float) -> tuple[int, int]:
    """
    Join the words of two pieces that both heard `start_s`..`end_s`.

    Where both wrote the same words there, the longest common run joins them; else the middle of the stretch does.

    Args:
        left, right: words with "word", "start", "end" in seconds of the recording.

    Returns:
        how many words of `left` to keep, and how many of `right` to leave out.
    """
    middles = [[(word["start"] + word["end"]) / 2 for word in words] for words in (left, right)]
    first = sum(middle < start_s for middle in middles[0])
    count = sum(middle <= end_s for middle in middles[1])
    heard = [[word["word"].casefold() for word in words] for words in (left[first:], right[:count])]
    match = difflib.SequenceMatcher(None, *heard, autojunk=False).find_longest_match()
    same = zip(middles[0][first + match.a :][: match.size], middles[1][match.b :][: match.size])
    if match.size and all(abs(one - other) <= SAME_WORD_S for one, other in same):
        return first + match.a + match.size, match.b + match.size
    halfway = (start_s + end_s) / 2
    return sum(middle < halfway for middle in middles[0]), sum(middle < halfway for middle in middles[1])


def in_order(words: list[dict], from_s: float):
    """Move words, in place, that begin before `from_s` or before the word in front of them has ended."""
    for word in words:
        word["start"] = max(word["start"], from_s)
        word["end"] = max(word["end"], round(word["start"] + SHORTEST_WORD_S, 3))
        from_s = word["end"]
