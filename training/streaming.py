"""Rows of speech that are read as training needs them, for data that does not fit into memory."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    SkippedRows,
    described,
    kind_of,
    length_batches,
    load_augmented,
    usable_rows,
)


# Rows that are read ahead, shuffled and sorted by length together. Chosen by hand, not tuned.
BUFFER = 512
# Where none of a batch can be read, so many rows of other batches of the buffer are tried, and as many of earlier buffers, a few
# of each. Chosen by hand, not tuned.
SPARES, SPARES_OF_A_BUFFER = 16, 4


@dataclass
class StreamedRow:
    """
    A row on its way to a batch.

    Args:
        row (`Row`), augmentation (`Augmentation`)
        item (`dict`): its text and words, see `described`.
        spares (`tuple[StreamedRow]`): the same ones for all rows of a batch; the first of them that can be read stands for
            a batch of which nothing can.
    """

    row: Row
    augmentation: Augmentation
    item: dict
    spares: "tuple[StreamedRow, ...]" = ()


class SpeechStream(torch.utils.data.Dataset):
    """
    What [`SpeechDataset`] gives, without holding the rows in memory: `batches` reads them, `__getitems__` loads their audio.

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
        self.seed, self.buffer, self.limits, self.skipped = seed, buffer, Limits(**limits), SkippedRows()

    # What [`SpeechDataset`] knows of all rows and a stream cannot know.
    spoken_texts = None
    rows = None

    def one_pass(self, share: tuple[int, int] = (0, 1), report: Report | None = None) -> Iterator[Row]:
        """This process's share of all usable rows, the sources in turns; `report` counts them and all others."""
        report = Report() if report is None else report
        open_sources = [
            usable_rows(source, number, self.limits, report, share) for number, source in enumerate(self.sources)
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
        """A row with its audio, or the first of its spares that can be read."""
        return self.__getitems__([streamed])[0]

    def __getitems__(self, batch: list[StreamedRow]) -> list[dict]:
        """
        The rows of a batch with their audio, without those whose audio turns out to be unreadable, which a line names.
        At least one: a spare where none can be read.

        Raises:
            ValueError: when no spare can be read either.
        """
        if items := [item for one in batch if (item := self._read(one))]:
            return items
        for spare in batch[0].spares:
            if item := self._read(spare):
                return [item]
        raise ValueError(
            f"None of {len(batch) + len(batch[0].spares)} recordings can be read, such as {batch[0].row.where}; the lines above "
            "say why"
        )

    def _read(self, one: StreamedRow) -> dict | None:
        """A row with its audio, `None` when it cannot be read."""
        try:
            return {**one.item, "audio": load_augmented(self.processor, one.row, one.augmentation)}
        except READ_ERRORS as error:
            self.skipped.add(one.row, error)
            return None


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
        number, earlier = 0, deque(maxlen=SPARES)
        while True:
            rng = np.random.default_rng([self.seed, number])
            report, (index, processes) = Report(), self.share
            rows = self.stream.one_pass(self.share, report)
            while pool := list(islice(rows, self.stream.buffer)):
                yield from self._of_pool(pool, number, rng, earlier)
            if not report.kept:
                raise ValueError(f"Process {index + 1} of {processes} has no recording to use\n{report}")
            if number == 0:
                print(f"share {index + 1} of {processes} of the data: {report}" if processes > 1 else report)
            number += 1

    def _of_pool(self, pool: list[Row], number: int, rng, earlier: deque[StreamedRow]) -> Iterator[list[StreamedRow]]:
        """The batches of the rows in the buffer, in a random order; adds some of the rows to those of `earlier` buffers."""
        vocabulary = " ".join(row.text for row in pool).split() if self.stream.misheard else []
        streamed = [self._prepared(row, number, vocabulary) for row in pool]
        order = rng.permutation(len(streamed)).tolist()
        batches = length_batches({place: self._frames(streamed[place]) for place in order}, self.limit)
        for batch in rng.permutation(len(batches)):
            places = batches[batch]
            # Those behind it in the random order, as what lies together in a source is often damaged together.
            first = order.index(places[0])
            others = (streamed[place] for place in order[first:] + order[:first] if place not in places)
            spares = (*islice(others, SPARES), *earlier)
            yield [replace(streamed[place], spares=spares) for place in places]
        earlier.extend(streamed[place] for place in order[:SPARES_OF_A_BUFFER])

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
