"""`voxlm batch`: many recordings on one machine or a cluster, with Ray Data; a restart skips finished files."""

import bisect
import contextlib
import hashlib
import json
import logging
import os
import posixpath
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from ..transcription_voxlm import error_line
from .files import write_atomically
from .formats import encode


logger = logging.getLogger(__name__)

# Formats that libsndfile reads.
AUDIO_SUFFIXES = {".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"}
# The columns of a result; words and segments are JSON in Parquet, so that every shard has the same schema.
TEXT_COLUMNS = ("id", "text", "words", "segments", "language", "error")
# How the files are called that `shard_name` names.
SHARD_NAME = re.compile(r"part-.*\.(jsonl|parquet)")
# Rows of a Parquet file that are in memory at once.
ROWS_AT_ONCE = 4


def find_items(sources: list[str]) -> list[dict]:
    """
    List the recordings to transcribe.

    Args:
        sources: manifests (`.jsonl` with "audio" and, optionally, "id"; `.parquet` with a column "audio" of paths or of
            `{"bytes"}` and, optionally, "id"), globs, folders or audio files, each a path or a URL that fsspec knows (s3://...).

    Returns:
        rows with "id" and "audio" (a path), or "table" and "row" where the audio is in a Parquet file.

    Raises:
        ValueError: for a source without recordings, a row without "audio", or a duplicate id.
    """
    items = []
    for source in sources:
        found = _manifest(source) if source.endswith((".jsonl", ".parquet")) else _files(source)
        if not found:
            raise ValueError(f"{source} contains no recordings")
        items += found
    seen: set[str] = set()
    for item in items:
        item["id"] = encode(item["id"]).decode()  # a file name may be no text
        if item["id"] in seen:
            raise ValueError(f"The id {item['id']!r} occurs twice; every recording needs its own")
        seen.add(item["id"])
    return items


def _files(source: str) -> list[dict]:
    if not source.strip():
        raise ValueError("a source is empty, which would be the current folder; give `.` for that")
    files, path = fsspec.core.url_to_fs(source)
    if files.isdir(path):
        found = [name for name in files.find(path) if posixpath.splitext(name)[1].lower() in AUDIO_SUFFIXES]
    else:
        found = [path] if files.exists(path) else files.glob(path)
    local = "://" not in source
    return [
        {"id": name, "audio": name}
        for name in sorted(name if local else files.unstrip_protocol(name) for name in found)
    ]


def _manifest(source: str) -> list[dict]:
    rows, in_table = _table_rows(source) if source.endswith(".parquet") else (_json_rows(source), False)
    folder, items = posixpath.dirname(source), []
    for number, row in enumerate(rows):
        if in_table:
            item = {"id": f"{source}#{number}", "table": source, "row": number}
        else:
            # Relative paths are relative to the manifest, as in training.
            path = row["audio"] if "://" in row["audio"] else posixpath.join(folder, row["audio"])
            item = {"id": path, "audio": path}
        items.append(item if row.get("id") is None else {**item, "id": str(row["id"])})
    return items


def _table_rows(source: str) -> tuple[list[dict], bool]:
    """What is small of the rows of a Parquet file ("id", and "audio" where that is a path), and whether it holds the audio."""
    import pyarrow
    import pyarrow.parquet

    try:
        with fsspec.open(source, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if "audio" not in names:
                raise ValueError(f"{source} has no column 'audio'; it has {', '.join(names)}")
            kind = table.schema_arrow.field("audio").type
            paths = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            columns = [name for name in ("id", "audio") if name in names and (name != "audio" or paths)]
            rows = table.read(columns).to_pylist() if columns else [{}] * table.metadata.num_rows
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{source} is no complete Parquet file: {error}") from None
    for number, row in enumerate(rows):
        if paths and row["audio"] is None:
            raise ValueError(f"{source}, row {number}, has no path under 'audio'")
    return rows, not paths


def _json_rows(source: str) -> list[dict]:
    rows = []
    with fsspec.open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            # Bytes that are no text may be part of a file's name.
            line = line.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}, line {number}, is not JSON: {error}") from None
            if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get("audio"), str):
                raise ValueError(f"{source}, line {number}, has no path under 'audio'")
    return rows


def shard_name(items: list[dict], suffix: str) -> str:
    """The file name for the results of these recordings: the same for the same recordings."""
    return f"part-{hashlib.sha1(json.dumps([item['id'] for item in items]).encode()).hexdigest()[:16]}.{suffix}"


