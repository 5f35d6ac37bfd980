"""`voxlm batch`: many recordings on one machine or a cluster, with Ray Data; a restart skips finished files."""

import hashlib
import json
import os
import posixpath
import time
from pathlib import Path

import fsspec
import torch
from tqdm import tqdm


# Formats that libsndfile reads.
AUDIO_SUFFIXES = {".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"}
# The columns of a result; words and segments are JSON in Parquet, so that every shard has the same schema.
TEXT_COLUMNS = ("id", "text", "words", "segments", "error")


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
        if item["id"] in seen:
            raise ValueError(f"The id {item['id']!r} occurs twice; every recording needs its own")
        seen.add(item["id"])
    return items


def _files(source: str) -> list[dict]:
    files, path = fsspec.core.url_to_fs(source)
    if files.isdir(path):
        found = [name for name in files.find(path) if posixpath.splitext(name)[1].lower() in AUDIO_SUFFIXES]
    else:
        found = files.glob(path)
    local = "://" not in source
    return [
        {"id": name, "audio": name}
        for name in sorted(name if local else files.unstrip_protocol(name) for name in found)
    ]


def _manifest(source: str) -> list[dict]:
    if source.endswith(".parquet"):
        import pyarrow.parquet

        with fsspec.open(source, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if "audio" not in names:
                raise ValueError(f"{source} has no column 'audio'; it has {', '.join(names)}")
            paths = pyarrow.types.is_string(table.schema_arrow.field("audio").type)
            columns = [name for name in ("id", "audio") if name in names and (name != "audio" or paths)]
            rows = table.read(columns).to_pylist() if columns else [{}] * table.metadata.num_rows
        if not paths:
            return [
                {"id": row.get("id", f"{source}#{number}"), "table": source, "row": number}
                for number, row in enumerate(rows)
            ]
    else:
        rows = []
        with fsspec.open(source, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{source}, line {number}, is not JSON: {error}") from None
                if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get("audio"), str):
                    raise ValueError(f"{source}, line {number}, has no path under 'audio'")
    folder = posixpath.dirname(source)
    # Relative paths are relative to the manifest, as in training.
    audio = [row["audio"] if "://" in row["audio"] else posixpath.join(folder, row["audio"]) for row in rows]
    return [{"id": str(row.get("id", path)), "audio": path} for row, path in zip(rows, audio)]


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
        schema = pyarrow.schema([*columns, ("duration", pyarrow.float64()), ("truncated", pyarrow.bool_())])
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat, schema), sink)
        content = sink.getvalue().to_pybytes()
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    unfinished = f"{posixpath.dirname(target)}/.{posixpath.basename(target)}.{os.getpid()}.unfinished"
    files.pipe_file(unfinished, content)
    files.mv(unfinished, target)


def read_shard(path: str, columns: list[str] | None = None) -> list[dict]:
    """The rows of a shard, as they were written."""
    with fsspec.open(path, "rb") as file:
        if not path.endswith(".parquet"):
            return [json.loads(line) for line in file]
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(file, columns=columns).to_pylist()
    return [
        {key: json.loads(value) if key in ("words", "segments") else value for key, value in row.items()}
        for row in rows
    ]


def shards(output: str) -> list[str]:
    """The finished shards in a folder."""
    files, path = fsspec.core.url_to_fs(output)
    if not files.isdir(path):
        return []
    names = [name for kind in ("jsonl", "parquet") for name in files.glob(f"{path}/part-*.{kind}")]
    return sorted(name if "://" not in output else files.unstrip_protocol(name) for name in names)


class Worker:
    """An actor that holds the model; each call transcribes the recordings of one shard and writes it."""

    def __init__(self, load, threads: int, output: str, options: dict):
        torch.set_num_threads(threads)
        self.model, self.output, self.options = load(), output, options

    def __call__(self, batch: dict) -> dict:
        counts = [self._shard(name, json.loads(items)) for name, items in zip(batch["shard"], batch["items"])]
        return {key: [count[key] for count in counts] for key in counts[0]}

    def _shard(self, name: str, items: list[dict]) -> dict:
        path = f"{self.output}/{name}"
        files, target = fsspec.core.url_to_fs(path)
        if files.exists(target):  # written by a worker that was killed before it could say so
            rows = read_shard(path)
        else:
            results = self.model.transcribe([read_item(item) for item in items], **self.options)
            rows = [
                {
                    "id": item["id"],
                    "text": result["text"],
                    "words": result["words"],
                    "segments": result["segments"],
                    "duration": result["duration"],
                    "truncated": result["truncated"],
                    "error": result.get("error"),
                }
                for item, result in zip(items, results)
            ]
            write_shard(path, rows)
        failed = sum(row["error"] is not None for row in rows)
        return {"files": len(rows), "failed": failed, "seconds": float(sum(row["duration"] for row in rows))}


