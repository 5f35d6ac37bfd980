"""
Rows of speech to train or evaluate on, from manifests, folders, LibriSpeech or `datasets`, all read by `read_rows`.
"""

import functools
import inspect
import io
import json
import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from datasets import Audio, load_dataset, load_dataset_builder
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import get_worker_info

from voxlm_hf.decoding_voxlm import padded_batches
from voxlm_hf.fields_voxlm import is_number
from voxlm_hf.transcription_voxlm import error_line as line_of

from .augment import Augmentation, misheard, non_speech
from .text import NORMALISERS
from .webdataset import is_webdataset, shard_rows, shards_of


# What reading a recording may raise.
READ_ERRORS = (OSError, ValueError)

# Examples of each reason in a report; a few are enough to recognise a pattern. Chosen by hand, not tuned.
EXAMPLES = 3
# Seconds that a row without a known duration is taken to last when batches are made. Chosen by hand, not tuned.
UNKNOWN_DURATION_S = 10.0
# Options of `datasets.load_dataset` that say how to read a dataset and not which.
READING_OPTIONS = {"keep_in_memory", "num_proc", "verification_mode", "save_infos"}


@dataclass
class Row:
    """
    One recording and its transcript.

    Args:
        id (`str`): unique within its source.
        audio: a path, or any other kind that `VoxLMProcessor.load_audio` takes.
        text (`str`): the transcript, normalised; empty for a recording without speech.
        spoken (`str`, *optional*): the same word by word as it is spoken, where "text" has figures and abbreviations; what
            the projector learns by CTC.
        duration (`float`, *optional*): seconds.
        words (`list[dict]`, *optional*): `{"word", "start", "end"}` in seconds.
        speaker (`str`, *optional*)
        anchors (`list[dict]`, *optional*): times of some words, with "index", the word's place in the text; for
            evaluation only.
        place (`tuple[int, int]`): number of its source and its own number there, the same whichever other rows are left
            out.
        where (`str`): file and line it comes from, for messages.
    """

    id: str
    audio: object
    text: str
    duration: float | None = None
    spoken: str | None = None
    words: list[dict] | None = None
    speaker: str | None = None
    anchors: list[dict] | None = None
    place: tuple[int, int] = (0, 0)
    where: str = ""


@dataclass
class Report:
    """What was left out and why: counts by reason, and the first few examples of each reason."""

    kept: int = 0
    left_out: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, what: str):
        self.left_out[reason] += 1
        self.examples.setdefault(reason, [])
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(what)

    def __str__(self) -> str:
        lines = [f"{self.kept} recordings kept, {sum(self.left_out.values())} left out"]
        for reason, count in self.left_out.most_common():
            lines.append(f"  {count} x {reason}: {'; '.join(self.examples[reason])}")
        return "\n".join(lines)


def error_line(error: Exception) -> str:
    """An error in one line; of one in a worker of a `DataLoader`, the line that ends its traceback."""
    message = str(error)
    if "\nOriginal Traceback" not in message:
        return line_of(error)
    last = message.rstrip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return " ".join(last.split())


