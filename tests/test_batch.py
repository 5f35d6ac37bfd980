"""`voxlm batch`: sources, shards, and runs that are interrupted."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import ray
import ray.data
import soundfile
import torch

from tests import HANGS_AFTER_S, tiny
from voxlm_hf.app import batch
from voxlm_hf.app.cli import main
from voxlm_hf.audio_voxlm import is_batch
from voxlm_hf.transcription_voxlm import VoxLMTranscription


class Counting:
    """Stands for a model: writes the name of each file, notes it, and dies as often as the folder says."""

    def __init__(self, folder: str, deaths: int, seconds: float = 0.0):
        self.folder, self.deaths, self.seconds = Path(folder), deaths, seconds

    def transcribe(self, audio, **options):
        died = len(list(self.folder.glob("died-*")))
        if died < self.deaths:
            (self.folder / f"died-{died}").touch()
            os._exit(9)
        time.sleep(self.seconds)
        return [
            VoxLMTranscription(
                text=Path(item).stem, words=[], duration=1.0, truncated=False, word_scores=[], segments=[], error=None
            )
            for item in audio
        ]


def names(folder: Path, count: int) -> list[str]:
    """Manifest of that many files, which need not exist for `Counting`."""
    rows = [{"id": f"clip {number}", "audio": f"{number}.wav"} for number in range(count)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["id"] for row in rows]


def results(folder: Path) -> list[dict]:
    return [row for shard in batch.shards(str(folder)) for row in batch.read_shard(shard)]


def test_sources(tmp_path):
    for name in ("b.wav", "a.flac", "deep/c.wav", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [Path(item["audio"]).name for item in batch.find_items([str(tmp_path)])]
    assert found == ["a.flac", "b.wav", "c.wav"]
    assert len(batch.find_items([f"{tmp_path}/*.wav", f"{tmp_path}/a.flac"])) == 2
    assert batch.find_items([f"file://{tmp_path}/*.wav"])[0]["audio"].startswith("file://")
    manifest = tmp_path / "list.jsonl"
    manifest.write_text(
        '{"audio": "b.wav"}\n\n{"audio": "/elsewhere/x.wav", "id": 7}\n{"audio": "s3://bucket/y.flac"}\n'
    )
    items = batch.find_items([str(manifest)])
    assert [item["audio"] for item in items] == [f"{tmp_path}/b.wav", "/elsewhere/x.wav", "s3://bucket/y.flac"]
    assert items[1]["id"] == "7"


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_source_is_not_the_current_folder(source, tmp_path, capsys):
    assert main(["batch", source, "--output", str(tmp_path / "out")]) == 2
    assert "source is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"audio": "a.wav"}\n{"audio": "a.wav"}\n', "occurs twice"),
        ("not json\n", "line 1, is not JSON"),
        ('{"path": "a.wav"}\n', "no path under 'audio'"),
        ("", "no recordings"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        batch.find_items([str(tmp_path / "bad.jsonl")])


def test_audio_inside_parquet_is_read_where_it_lies(tmp_path):
    clips = [{"bytes": bytes([number]) * 4, "path": None} for number in range(5)]
    table = pyarrow.table({"audio": clips, "id": [f"n{number}" for number in range(5)]})
    pyarrow.parquet.write_table(table, tmp_path / "clips.parquet", row_group_size=2)
    items = batch.find_items([str(tmp_path / "clips.parquet")])
    assert [item["id"] for item in items] == ["n0", "n1", "n2", "n3", "n4"]
    read = batch.ItemReader()
    assert [read(items[number])["bytes"][0] for number in (3, 4, 0, 2)] == [3, 4, 0, 2]
    pyarrow.parquet.write_table(pyarrow.table({"audio": ["a.wav"]}), tmp_path / "paths.parquet")
    assert batch.find_items([str(tmp_path / "paths.parquet")]) == [
        {"id": f"{tmp_path}/a.wav", "audio": f"{tmp_path}/a.wav"}
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_shards_hold_what_was_written(tmp_path, suffix):
    row = {
        "id": "ä",
        "text": "wörds",
        "words": [{"word": "wörds", "start": 0.1, "end": 0.5, "confidence": 0.9}],
        "segments": [
            {"start": 0.0, "end": 1.0, "text": "wörds", "mean_logprob": -0.1, "gates": ["loop"], "fallback": 0.2}
        ],
        "duration": 1.0,
        "truncated": False,
        "language": "de",
        "language_probability": 0.9,
        "error": None,
    }
    failed = {**row, "id": "b", "text": "", "words": [], "segments": [], "error": "No such audio file: b"}
    batch.write_shard(f"{tmp_path}/part-1.{suffix}", [row, failed])
    assert results(tmp_path) == [row, failed]
    assert [path.name for path in tmp_path.iterdir()] == [f"part-1.{suffix}"]


def test_a_table_is_read_once_and_a_few_rows_at_a_time(tmp_path, monkeypatch):
    clips = [{"bytes": bytes([number]) * 4, "path": None} for number in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"audio": clips}), tmp_path / "clips.parquet", row_group_size=20)
    read, sizes = batch.ItemReader(), []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(*arguments, **options):
        for rows in real(*arguments, **options):
            sizes.append(len(rows))
            yield rows

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    found = [read(item)["bytes"][0] for item in batch.find_items([str(tmp_path / "clips.parquet")])]
    assert found == list(range(40)) and sum(sizes) == 40 and max(sizes) <= 4


def test_a_table_that_is_gone_fails_for_its_rows_alone(tmp_path):
    missing = batch.ItemReader()({"id": "a", "table": str(tmp_path / "gone.parquet"), "row": 0})
    with pytest.raises(OSError, match="gone.parquet"):
        missing.get("bytes")


def test_recordings_are_fetched_one_at_a_time(tmp_path, monkeypatch):
    """By the model as it needs them, and no table stays open after the next one is."""
    for table in "ab":
        clips = [{"bytes": wav(0.3), "path": None} for _ in range(2)]
        pyarrow.parquet.write_table(pyarrow.table({"audio": clips}), tmp_path / f"{table}.parquet")
    (tmp_path / "c.wav").write_bytes(wav(0.3))
    sources = [f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet", f"file://{tmp_path}/c.wav", f"file://{tmp_path}/d.wav"]
    items, log = batch.find_items(sources[:3]), []
    items.append({"id": "d", "audio": sources[3]})
    real_open, real_row = fsspec.open, batch.ItemReader._row
    files = []

    def note_open(source, *arguments):
        log.append(f"fetch {source[-9:]}")
        return real_open(source, *arguments)

    def note_row(reader, source, number):
        log.append(f"fetch {source[-9:]} {number}")
        value = real_row(reader, source, number)
        files.append(reader.file)
        return value

    monkeypatch.setattr(batch.ItemReader, "_row", note_row)
    monkeypatch.setattr(batch.fsspec, "open", note_open)
    read = batch.ItemReader()
    recordings = [read(item) for item in items]
    assert not log and is_batch(recordings)
    model = tiny.model()
    results = model.transcribe(recordings)
    assert [result.error is None for result in results] == [True] * 5 + [False] and "d.wav" in results[5].error
    assert [line for line in log if line[-1] in "01"] == [
        f"fetch {name}.parquet {row}" for name in "ab" for row in "01"
    ]
    assert len(log) == 4 + 2 + 2 and files[0].closed


class Failing:
    """Stands for a model that fails at all recordings that come with one whose name begins with "bad"."""

    def __init__(self, error: Exception):
        self.error = error

    def transcribe(self, audio, **options):
        if any(Path(item).name.startswith("bad") for item in audio):
            raise self.error
        return Counting("", 0).transcribe(audio)


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_recording_at_which_the_model_fails_is_a_row_with_an_error(tmp_path, error):
    worker = batch.Worker(functools.partial(Failing, error), 1, str(tmp_path), {})
    for shard, audio in (("part-1.jsonl", ["x", "bad", "y"]), ("part-2.jsonl", ["z"])):
        work = {"shard": shard, "items": [{"id": name, "audio": name} for name in audio], "retry": False}
        assert worker({"work": [json.dumps(work)]})["stopped"] == [""]
    reason = " ".join(str(error).split()) or "MemoryError"
    found = [(item["id"], item["text"], item["error"]) for item in results(tmp_path)]
    assert found == [("x", "x", None), ("bad", "", reason), ("y", "y", None), ("z", "z", None)]


def test_options_that_no_recording_can_be_transcribed_with_stop_the_run(tmp_path):
    worker = batch.Worker(functools.partial(Failing, ValueError("bad prompt")), 1, str(tmp_path), {})
    work = {"shard": "part-1.jsonl", "items": [{"id": "bad", "audio": "bad"}], "retry": False}
    assert worker({"work": [json.dumps(work)]})["stopped"] == ["ValueError: bad prompt"]
    assert not results(tmp_path)


def test_names_and_lines_that_are_no_text(tmp_path):
    (tmp_path / "list.jsonl").write_bytes(b'\xef\xbb\xbf{"audio": "\xff.wav"}\n{"audio": "\\udcfe.wav", "id": null}\n')
    items = batch.find_items([str(tmp_path / "list.jsonl")])
    assert [Path(item["audio"]).name for item in items] == ["\udcff.wav", "\udcfe.wav"]
    assert [Path(item["id"]).name for item in items] == [r"\udcff.wav", r"\udcfe.wav"]
    for suffix in ("jsonl", "parquet"):
        batch.write_shard(f"{tmp_path}/part-{suffix}.{suffix}", [row(items[0]["id"])])
        assert batch.read_shard(f"{tmp_path}/part-{suffix}.{suffix}")[0]["id"] == items[0]["id"]


def wav(seconds: float) -> bytes:
    """The bytes of a recording."""
    buffer = io.BytesIO()
    soundfile.write(buffer, tiny.noise(seconds), tiny.RATE, format="WAV")
    return buffer.getvalue()


def row(name: str, error: str | None = None) -> dict:
    """A row of a shard."""
    return {
        "id": name,
        "text": "",
        "words": [],
        "segments": [],
        "duration": 1.0,
        "truncated": False,
        "error": error,
    }


@pytest.mark.parametrize("folder", ["out[1]", "out*", "out?", "[ab]{c}"])
def test_a_restart_finds_its_shards_in_a_folder_of_any_name(tmp_path, folder):
    batch.write_shard(f"{tmp_path}/part-1.jsonl", [row("elsewhere")])
    output = str(tmp_path / folder)
    assert batch.finished(output) == {}
    for name in ("part-1.jsonl", "part-2.parquet", "part-2.parquet.damaged", ".part-3.jsonl.7.unfinished", "a.jsonl"):
        batch.write_shard(f"{output}/{name}", [row(name)])
    assert set(batch.finished(output)) == {"part-1.jsonl", "part-2.parquet"}
    assert set(batch.finished(f"file://{output}")) == {"part-1.jsonl", "part-2.parquet"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("size", [0, 1, 100, -1, -5])
def test_a_damaged_shard_is_put_aside_and_made_again(tmp_path, suffix, size, caplog):
    shard = tmp_path / f"part-1.{suffix}"
    batch.write_shard(str(shard), [row("a"), row("b")])
    batch.write_shard(f"{tmp_path}/part-2.{suffix}", [row("c")])
    os.truncate(shard, size if size >= 0 else shard.stat().st_size + size)
    if suffix == "jsonl" and size == -1:  # the line break alone
        assert set(batch.finished(str(tmp_path))) == {"a", "b", "c"}
        return
    errors = batch.finished(str(tmp_path))
    assert set(errors) == {"c"} and not shard.exists() and str(shard) in caplog.text
    assert shard.with_name(shard.name + ".damaged").exists()
    work = batch.pending_work([{"id": name, "audio": name} for name in "abc"], errors, suffix, 8, False)
    assert [[item["id"] for item in unit["items"]] for unit in work] == [["a", "b"]]


def test_what_failed_is_tried_again_when_asked_for(tmp_path):
    batch.write_shard(f"{tmp_path}/part-1.jsonl", [row("a"), row("b", "bad"), row("c", "bad")])
    items = [{"id": name, "audio": f"{name}.wav"} for name in "abc"]
    errors = batch.finished(str(tmp_path))
    assert batch.pending_work(items, errors, "jsonl", 8, False) == []
    (work,) = batch.pending_work(items, errors, "jsonl", 8, True)
    worker = batch.Worker(functools.partial(Counting, str(tmp_path), deaths=0), 1, str(tmp_path), {})
    counts = worker({"work": [json.dumps(work)]})
    assert counts == {"files": [2], "failed": [0], "seconds": [2.0], "stopped": [""]}
    assert [(item["id"], item["text"], item["error"]) for item in results(tmp_path)] == [
        ("a", "", None),
        ("b", "b", None),
        ("c", "c", None),
    ]


def test_a_worker_that_cannot_load_says_why_in_one_line(tmp_path):
    def load():
        raise OSError("no such model")

    work = {"shard": "part-1.jsonl", "items": [{"id": "a", "audio": "a"}], "retry": False}
    counts = batch.Worker(load, 1, str(tmp_path), {})({"work": [json.dumps(work)]})
    totals = {"skipped": 0, "files": 0, "failed": 0, "seconds": 0.0}
    rows = [{key: value[0] for key, value in counts.items()}]
    with pytest.raises(RuntimeError, match="a worker cannot work: OSError: no such model") as raised:
        batch.add_counts(totals, [dict(row) for row in rows], 1)
    assert not isinstance(raised.value, batch.Stopped)
    done = {"files": 1, "failed": 0, "seconds": 1.0, "stopped": ""}
    with pytest.raises(batch.Stopped, match="no such model"):
        batch.add_counts(totals, [done, *rows], 2)


@pytest.mark.parametrize(
    "error, code, begin",
    [
        (batch.Stopped("a worker\ndied"), 1, "stopped: a worker died; run "),
        (RuntimeError("no Ray"), 2, "cannot start: no"),
    ],
)
def test_a_run_that_stops_is_not_one_that_cannot_start(tmp_path, monkeypatch, capsys, error, code, begin):
    def run(*arguments, **options):
        raise error

    monkeypatch.setattr(batch, "run", run)
    tiny.model().save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["batch", "a.wav", "--output", "out", "--model", str(tmp_path)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"voxlm: {begin}")
    assert code == 2 or line.endswith("run the same command again to resume; finished files in out are skipped")


def test_files_are_transcribed_once(tmp_path, capsys):
    """The whole way: a model, real files, one of them broken, and a second run with one more file."""
    model = tiny.model(llm="qwen3")
    model.save_pretrained(tmp_path / "model")
    model.processor.save_pretrained(tmp_path / "model")
    (tmp_path / "audio").mkdir()
    for number in range(4):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", tiny.noise(0.6, number), tiny.RATE)
    (tmp_path / "audio" / "broken.wav").write_bytes(b"RIFF")
    command = ["batch", f"{tmp_path}/audio", "--output", f"{tmp_path}/out", "--model", f"{tmp_path}/model"]
    command += ["--files-per-shard", "2", "--format", "parquet"]
    assert main(command) == 1
    rows = {Path(row["id"]).name: row for row in results(tmp_path / "out")}
    assert sorted(rows) == ["0.wav", "1.wav", "2.wav", "3.wav", "broken.wav"]
    assert "Cannot read" in rows["broken.wav"]["error"] and rows["broken.wav"]["text"] == ""
    assert rows["0.wav"]["text"] == model.transcribe(tmp_path / "audio" / "0.wav").text
    assert rows["0.wav"]["words"] and rows["0.wav"]["segments"][0]["gates"] == []
    capsys.readouterr()
    assert main(command) == 1  # nothing to do, but one of the results is an error still
    assert "5 finished before" in (said := capsys.readouterr().err) and "1 files failed in an earlier run" in said
    for name in ("late", "broken"):
        soundfile.write(tmp_path / "audio" / f"{name}.wav", tiny.noise(0.6), tiny.RATE)
    assert main([*command, "--retry-failed"]) == 0
    assert "2 files (0 failed, 4 finished before)" in capsys.readouterr().err
    rows = results(tmp_path / "out")
    assert len(rows) == 6 and all(row["error"] is None and row["text"] for row in rows)


def test_a_worker_that_is_killed_loses_nothing(tmp_path):
    """In a session of Ray that is the caller's, and stays it."""
    ids = names(tmp_path, 40)
    ray.init(logging_level="error", log_to_driver=False)
    totals = batch.run(
        functools.partial(Counting, str(tmp_path), deaths=2),
        [str(tmp_path / "manifest.jsonl")],
        str(tmp_path / "out"),
        files_per_shard=4,
    )
    assert ray.is_initialized() and ray.data.DataContext.get_current().enable_progress_bars
    ray.shutdown()
    assert totals["files"] == 40 and len(list(tmp_path.glob("died-*"))) == 2
    assert sorted(row["id"] for row in results(tmp_path / "out")) == sorted(ids)


def test_a_run_that_is_killed_goes_on_where_it_stopped(tmp_path):
    ids = names(tmp_path, 24)
    code = (
        "import functools; from tests.test_batch import Counting, batch; "
        f"batch.run(functools.partial(Counting, {str(tmp_path)!r}, 0, 0.3), [{str(tmp_path / 'manifest.jsonl')!r}], "
        f"{str(tmp_path / 'out')!r}, files_per_shard=2, workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + HANGS_AFTER_S
    while len(batch.shards(str(tmp_path / "out"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(results(tmp_path / "out"))
    assert 6 <= before < 24
    totals = batch.run(
        functools.partial(Counting, str(tmp_path), deaths=0),
        [str(tmp_path / "manifest.jsonl")],
        str(tmp_path / "out"),
        files_per_shard=2,
    )
    assert sorted(row["id"] for row in results(tmp_path / "out")) == sorted(ids)
    assert totals["files"] + totals["skipped"] == 24 and totals["skipped"] >= before
