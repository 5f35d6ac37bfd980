"""
Rows of WebDataset shards: tar archives in which the files of one recording follow each other and share their name.

`datasets` finds and opens the shards, wherever they are; it could read audio in them only with torchcodec.
"""

import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator

from datasets import DatasetBuilder, StreamingDownloadManager
from datasets.packaged_modules.webdataset.webdataset import WebDataset


# What reading an archive may raise.
ARCHIVE_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError)


def is_webdataset(builder: DatasetBuilder) -> bool:
    """Whether a dataset consists of WebDataset shards."""
    return isinstance(builder, WebDataset)


def shards_of(builder: DatasetBuilder, split: str) -> list[str]:
    """
    The paths or addresses of a split's shards.

    Raises:
        ValueError: for a split that the dataset does not have.
    """
    files = builder.config.data_files or {}
    if split not in files:
        raise ValueError(f"The dataset {builder.dataset_name} has no split {split!r}; it has {', '.join(files)}")
    return [str(path) for path in files[split]]


def shard_rows(
    shards: list[str], report, audio_column: str, text_column: str, share: tuple[int, int]
) -> Iterator[dict]:
    """
    Raw rows of shards, read one after another from their beginning to their end.

    Args:
        report ([`Report`]): gets the samples without audio or text, and the shards that are damaged.
        audio_column (`str`): extension of the recordings, such as "flac".
        text_column (`str`): extension of the transcripts, such as "txt"; or "json.KEY" for a value in a JSON file, in
            which "duration", "words" and "speaker" count too.
        share: number of this process and of all; each reads other shards, or other samples where the shards are fewer.

    Raises:
        ValueError: when no sample has both columns.
    """
    index, count = share
    by_shards = len(shards) >= count
    found, seen, number = False, set(), -1
    for shard in shards[index::count] if by_shards else shards:
        for key, files in samples_of(shard, report):
            number += 1
            seen.update(files)
            if not by_shards and number % count != index:
                continue
            row = row_of(files, audio_column, text_column)
            if isinstance(row, str):
                report.leave_out(row, f"{shard}: {key}")
                continue
            found = True
            yield {"id": key, **row, "where": f"{shard}: {key}"}
    if seen and not found and not {audio_column, text_column.partition(".")[0]} <= seen:
        missing = audio_column if audio_column not in seen else text_column
        raise ValueError(f"The shards have no column {missing!r}; they have {', '.join(sorted(seen))}")


def samples_of(shard: str, report) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The name of each sample of a shard, and its files by their extensions: all after the first dot of the name."""
    key, files = None, {}
    for name, content in members_of(shard, report):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if folder + slash + stem != key:
            if files:
                yield key, files
            key, files = folder + slash + stem, {}
        files[extension] = content
    if files:
        yield key, files


def members_of(shard: str, report) -> Iterable[tuple[str, bytes]]:
    """Names and contents of an archive's files; where it is damaged, it ends, and the report says so."""
    try:
        for name, file in StreamingDownloadManager().iter_archive(shard):
            yield name, file.read()
    except ARCHIVE_ERRORS as error:
        report.leave_out("the rest of a damaged archive", f"{shard}: {' '.join(str(error).split())}")


def row_of(files: dict[str, bytes], audio_column: str, text_column: str) -> dict | str:
    """The raw row of one sample, or what is wrong with it."""
    extension, _, name = text_column.partition(".")
    for needed in (audio_column, extension):
        if needed not in files:
            return f"no {needed!r}"
    audio = {"bytes": files[audio_column], "path": f"sample.{audio_column}"}
    try:
        text = files[extension].decode("utf-8-sig")
    except UnicodeDecodeError:
        return "not UTF-8"
    if extension != "json":
        return {"audio": audio, "text": text.strip()}
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return "not JSON"
    if not isinstance(values, dict) or values.get(name) is None:
        return f"no {text_column!r}"
    known = {key: values[key] for key in ("duration", "words", "speaker") if key in values}
    return {"audio": audio, "text": values[name], **known}