def manifest_rows(path: Path, report: Report) -> Iterator[dict]:
    """
    Rows of a JSONL manifest: "audio" (relative to it) and "text", optionally "duration", "spoken", "words",
    "word_anchors", "speaker", "id".

    A line that is not a JSON object in UTF-8 or lacks a field goes into the report and is left out.
    """
    path = Path(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                report.leave_out("not UTF-8", f"{path}:{number}: {error}")
                continue
            except (json.JSONDecodeError, RecursionError) as error:
                report.leave_out("not JSON", f"{path}:{number}: {error}")
                continue
            missing = [name for name in ("audio", "text") if not isinstance(row, dict) or row.get(name) is None]
            if missing:
                report.leave_out(f"no {missing[0]!r}", f"{path}:{number}")
                continue
            if isinstance(row["audio"], str):
                row["audio"] = str(path.parent / row["audio"])
            yield {"id": f"{path.stem}-{number}", **row, "where": f"{path}:{number}"}


def folder_rows(folder: Path, report: Report) -> Iterator[dict]:
    """
    Rows of a folder of recordings, each with its transcript beside it: NAME.wav (or .flac, .mp3, .ogg, .opus) and
    NAME.txt.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    kinds = (".wav", ".flac", ".mp3", ".ogg", ".opus")
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds):
        transcript = path.with_suffix(".txt")
        try:
            text = transcript.read_text("utf-8-sig").strip()
        except FileNotFoundError:
            report.leave_out("no transcript beside it", str(path))
            continue
        except (OSError, UnicodeDecodeError) as error:
            report.leave_out("unreadable transcript", f"{transcript}: {error_line(error)}")
            continue
        yield {"id": str(path.relative_to(folder)), "audio": str(path), "text": text, "where": str(path)}


def librispeech_rows(folder: Path, report: Report) -> Iterator[dict]:
    """Rows of LibriSpeech's own layout: SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside its .flac files."""
    folder = Path(folder)
    transcripts = sorted(folder.rglob("*.trans.txt"))
    if not transcripts:
        raise ValueError(f"{folder} has no *.trans.txt below it, so it is not in LibriSpeech's layout")
    for transcript in transcripts:
        for number, line in enumerate(transcript.read_bytes().splitlines(), 1):
            try:
                name, _, text = line.decode("utf-8-sig").partition(" ")
            except UnicodeDecodeError as error:
                report.leave_out("not UTF-8", f"{transcript}:{number}: {error}")
                continue
            yield {
                "id": name,
                "audio": str(transcript.parent / f"{name}.flac"),
                "text": text,
                "speaker": name.split("-")[0],
                "where": f"{transcript}:{number}",
            }


def dataset_rows(
    name: str,
    report: Report,
    split="train",
    streaming=False,
    audio_column="audio",
    text_column="text",
    share: tuple[int, int] = (0, 1),
    **options,
) -> Iterator[dict]:
    """
    Rows of a `datasets` dataset: a Hub name, a folder of audio, or "parquet" or "webdataset" with `data_files`.

    Audio stays as bytes or path until it is needed, so `datasets` needs no audio decoder.

    Args:
        audio_column, text_column (`str`): in WebDataset shards the extensions of the files, see `shard_rows`.
        share: number of this process and of all; each reads other shards, or other rows where the shards are fewer.
        **options: for `datasets.load_dataset`.

    Raises:
        ValueError: for a dataset that cannot be read or lacks a column.
    """
    which = {option: value for option, value in options.items() if option not in READING_OPTIONS}
    builder = load_dataset_builder(name, **which)
    if is_webdataset(builder):
        yield from shard_rows(shards_of(builder, split), report, audio_column, text_column, share)
        return
    try:
        dataset = load_dataset(name, split=split, streaming=streaming, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"The dataset {name} cannot be read: {error.__cause__ or error}") from error
    columns = dataset.column_names or list(next(iter(dataset), {}))
    for column in (audio_column, text_column):
        if column not in columns:
            raise ValueError(f"The dataset {name} has no column {column!r}; it has {', '.join(columns)}")
    if isinstance((dataset.features or {}).get(audio_column), Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    index, count = share
    if count > 1:
        dataset = split_dataset_by_node(dataset, rank=index, world_size=count)
    for number, row in enumerate(dataset):
        kept = {key: row[key] for key in ("duration", "words", "speaker") if key in row}
        where = f"{name}, row {number}" + (f" of share {index + 1} of {count}" if count > 1 else "")
        yield {"id": f"{split}-{number}", **kept, "audio": row[audio_column], "text": row[text_column], "where": where}


def silent_rows(count: int, report: Report, seed: int = 0) -> Iterator[dict]:
    """
    Synthetic clips without speech and with empty transcripts, from which the model learns that silence and noise
    contain no words.
    """
    for number in range(count):
        waveform = non_speech(np.random.default_rng([seed, number]))
        yield {"id": f"silent-{seed}-{number}", "audio": waveform, "text": "", "duration": len(waveform) / 16000}


# Options of every kind of source.
SLICE_OPTIONS = ("first", "count", "every", "exclude_speakers", "only_speakers", "streaming", "shift_s")
READERS: dict[str, Callable[..., Iterator[dict]]] = {
    "manifest": manifest_rows,
    "folder": folder_rows,
    "librispeech": librispeech_rows,
    "dataset": dataset_rows,
    "silence": silent_rows,
}


@dataclass
class Limits:
    """
    What a usable row keeps to. The defaults were chosen by hand, not tuned.

    Args:
        normaliser (`str`): name in `voxlm_training.text.NORMALISERS`, applied to transcripts and words.
        min_s, max_s (`float`): shortest and longest recording in seconds.
        max_characters (`int`): longest transcript.
        max_characters_per_s (`float`): nobody speaks faster, so where the transcript has more, it belongs to other
            audio.
    """

    normaliser: str = "none"
    min_s: float = 0.1
    max_s: float = 30.0
    max_characters: int = 1000
    max_characters_per_s: float = 40.0

    def __post_init__(self):
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"Unknown normaliser {self.normaliser!r}; known are {', '.join(NORMALISERS)}")


def read_rows(sources: Iterable[dict], normaliser: str = "none", **limits) -> tuple[list[Row], Report]:
    """
    All usable rows of some sources, in order.

    Args:
        sources: each names its kind and place, `{"manifest": PATH}`, `{"folder": FOLDER}`, `{"librispeech": FOLDER}`,
            `{"dataset": NAME, ...}` or `{"silence": COUNT}`, with the options of that kind (see the functions in
            `READERS`) and, for any kind: "first" and "count" (a slice), "every" (only each N-th), "exclude_speakers" or
            "only_speakers", and "shift_s", seconds to add to all word times (a synthesiser may report them late).
        normaliser, **limits: of [`Limits`].

    Returns:
        the rows, and a report of what was left out.

    Raises:
        ValueError: for a source of an unknown kind or with unknown options, or an unknown normaliser.
    """
    limits, report = Limits(normaliser, **limits), Report()
    rows = [row for number, source in enumerate(sources) for row in usable_rows(source, number, limits, report)]
    return rows, report


def usable_rows(
    source: dict, source_number: int, limits: Limits, report: Report, share: tuple[int, int] = (0, 1)
) -> Iterator[Row]:
    """
    The usable rows of one source, one at a time; see `read_rows`. The report counts them and all others.

    Args:
        share: number of this process and of all, which deal the rows out among them.
    """
    for number, raw in sliced_rows(source, report, share):
        raw.setdefault("where", str(raw["id"]))
        reason = unusable(raw, limits)
        if reason:
            report.leave_out(
                reason, raw["where"] if raw["where"] == str(raw["id"]) else f"{raw['where']} ({raw['id']})"
            )
        else:
            report.kept += 1
            yield _make_row(raw, NORMALISERS[limits.normaliser], (source_number, number), source.get("shift_s", 0.0))


def _make_row(raw: dict, normalise: Callable[[str], str], place: tuple[int, int], shift_s: float) -> Row:
    """A usable raw row with its text and words normalised, and the times of the words shifted."""
    words = [
        {**word, "word": normalise(word["word"]), **{edge: max(0.0, word[edge] + shift_s) for edge in ("start", "end")}}
        for word in raw.get("words") or []
    ]
    return Row(
        id=str(raw["id"]),
        audio=raw["audio"],
        text=normalise(raw["text"]),
        duration=raw.get("duration"),
        spoken=raw.get("spoken"),
        words=words or None,
        speaker=raw.get("speaker"),
        anchors=raw.get("word_anchors"),
        place=place,
        where=raw["where"],
    )


def kind_of(source: dict) -> str:
    """
    The kind of a source.

    Raises:
        ValueError: for a source that is no dict, has no kind or several, or options that its kind does not have.
    """
    kinds = [kind for kind in READERS if isinstance(source, dict) and kind in source]
    if len(kinds) != 1:
        got = f"keys {sorted(source)}" if isinstance(source, dict) else repr(source)
        raise ValueError(f"A data source needs exactly one of {', '.join(READERS)}; got {got}")
    parameters = inspect.signature(READERS[kinds[0]]).parameters
    known = {*kinds, *SLICE_OPTIONS, *list(parameters)[2:]} - {"share", "options"}
    if unknown := sorted(set(source) - known):
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            raise ValueError(
                f"A source of kind {kinds[0]} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}"
            )
    return kinds[0]


def sliced_rows(source: dict, report: Report, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, dict]]:
    """
    The rows of one source that its "first", "count", "every" and speaker options select, and of those the share of this
    process, each with its number.
    """
    kind, options = kind_of(source), dict(source)
    place = options.pop(kind)
    first, count, every = options.pop("first", 0), options.pop("count", None), options.pop("every", 1)
    shift_s = options.pop("shift_s", 0.0)
    if not is_number(shift_s):
        raise ValueError(f"`shift_s` of the source {place} must be a finite number of seconds, got {shift_s!r}")
    exclude, only = list(options.pop("exclude_speakers", ())), options.pop("only_speakers", None)
    for name, value, least in (("first", first, 0), ("count", count, 0), ("every", every, 1)):
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"`{name}` of the source {place} must be a whole number from {least} on, got {value!r}")
    if kind != "dataset":
        options.pop("streaming", None)
    index, processes = share
    by_shards = kind == "dataset" and not {"first", "count", "every"} & set(source)
    if by_shards:
        options["share"] = share
    for number, row in enumerate(READERS[kind](place, report=report, **options)):
        if number < first or (number - first) % every:
            continue
        if count is not None and number >= first + count:
            return
        if row.get("speaker") in exclude or only is not None and row.get("speaker") not in only:
            continue
        chosen = (number - first) // every
        if by_shards:
            yield chosen * processes + index, row
        elif chosen % processes == index:
            yield chosen, row


