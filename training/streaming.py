"""Rows of speech that are read as training needs them, for data that does not fit into memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from .augment import Augmentation
from .data import (
    READ_ERRORS,
    UNKNOWN_DURATION_S,
    Limits,
    Report,
    Row,
    described,
    kind_of,
    length_batches,
    load_augmented,
    print_skipped,
    usable_rows,
)


# Rows that are read ahead, shuffled and sorted by length together. Chosen by hand, not tuned.
BUFFER = 512


@dataclass
class StreamedRow:
    """
    A row on its way to a batch.

    Args:
        row (`Row`), augmentation (`Augmentation`)
        item (`dict`): its text and words, see `described`.
        spare (`StreamedRow`, *optional*): takes its place where its audio cannot be read.
    """

    row: Row
    augmentation: Augmentation
    item: dict
    spare: "StreamedRow | None" = None


class SpeechStream(torch.utils.data.Dataset):
    """
    What [`SpeechDataset`] gives, without holding the rows in memory: `batches` reads them, `__getitem__` loads their audio.

    The stream has no end and no length: after the last row it begins again, in another order and with other augmentations.
    Training therefore needs `max_steps`.

    Args:
        sources (`list[dict]`): see `read_rows`; their rows alternate until each has ended.
        processor ([`VoxLMProcessor`])
        augment (`bool`), misheard (`float`): as in `make_dataset`.
        seed (`int`): of the order and of the augmentations.
        buffer (`int`): rows to read ahead, among which the order is shuffled.
        **limits: of [`Limits`].
    """

    def __init__(self, sources, processor, augment=False, misheard=0.0, seed=0, buffer=BUFFER, **limits):
        if buffer < 1:
            raise ValueError(f"`buffer` must be at least 1 row, got {buffer}")
        for source in sources:
            kind_of(source)
        self.sources, self.processor, self.augment, self.misheard = sources, processor, augment, misheard
        self.seed, self.buffer, self.limits, self.report = seed, buffer, Limits(**limits), Report()

    # What [`SpeechDataset`] knows of all rows and a stream cannot know.
    texts = None
    rows = None

    def one_pass(self, share: tuple[int, int] = (0, 1)) -> Iterator[Row]:
        """This process's share of all usable rows, the sources in turns."""
        open_sources = [
            usable_rows(source, number, self.limits, self.report, share) for number, source in enumerate(self.sources)
        ]
        while open_sources:
            for rows in list(open_sources):
                row = next(rows, None)
                if row is None:
                    open_sources.remove(rows)
                else:
                    yield row

    def draw(self, count: int, seed: int, longest_s: float) -> list[Row]:
        """The first `count` rows of at most `longest_s`; to draw from all, all would have to be read."""
        rows = (row for row in self.one_pass() if row.duration is None or row.duration <= longest_s)
        return list(islice(rows, count))

    def batches(self, limit: float, seed: int, share: tuple[int, int]) -> "StreamBatches":
        """See [`StreamBatches`]."""
        return StreamBatches(self, limit, seed, share)

    def __getitem__(self, streamed: StreamedRow) -> dict:
        """
        A row with its audio; in the place of one whose audio turns out to be unreadable, with a line that names it, its
        spare.

        Raises:
            ValueError: when neither can be read.
        """
        for one in (streamed, streamed.spare or streamed):
            try:
                return {**one.item, "audio": load_augmented(self.processor, one.row, one.augmentation)}
            except READ_ERRORS as error:
                print_skipped(one.row, error)
        raise ValueError(f"Two rows in a row cannot be read, {streamed.row.where} and {one.row.where}; see above")


class StreamBatches(torch.utils.data.Sampler):
    """
    Batches of [`StreamedRow`] of similar length without end. Reads at most a buffer of rows ahead; the order depends on the
    seed alone, so that skipping the first batches resumes a run exactly.

    Args:
        stream ([`SpeechStream`]); limit (`float`): largest padded length of a batch in frames; seed (`int`): of the order.
        share: number of this process and of all.
    """

    def __init__(self, stream: SpeechStream, limit: float, seed: int, share: tuple[int, int]):
        self.stream, self.limit, self.seed, self.share = stream, limit, seed, share

    def __iter__(self) -> Iterator[list[StreamedRow]]:
        number = 0
        while True:
            rng = np.random.default_rng([self.seed, number])
            rows, found = self.stream.one_pass(self.share), False
            while pool := list(islice(rows, self.stream.buffer)):
                found = True
                yield from self._of_pool(pool, number, rng)
            if number == 0 and self.share[0] == 0:
                print(self.stream.report)
            if not found:
                raise ValueError(
                    f"Process {self.share[0] + 1} of {self.share[1]} has no recording to use\n{self.stream.report}"
                )
            number += 1

    def _of_pool(self, pool: list[Row], number: int, rng) -> Iterator[list[StreamedRow]]:
        """The batches of the rows in the buffer, in a random order."""
        vocabulary = " ".join(row.text for row in pool).split() if self.stream.misheard else []
        streamed = [self._prepared(row, number, vocabulary) for row in pool]
        for place, one in enumerate(streamed):
            spare = streamed[place - 1]
            one.spare = StreamedRow(spare.row, spare.augmentation, spare.item) if len(streamed) > 1 else None
        order = rng.permutation(len(streamed)).tolist()
        batches = length_batches({place: self._frames(streamed[place]) for place in order}, self.limit)
        for batch in rng.permutation(len(batches)):
            yield [streamed[place] for place in batches[batch]]

    def _prepared(self, row: Row, number: int, vocabulary: list[str]) -> StreamedRow:
        """A row with the augmentation and the misheard words of this pass."""
        rng = np.random.default_rng([self.stream.seed, *row.place, number])
        augmentation = Augmentation.draw(rng, row.words) if self.stream.augment else Augmentation()
        item = described(row, augmentation, vocabulary, self.stream.misheard, rng)
        return StreamedRow(row, augmentation, item)

    def _frames(self, streamed: StreamedRow) -> int:
        """Encoder frames of a row, estimated from its duration."""
        seconds = streamed.augmentation.move(streamed.row.duration or UNKNOWN_DURATION_S) + streamed.augmentation.tail_s
        return max(1, round(seconds / self.stream.processor.frame_s))
