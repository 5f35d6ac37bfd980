"""
Rows of speech to train or evaluate on, from manifests, folders, LibriSpeech or `datasets`, all read by `read_rows`.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from datasets import Audio, load_dataset

from voxlm_hf.decoding_voxlm import padded_batches

from .augment import Augmentation, misheard, non_speech
from .text import NORMALISERS


# Examples of each reason in a report; a few are enough to recognise a pattern. Chosen by hand, not tuned.
EXAMPLES = 3
# Seconds that a row without a known duration is taken to last when batches are made. Chosen by hand, not tuned.
UNKNOWN_DURATION_S = 10.0


@dataclass
class Row:
    """
    One recording and its transcript.

    Args:
        id (`str`): unique within its source.
        audio: a path, or any other kind that `VoxLMProcessor.load_audio` takes.
        text (`str`): the transcript, normalised; empty for a recording without speech.
        duration (`float`, *optional*): seconds.
        words (`list[dict]`, *optional*): `{"word", "start", "end"}` in seconds.
        speaker (`str`, *optional*)
        anchors (`list[dict]`, *optional*): times of some words, with "index", the word's place in the text; for
            evaluation only.
        place (`tuple[int, int]`): number of its source and its own number there, the same whichever other rows are left
            out.
    """

    id: str
    audio: object
    text: str
    duration: float | None = None
    words: list[dict] | None = None
    speaker: str | None = None
    anchors: list[dict] | None = None
    place: tuple[int, int] = (0, 0)


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


def manifest_rows(path: Path, report: Report) -> Iterator[dict]:
    """
    Rows of a JSONL manifest: "audio" (relative to it) and "text", optionally "duration", "words", "word_anchors",
    "speaker", "id".

    A line that is not a JSON object or lacks a field goes into the report and is left out.
    """
    path = Path(path)
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                report.leave_out("not JSON", f"{path}:{number}: {error}")
                continue
            missing = [name for name in ("audio", "text") if not isinstance(row, dict) or row.get(name) is None]
            if missing:
                report.leave_out(f"no {missing[0]!r}", f"{path}:{number}")
                continue
            yield {"id": f"{path.stem}-{number}", **row, "audio": str(path.parent / row["audio"])}


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
        if not transcript.exists():
            report.leave_out("no transcript beside it", str(path))
            continue
        yield {"id": str(path.relative_to(folder)), "audio": str(path), "text": transcript.read_text().strip()}


def librispeech_rows(folder: Path, report: Report) -> Iterator[dict]:
    """Rows of LibriSpeech's own layout: SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside its .flac files."""
    folder = Path(folder)
    transcripts = sorted(folder.rglob("*.trans.txt"))
    if not transcripts:
        raise ValueError(f"{folder} has no *.trans.txt below it, so it is not in LibriSpeech's layout")
    for transcript in transcripts:
        for line in transcript.read_text().splitlines():
            name, _, text = line.partition(" ")
            yield {
                "id": name,
                "audio": str(transcript.parent / f"{name}.flac"),
                "text": text,
                "speaker": name.split("-")[0],
            }