def write_shard(path: str, rows: list[dict]):
    """Write results as JSON Lines or, by the file's suffix, Parquet; the file appears complete or not at all."""
    files, target = fsspec.core.url_to_fs(path)
    if path.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        flat = [
            {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
        ]
        columns = [(name, pyarrow.string()) for name in TEXT_COLUMNS]
        numbers = [(name, pyarrow.float64()) for name in ("duration", "language_probability")]
        schema = pyarrow.schema([*columns, *numbers, ("truncated", pyarrow.bool_())])
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat, schema), sink)
        content = sink.getvalue().to_pybytes()
    else:
        content = encode("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if isinstance(files, LocalFileSystem):
        write_atomically(target, content)
        return
    unfinished = f"{posixpath.dirname(target)}/.{posixpath.basename(target)}.{os.getpid()}.unfinished"
    files.pipe_file(unfinished, content)
    files.mv(unfinished, target)


def read_shard(path: str, columns: list[str] | None = None) -> list[dict]:
    """
    The rows of a shard, as they were written.

    Args:
        columns: the only ones that are needed.

    Raises:
        ValueError: when it is no complete shard.
    """
    try:
        with fsspec.open(path, "rb") as file:
            if path.endswith(".parquet"):
                import pyarrow.parquet

                rows = pyarrow.parquet.read_table(file, columns=columns).to_pylist()
            else:
                rows = [json.loads(line) for line in file]
        rows = [
            {
                key: json.loads(value) if key in ("words", "segments") and isinstance(value, str) else value
                for key, value in row.items()
            }
            for row in rows
        ]
        if not rows or not all(isinstance(row["id"], str) and "error" in row for row in rows):
            raise ValueError("rows are missing")
    except (ValueError, LookupError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is no complete shard: {error}") from None
    return rows


def shards(output: str) -> list[str]:
    """The finished shards in a folder."""
    files, path = fsspec.core.url_to_fs(output)
    if not files.isdir(path):
        return []
    # Not by a glob: the folder's own name may hold the characters of one.
    names = [name for name in files.ls(path, detail=False) if SHARD_NAME.fullmatch(posixpath.basename(name))]
    return sorted(name if "://" not in output else files.unstrip_protocol(name) for name in names)


class Worker:
    """An actor that holds the model; each call transcribes the recordings of one shard and writes it."""

    def __init__(self, load, threads: int, output: str, options: dict):
        torch.set_num_threads(threads)
        self.load, self.output, self.options = load, output, options
        self.model, self.read = None, ItemReader()

    def __call__(self, batch: dict) -> dict:
        """Counts of a batch of one shard, and under "stopped" what keeps this worker from working, else an empty string."""
        counts = {"files": 0, "failed": 0, "seconds": 0.0, "stopped": ""}
        try:
            if self.model is None:
                self.model = self.load()
            counts |= self._shard(**json.loads(batch["work"][0]))
        except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
            # As a result: Ray would hand over an exception as the lines of several tracebacks.
            counts["stopped"] = f"{type(error).__name__}: {error}"
        return {key: [value] for key, value in counts.items()}

    def _shard(self, shard: str, items: list[dict], retry: bool) -> dict:
        path = f"{self.output}/{shard}"
        files, target = fsspec.core.url_to_fs(path)
        # Written by an earlier run or, just now, by a worker that was killed before it could say so.
        rows = {row["id"]: row for row in read_shard(path)} if files.exists(target) else {}
        todo = [item for item in items if item["id"] not in rows or retry and rows[item["id"]]["error"] is not None]
        if todo:
            for item, result in zip(todo, self._results(todo)):
                rows[item["id"]] = {
                    "id": item["id"],
                    "text": result["text"],
                    "words": result["words"],
                    "segments": result["segments"],
                    "duration": result["duration"],
                    "truncated": result["truncated"],
                    "language": result.get("language"),
                    "language_probability": result.get("language_probability"),
                    "error": result.get("error"),
                }
            write_shard(path, list(rows.values()))
        done = [rows[item["id"]] for item in items]
        failed = sum(row["error"] is not None for row in done)
        return {"files": len(done), "failed": failed, "seconds": float(sum(row["duration"] for row in done))}

    def _results(self, items: list[dict]) -> list[dict]:
        """
        The results of recordings in the same order. Where the model fails at all of them, each is tried by itself; the error of
        one at which it fails is its result.

        Raises:
            ValueError, ImportError: when the model cannot be used with these options.
        """
        try:
            return self.model.transcribe([self.read(item) for item in items], **self.options)
        except (RuntimeError, MemoryError) as error:
            reason = error_line(error)
        # Only here, where the error no longer keeps the memory that ran out.
        if len(items) > 1:
            return [result for item in items for result in self._results([item])]
        logger.warning(f"{items[0]['id']} could not be transcribed: {reason}")
        return [{"text": "", "words": [], "segments": [], "duration": 0.0, "truncated": False, "error": reason}]


class ItemReader:
    """
    Recordings as `transcribe` accepts them: a local path as it is, anything else fetched when it is needed.

    Asked for in order, the rows of a Parquet file are read once and a few at a time.
    """

    def __init__(self):
        self.source, self.file, self.starts, self.group, self.position = None, None, [], None, 0
        self.fetched, self.content = None, {}

    def __call__(self, item: dict) -> "str | FetchedAudio":
        """The recording of an item of `find_items`."""
        return item["audio"] if "table" not in item and "://" not in item["audio"] else FetchedAudio(self, item)

    def fetch(self, item: dict) -> Mapping:
        """
        An item's audio dict, as long as no other item is fetched.

        Raises:
            OSError: when it cannot be fetched.
        """
        if item != self.fetched:
            self.fetched, self.content = None, {}
            try:
                if "table" in item:
                    content = self._row(item["table"], item["row"])
                else:
                    with fsspec.open(item["audio"], "rb") as file:
                        content = file.read()
            except (OSError, ValueError, StopIteration) as error:
                self.source = None
                raise OSError(f"{item.get('audio') or item['id']}: {error}") from None
            self.fetched, self.content = item, content if isinstance(content, Mapping) else {"bytes": content}
        return self.content

    def _row(self, source: str, row: int):
        import pyarrow.parquet

        if source != self.source:
            if self.file is not None:
                self.file.close()
            self.file = fsspec.open(source, "rb").open()
            # Pages are decoded as they are needed.
            self.table = pyarrow.parquet.ParquetFile(self.file, buffer_size=2**20, pre_buffer=False)
            sizes = [self.table.metadata.row_group(group).num_rows for group in range(self.table.num_row_groups)]
            self.source, self.starts, self.group = source, list(accumulate(sizes, initial=0)), None
        group = bisect.bisect_right(self.starts, row) - 1
        if group != self.group or row < self.position:
            self.group, self.position, self.rows = group, self.starts[group], self._rows(group)
        while True:
            value, self.position = next(self.rows), self.position + 1
            if self.position > row:
                return value.as_py()

    def _rows(self, group: int) -> Iterator:
        for batch in self.table.iter_batches(ROWS_AT_ONCE, [group], ["audio"], use_threads=False):
            yield from batch.column("audio")


class FetchedAudio(Mapping):
    """The audio dict of an item that an [`ItemReader`] fetches when it is read, so that few are in memory at once."""

    def __init__(self, reader: ItemReader, item: dict):
        self.reader, self.item = reader, item

    def __getitem__(self, key: str):
        return self.reader.fetch(self.item)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader.fetch(self.item))

    def __len__(self) -> int:
        return len(self.reader.fetch(self.item))


class Stopped(RuntimeError):
    """What ends a run that has begun; what is finished by then is written."""


def run(
    load,
    sources: list[str],
    output: str,
    suffix: str = "jsonl",
    files_per_shard: int = 32,
    workers: int | None = None,
    threads: int = 2,
    address: str | None = None,
    retry_failed: bool = False,
    **options,
) -> dict:
    """
    Transcribe all recordings of `sources` that `output` has no result for yet.

    Every `files_per_shard` recordings are one shard, written by one call of one worker and named after its recordings: an
    interrupted shard is transcribed again as a whole, a finished one never; a damaged one is put aside and made again.

    Args:
        load: makes the model, on the worker.
        sources (`list[str]`): see `find_items`.
        output (`str`): folder, or a URL that fsspec knows.
        suffix (`"jsonl"` or `"parquet"`)
        workers (`int`, *optional*): by default as many as the cores allow, or one for each GPU.
        threads (`int`): cores of each worker.
        address (`str`, *optional*): of a Ray cluster, whose nodes have this package, the model and the files; by default Ray
            is started here, or the caller's session used.
        retry_failed (`bool`): transcribe again what failed in an earlier run; its shards get the new rows.
        **options: for `transcribe`.

    Returns:
        counts of this run: "files", "failed", "seconds" of audio, "skipped" (finished before), "failed_before" (of those) and
        "wall" seconds.

    Raises:
        ImportError: without Ray.
        ValueError: see `find_items`.
        RuntimeError: when the workers cannot work; [`Stopped`] when one dies, or after recordings have been transcribed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"`voxlm batch` needs Ray: pip install 'voxlm-hf[scale]' ({error})") from None
    items = find_items(sources)
    output = output.rstrip("/") if "://" in output else str(Path(output).absolute())
    errors = finished(output)
    work = pending_work(items, errors, suffix, max(1, files_per_shard), retry_failed)
    pending = sum(len(unit["items"]) for unit in work)
    totals = {"files": 0, "failed": 0, "seconds": 0.0, "skipped": len(items) - pending, "wall": 0.0}
    failed_before = {item["id"] for item in items if item["id"] in errors and errors[item["id"]][1] is not None}
    totals["failed_before"] = 0 if retry_failed else len(failed_before)
    if not work:
        return totals
    started = time.perf_counter()
    with ray_session(address):
        dataset = worker_dataset(work, workers, threads, (load, output, options))
        try:
            add_counts(totals, dataset.iter_rows(), len(items))
        except ray.exceptions.RayError as error:
            raise Stopped(f"a worker died: {str(error).strip().splitlines()[-1]}") from error
    totals["wall"] = time.perf_counter() - started
    return totals


def add_counts(totals: dict, rows: Iterable[dict], num_items: int):
    """
    Add what [`Worker`]s return to the counts of `run`, under a progress bar of so many items.

    Raises:
        RuntimeError: when a worker cannot work; [`Stopped`] after recordings have been transcribed.
    """
    started, hidden = time.perf_counter(), not sys.stderr.isatty()
    with tqdm(total=num_items, initial=totals["skipped"], unit="file", desc="Transcribing", disable=hidden) as bar:
        for counts in rows:
            if stopped := counts.pop("stopped"):
                raise (Stopped if totals["files"] else RuntimeError)(f"a worker cannot work: {stopped}")
            for key, value in counts.items():
                totals[key] += value
            bar.update(counts["files"])
            speed = totals["seconds"] / (time.perf_counter() - started)
            bar.set_postfix_str(f"{speed:.1f} times real time, {totals['failed']} failed")


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Meanwhile, Ray runs: the caller's session if there is one, which stays, else one that ends."""
    import ray

    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        terminate = signal.getsignal(signal.SIGTERM)
        ray.init(address=address, logging_level="error", log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # Ray's exits with 15 and says nothing
    context, lines = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, lines.level
    lines.setLevel(logging.ERROR)
    context.enable_progress_bars, context.print_on_execution_start = False, False
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start, level = before
        lines.setLevel(level)
        if started:
            ray.shutdown()


def finished(output: str) -> dict[str, tuple[str, str | None]]:
    """
    The recordings that a folder has results for: for each id, its shard and its error, `None` where there is none.

    Makes the folder if there is none, and puts damaged shards aside.
    """
    files, folder = fsspec.core.url_to_fs(output)
    files.makedirs(folder, exist_ok=True)
    found = {}
    for shard in shards(output):
        try:
            rows = read_shard(shard, ["id", "error"])
        except ValueError as error:
            path = fsspec.core.url_to_fs(shard)[1]
            files.mv(path, f"{path}.damaged")
            logger.warning(f"{error}; its recordings are transcribed again")
            continue
        for row in rows:
            if row["id"] not in found or row["error"] is None:
                found[row["id"]] = posixpath.basename(shard), row["error"]
    return found


def pending_work(items: list[dict], errors: dict, suffix: str, size: int, retry_failed: bool) -> list[dict]:
    """
    What is to be done: for each shard its name ("shard"), "items" and whether it is there and its failed rows are tried again
    ("retry").

    Args:
        items: of `find_items`.
        errors: of `finished`.
        size: most items of a new shard.
    """
    # Grouped before finished items are left out: should a worker of a killed run still write its shard, it writes the very
    # shard that this run writes.
    groups = [items[first : first + size] for first in range(0, len(items), size)]
    groups = [[item for item in group if item["id"] not in errors] for group in groups]
    work = [{"shard": shard_name(group, suffix), "items": group, "retry": False} for group in groups if group]
    again: dict[str, list[dict]] = {}
    for item in items if retry_failed else []:
        shard, error = errors.get(item["id"], (None, None))
        if error is not None:
            again.setdefault(shard, []).append(item)
    return work + [{"shard": shard, "items": group, "retry": True} for shard, group in again.items()]


def worker_dataset(work: list[dict], workers: int | None, threads: int, setup: tuple):
    """A lazy Ray dataset of the counts of each shard, computed by [`Worker`] actors; `setup` is (load, output, options)."""
    import ray

    load, output, options = setup
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    threads = min(threads, cores)
    workers = min(workers or gpus or max(1, cores // threads), len(work))
    rows = [{"work": json.dumps(unit)} for unit in work]
    return ray.data.from_items(rows, override_num_blocks=len(work)).map_batches(
        Worker,
        fn_constructor_args=(load, threads, output, options),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=min(threads, cores // workers) or 1,
        num_gpus=1 if gpus else 0,
    )