def unusable(row: dict, limits: Limits) -> str | None:
    """Why a raw row cannot be used, or `None`. Fills in "duration" from the file's header where it is not given."""
    reason = unusable_text(row, limits) or unusable_audio(row) or unusable_words(row)
    if reason:
        return reason
    duration = row.get("duration")
    if duration is not None and not limits.min_s <= duration <= limits.max_s:
        return f"not between {limits.min_s} and {limits.max_s} s long"
    if duration is not None and len(row["text"]) > limits.max_characters_per_s * duration:
        return f"more than {limits.max_characters_per_s} characters a second"
    return None


def unusable_text(row: dict, limits: Limits) -> str | None:
    """What is wrong with the text of a raw row, or `None`."""
    text, spoken = row["text"], row.get("spoken")
    if not isinstance(text, str):
        return f"the text is {type(text).__name__}, not a string"
    if not isinstance(spoken, str | None):
        return f"'spoken' is {type(spoken).__name__}, not a string"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "the text has half a character (a surrogate)"
    if not text.strip():
        return None if isinstance(row["audio"], np.ndarray) else "empty text"
    if not NORMALISERS[limits.normaliser](text):
        return "nothing left of the text after normalisation"
    if len(text) > limits.max_characters:
        return f"more than {limits.max_characters} characters"
    return None