def dataset_rows(
    name: str, report: Report, split="train", streaming=False, audio_column="audio", text_column="text", **options
) -> Iterator[dict]:
    """
    Rows of a `datasets` dataset: a Hub name, a folder of audio, or "parquet" with `data_files`.

    Audio stays as bytes or path until it is needed, so `datasets` needs no audio decoder.

    Args:
        **options: for `datasets.load_dataset`.
    """
    dataset = load_dataset(name, split=split, streaming=streaming, **options)
    columns = dataset.column_names or list(next(iter(dataset)))
    for column in (audio_column, text_column):
        if column not in columns:
            raise ValueError(f"The dataset {name} has no column {column!r}; it has {', '.join(columns)}")
    if isinstance((dataset.features or {}).get(audio_column), Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    for number, row in enumerate(dataset):
        kept = {key: row[key] for key in ("duration", "words", "speaker") if key in row}
        yield {"id": f"{split}-{number}", **kept, "audio": row[audio_column], "text": row[text_column]}


def silent_rows(count: int, report: Report, seed: int = 0) -> Iterator[dict]:
    """
    Synthetic clips without speech and with empty transcripts, from which the model learns that silence and noise
    contain no words.
    """
    for number in range(count):
        waveform = non_speech(np.random.default_rng([seed, number]))
        yield {"id": f"silent-{seed}-{number}", "audio": waveform, "text": "", "duration": len(waveform) / 16000}


READERS: dict[str, Callable[..., Iterator[dict]]] = {
    "manifest": manifest_rows,
    "folder": folder_rows,
    "librispeech": librispeech_rows,
    "dataset": dataset_rows,
    "silence": silent_rows,
}


def read_rows(
    sources: Iterable[dict],
    normaliser: str = "none",
    min_s: float = 0.1,
    max_s: float = 30.0,
    max_characters: int = 1000,
    max_characters_per_s: float = 40.0,
) -> tuple[list[Row], Report]:
    """
    All usable rows of some sources, in order. The default limits were chosen by hand, not tuned.

    Args:
        sources: each names its kind and place, `{"manifest": PATH}`, `{"folder": FOLDER}`, `{"librispeech": FOLDER}`,
            `{"dataset": NAME, ...}` or `{"silence": COUNT}`, with the options of that kind (see the functions in
            `READERS`) and, for any kind: "first" and "count" (a slice), "every" (only each N-th), "exclude_speakers" or
            "only_speakers".
        normaliser: name in `voxlm_training.text.NORMALISERS`, applied to transcripts and words.
        min_s, max_s: shortest and longest recording in seconds; max_characters: longest transcript;
        max_characters_per_s: nobody speaks faster, so where the transcript has more, it belongs to other audio.

    Returns:
        the rows, and a report of what was left out.

    Raises:
        ValueError: for a source of an unknown kind.
    """
    normalise, report, rows = NORMALISERS[normaliser], Report(), []
    for source_number, source in enumerate(sources):
        for number, raw in _slice(source, report):
            reason = unusable(raw, min_s, max_s, max_characters, max_characters_per_s)
            if not reason and raw["text"].strip() and not normalise(raw["text"]):
                reason = "nothing left of the text after normalisation"
            if reason:
                report.leave_out(reason, str(raw["id"]))
            else:
                rows.append(_make_row(raw, normalise, (source_number, number)))
    report.kept = len(rows)
    return rows, report


def _make_row(raw: dict, normalise: Callable[[str], str], place: tuple[int, int]) -> Row:
    """A usable raw row with its text and words normalised."""
    words = [{**word, "word": normalise(word["word"])} for word in raw.get("words") or []]
    return Row(
        id=str(raw["id"]),
        audio=raw["audio"],
        text=normalise(raw["text"]),
        duration=raw.get("duration"),
        words=words or None,
        speaker=raw.get("speaker"),
        anchors=raw.get("word_anchors"),
        place=place,
    )


def _slice(source: dict, report: Report) -> Iterator[tuple[int, dict]]:
    """The rows of one source that its "first", "count", "every" and speaker options select, each with its number."""
    options = dict(source)
    kinds = [kind for kind in READERS if kind in options]
    if len(kinds) != 1:
        raise ValueError(f"A data source needs exactly one of {', '.join(READERS)}; got keys {sorted(source)}")
    place = options.pop(kinds[0])
    first, count, every = options.pop("first", 0), options.pop("count", None), options.pop("every", 1)
    exclude, only = set(options.pop("exclude_speakers", ())), options.pop("only_speakers", None)
    for number, row in enumerate(READERS[kinds[0]](place, report=report, **options)):
        if number < first or (number - first) % every:
            continue
        if count is not None and number >= first + count:
            return
        if row.get("speaker") in exclude or only is not None and row.get("speaker") not in only:
            continue
        yield (number - first) // every, row


def unusable(row: dict, min_s, max_s, max_characters, max_characters_per_s) -> str | None:
    """Why a raw row cannot be used, or `None`. Fills in "duration" from the file's header where it is not given."""
    if not isinstance(row["text"], str):
        return f"the text is {type(row['text']).__name__}, not a string"
    if not row["text"].strip() and not isinstance(row["audio"], np.ndarray):
        return "empty text"
    if row.get("duration") is None and isinstance(row["audio"], str):
        try:
            row["duration"] = soundfile.info(row["audio"]).duration
        except (soundfile.LibsndfileError, OSError) as error:
            return f"unreadable audio ({type(error).__name__})"
    duration = row.get("duration")
    if duration is not None and not min_s <= duration <= max_s:
        return f"not between {min_s} and {max_s} s long"
    if len(row["text"]) > max_characters:
        return f"more than {max_characters} characters"
    if duration is not None and len(row["text"]) > max_characters_per_s * duration:
        return f"more than {max_characters_per_s} characters a second"
    return None


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
        self.misheard = misheard

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """The transcripts, in order."""
        return [row.text for row in self.rows]

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

    def __getitem__(self, index: int) -> dict:
        row, augmentation = self.rows[index], self.augmentations[index]
        item = {"text": row.text}
        if row.words:
            item["words"] = augmentation.move_words(row.words)
            if self.misheard:
                rng = np.random.default_rng([index, len(self.rows)])
                item["text"], item["words"] = misheard(row.text, item["words"], self.vocabulary, self.misheard, rng)
        if self.cache is not None:
            return {**item, "states": self.cache[self.keys[index]]}
        return {**item, "audio": augmentation(self.processor.load_audio(row.audio), self.processor.sampling_rate)}


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

    Args:
        lengths (`list[int]`): of each row; limit (`float`): largest padded length of a whole batch.
        seed (`int`): of the order. pool (`int`): so many rows of the shuffled order are sorted by length together;
            chosen by hand, not tuned.
        multiple (`int`): the number of batches is cut to a multiple of this, the number of processes.
    """

    def __init__(self, lengths: list[int], limit: float, seed: int = 0, pool: int = 512, multiple: int = 1):
        self.lengths, self.limit, self.seed, self.pool, self.multiple = lengths, limit, seed, pool, multiple
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        """Draw the order of an epoch; accelerate's data loader calls it."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths)).tolist()
        self.batches = []
        for first in range(0, len(order), self.pool):
            pool = {index: self.lengths[index] for index in order[first : first + self.pool]}
            batches = length_batches(pool, self.limit)
            self.batches += [batches[place] for place in rng.permutation(len(batches))]
        self.batches = self.batches[: len(self.batches) // self.multiple * self.multiple]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