def read_item(item: dict):
    """A recording as `transcribe` accepts it: a local path as it is, anything else as its bytes."""
    if "table" in item:
        import pyarrow.parquet

        with fsspec.open(item["table"], "rb") as file:
            table, row = pyarrow.parquet.ParquetFile(file), item["row"]
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if row < size:
                    return table.read_row_group(group, ["audio"]).column("audio")[row].as_py()
                row -= size
    if "://" not in item["audio"]:
        return item["audio"]
    try:
        with fsspec.open(item["audio"], "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        return Unreadable(f"{item['audio']}: {error}")


class Unreadable:
    """Stands for a recording that could not be fetched; reading it raises the reason."""

    def __init__(self, reason: str):
        self.reason = reason

    def get_all_samples(self):
        raise OSError(self.reason)


def run(
    load,
    sources: list[str],
    output: str,
    suffix: str = "jsonl",
    files_per_shard: int = 32,
    workers: int | None = None,
    threads: int = 2,
    address: str | None = None,
    **options,
) -> dict:
    """
    Transcribe all recordings of `sources` that `output` has no result for yet.

    Every `files_per_shard` recordings are one shard, written by one call of one worker and named after its recordings: an
    interrupted shard is transcribed again as a whole, a finished one never.

    Args:
        load: makes the model, on the worker.
        sources (`list[str]`): see `find_items`.
        output (`str`): folder, or a URL that fsspec knows.
        suffix (`"jsonl"` or `"parquet"`)
        workers (`int`, *optional*): by default as many as the cores allow, or one for each GPU.
        threads (`int`): cores of each worker.
        address (`str`, *optional*): of a Ray cluster, whose nodes have this package, the model and the files; by default Ray
            is started here.
        **options: for `transcribe`.

    Returns:
        counts of this run: "files", "failed", "seconds" of audio, "skipped" (finished before) and "wall" seconds.

    Raises:
        ImportError: without Ray. ValueError: see `find_items`.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"`voxlm batch` needs Ray: pip install 'voxlm-hf[scale]' ({error})") from None
    items = find_items(sources)
    output = output.rstrip("/") if "://" in output else str(Path(output).absolute())
    groups = pending_groups(items, output, max(1, files_per_shard))
    pending = sum(map(len, groups))
    totals = {"files": 0, "failed": 0, "seconds": 0.0, "skipped": len(items) - pending, "wall": 0.0}
    if not pending:
        return totals
    started = time.perf_counter()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, logging_level="error", log_to_driver=False, ignore_reinit_error=True)
    try:
        dataset = worker_dataset(groups, suffix, workers, threads, (load, output, options))
        with tqdm(total=len(items), initial=totals["skipped"], unit="file", desc="Transcribing") as bar:
            for counts in dataset.iter_rows():
                for key, value in counts.items():
                    totals[key] += value
                bar.update(counts["files"])
                speed = totals["seconds"] / (time.perf_counter() - started)
                bar.set_postfix_str(f"{speed:.1f} times real time, {totals['failed']} failed")
    finally:
        ray.shutdown()
    totals["wall"] = time.perf_counter() - started
    return totals


def pending_groups(items: list[dict], output: str, size: int) -> list[list[dict]]:
    """The items in groups of at most `size`, one for each shard, without those that `output` has a result for."""
    files, folder = fsspec.core.url_to_fs(output)
    files.makedirs(folder, exist_ok=True)
    done = {row["id"] for shard in shards(output) for row in read_shard(shard, ["id"])}
    # Grouped before finished items are left out: should a worker of a killed run still write its shard, it writes the very
    # shard that this run writes.
    groups = [items[first : first + size] for first in range(0, len(items), size)]
    groups = [[item for item in group if item["id"] not in done] for group in groups]
    return [group for group in groups if group]


def worker_dataset(groups: list[list[dict]], suffix: str, workers: int | None, threads: int, setup: tuple):
    """A lazy Ray dataset of the counts of each group, computed by [`Worker`] actors; `setup` is (load, output, options)."""
    import ray

    load, output, options = setup
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.print_on_execution_start = False, False
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    threads = min(threads, cores)
    workers = min(workers or gpus or max(1, cores // threads), len(groups))
    shard_items = [{"shard": shard_name(group, suffix), "items": json.dumps(group)} for group in groups]
    return ray.data.from_items(shard_items, override_num_blocks=len(groups)).map_batches(
        Worker,
        fn_constructor_args=(load, threads, output, options),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=min(threads, cores // workers) or 1,
        num_gpus=1 if gpus else 0,
    )