def unusable_audio(row: dict) -> str | None:
    """What is wrong with the audio or the duration of a raw row, or `None`; only a file's header is read."""
    audio, duration = row["audio"], row.get("duration")
    if not isinstance(audio, (str, bytes, dict, np.ndarray)):
        return f"the audio is {type(audio).__name__}, not a path"
    if duration is not None and not (is_number(duration) and duration > 0):
        return f"a duration of {duration!r}"
    file = audio
    if isinstance(audio, dict):
        decoded = any(audio.get(name) is not None for name in ("array", "raw"))
        file = None if decoded else audio.get("path") if audio.get("bytes") is None else audio["bytes"]
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    if isinstance(file, str) and not os.path.isfile(file):
        return "no such audio file"
    if duration is None and isinstance(file, (str, io.BytesIO)):
        try:
            row["duration"] = soundfile.info(file).duration
        except (soundfile.LibsndfileError, *READ_ERRORS) as error:
            return f"unreadable audio ({type(error).__name__})"
    return None


def unusable_words(row: dict) -> str | None:
    """What is wrong with the times of the words of a raw row, or `None`."""
    for name in ("words", "word_anchors"):
        items = row.get(name) or []
        if not isinstance(items, (list, tuple)):
            return f"{name!r} is {type(items).__name__}, not a list"
        for item in items:
            if not isinstance(item, dict) or name == "words" and not isinstance(item.get("word"), str):
                return f"{name!r} has an item that is no word with its times"
            start, end = item.get("start"), item.get("end")
            if not (is_number(start) and is_number(end) and 0 <= start <= end):
                return f"{name!r} has a word from {start!r} to {end!r} s"
    return None


def load_augmented(processor, row: Row, augmentation: Augmentation) -> np.ndarray:
    """
    The augmented waveform `(samples,)` of a row.

    Raises:
        OSError, ValueError: when it cannot be read, is longer than the window or too short for one frame.
    """
    waveform = augmentation(processor.load_audio(row.audio), processor.sampling_rate)
    if len(waveform) > processor.audio_window_s * processor.sampling_rate:
        seconds = len(waveform) / processor.sampling_rate
        raise ValueError(f"{seconds:.1f} s of audio, more than the window of {processor.audio_window_s} s")
    processor.check_length(len(waveform))
    return waveform


class SpeechDataset(torch.utils.data.Dataset):
    """
    Rows for `VoxLMProcessor.collate`: "audio" (augmented waveform) or "states" (from a [`FeatureCache`]), "text", and "words"
    with their times in the augmented audio.

    Args:
        rows (`list[Row]`), processor ([`VoxLMProcessor`])
        augmentations (`list[Augmentation]`, *optional*): one for each row; the same in every epoch, so that a cache can
            hold the encoder states. For more variety, use more copies of the rows.
        cache ([`FeatureCache`], *optional*), keys (`list[str]`): the cache of encoder states, and each row's key in it.
        misheard (`float`): share of the words with times that other words of the dataset replace, the same in every
            epoch (see `augment.misheard`). Only for stages that do not train the LLM.
    """

    def __init__(self, rows: list[Row], processor, augmentations=None, cache=None, keys=None, misheard: float = 0.0):
        self.rows, self.processor, self.cache, self.keys = rows, processor, cache, keys
        self.augmentations = augmentations or [Augmentation()] * len(rows)
        self.misheard, self.skipped = misheard, SkippedRows()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """The transcripts, in order."""
        return [row.text for row in self.rows]

    @property
    def spoken_texts(self) -> list[str]:
        """The transcripts as they are spoken, in order."""
        return [row.text if row.spoken is None else row.spoken for row in self.rows]

    @functools.cached_property
    def vocabulary(self) -> list[str]:
        """The words of the transcripts, each as often as it occurs."""
        return " ".join(self.texts).split()

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Encoder frames of each row: exact from the cache, otherwise estimated from the duration."""
        if self.cache is not None:
            return [self.cache.frames(key) for key in self.keys]
        seconds = [
            augmentation.move(row.duration or UNKNOWN_DURATION_S) + augmentation.tail_s
            for row, augmentation in zip(self.rows, self.augmentations)
        ]
        return [max(1, round(item / self.processor.frame_s)) for item in seconds]

    def timed(self, misheard: float) -> "SpeechDataset":
        """The rows with word times, as a dataset with this `misheard`, which counts skipped rows together with this one."""
        kept = [number for number, row in enumerate(self.rows) if row.words]
        rows, augmentations = ([items[number] for number in kept] for items in (self.rows, self.augmentations))
        keys = None if self.keys is None else [self.keys[number] for number in kept]
        dataset = SpeechDataset(rows, self.processor, augmentations, self.cache, keys, misheard)
        dataset.skipped = self.skipped
        return dataset

    def draw(self, count: int, seed: int, longest_s: float) -> list[Row]:
        """At most `count` rows of at most `longest_s`, drawn at random."""
        rows = [row for row in self.rows if row.duration is None or row.duration <= longest_s]
        return [rows[number] for number in np.random.default_rng(seed).permutation(len(rows))[:count]]

    def __getitem__(self, index: int) -> dict:
        """
        A row; in the place of one whose audio turns out to be unreadable, with a line that names it, the next one.

        Raises:
            IndexError: behind the last row.
            ValueError: when no row can be read.
        """
        if index >= len(self.rows):
            raise IndexError(f"Row {index} of {len(self.rows)}")
        for number in (*range(index, len(self.rows)), *range(index)):
            try:
                return self._item(number)
            except READ_ERRORS as error:
                self.skipped.add(self.rows[number], error)
        raise ValueError(f"None of the {len(self.rows)} recordings can be read")

    def _item(self, index: int) -> dict:
        row, augmentation = self.rows[index], self.augmentations[index]
        rng = np.random.default_rng([index, len(self.rows)])
        item = described(row, augmentation, self.vocabulary if self.misheard else [], self.misheard, rng)
        if self.cache is not None:
            return {**item, "states": self.cache[self.keys[index]]}
        return {**item, "audio": load_augmented(self.processor, row, augmentation)}


def described(row: Row, augmentation: Augmentation, vocabulary: list[str], share: float, rng) -> dict:
    """
    The "text", where it differs "spoken" and, where times are known, "words" of a row, a share of them replaced by others of
    `vocabulary`.
    """
    spoken = {} if row.spoken is None else {"spoken": row.spoken}
    if not row.words:
        return {"text": row.text, **spoken}
    words = augmentation.move_words(row.words)
    text, words = misheard(row.text, words, vocabulary, share, rng) if share else (row.text, words)
    return {"text": text, "words": words, **spoken}


def print_skipped(row: Row, error: Exception):
    """Say in one line that a row is skipped and why."""
    print(f"skipped {row.where or row.id}: {error_line(error)}", file=sys.stderr)


class SkippedRows:
    """Names the rows that are skipped and counts them, also in the workers of a `DataLoader`."""

    def __init__(self):
        # A place for each worker (by its number, shared by a few where there are more), so that none waits for others.
        self.counts = torch.zeros(64, dtype=torch.long, device="cpu").share_memory_()

    def add(self, row: Row, error: Exception):
        worker = get_worker_info()
        self.counts[0 if worker is None else worker.id % len(self.counts)] += 1
        print_skipped(row, error)

    def take(self) -> int:
        """How many there were since the last time."""
        count = int(self.counts.sum())
        self.counts.zero_()
        return count


def length_batches(lengths: dict[int, int], limit: float) -> list[list[int]]:
    """
    Group items of similar length so that each group, padded to its longest, stays within `limit`.

    Args:
        lengths: item -> length; limit: in the same unit. An item longer than the limit is a group of its own.
    """
    return list(padded_batches(sorted(lengths, key=lengths.get), lengths.get, limit))


class LengthBatchSampler(torch.utils.data.Sampler):
    """
    Batches of rows of similar length, limited by their padded length and not by their number; shuffled again in each
    epoch.

    Every epoch of the Trainer has the same number of batches, as resuming needs, although a new order makes a few more or
    fewer of them: the passes over the rows follow each other, and an epoch takes the next so many batches.

    Args:
        lengths (`list[int]`): of each row; limit (`float`): largest padded length of a whole batch.
        seed (`int`): of the order. pool (`int`): so many rows of the shuffled order are sorted by length together;
            chosen by hand, not tuned.
        multiple (`int`): the number of batches of an epoch is a multiple of this, the number of processes.
    """

    def __init__(self, lengths: list[int], limit: float, seed: int = 0, pool: int = 512, multiple: int = 1):
        self.lengths, self.limit, self.seed, self.pool = lengths, limit, seed, pool
        self.count = -(-len(self.one_pass(0)) // multiple) * multiple
        # How many batches come before each pass, as far as it is known.
        self.starts = [0]
        self.set_epoch(0)

    def one_pass(self, number: int) -> list[list[int]]:
        """The batches of one pass over all rows."""
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self.lengths)).tolist()
        batches = []
        for first in range(0, len(order), self.pool):
            pool = {index: self.lengths[index] for index in order[first : first + self.pool]}
            of_pool = length_batches(pool, self.limit)
            batches += [of_pool[place] for place in rng.permutation(len(of_pool))]
        return batches

    def set_epoch(self, epoch: int):
        """Choose the batches of an epoch; the Trainer calls it."""
        first, self.batches = epoch * self.count, []
        number = bisect_right(self.starts, first) - 1
        while len(self.batches) < self.count:
            batches = self.one_pass(number)
            self.batches += batches[max(0, first - self.starts[number]) :]
            number += 1
            if number == len(self.starts):
                self.starts.append(self.starts[-1] + len(batches))
        self.batches = self.batches[: self.count]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return self.count
