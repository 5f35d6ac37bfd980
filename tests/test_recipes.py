"""What a user sees of a recipe, of data or of an installation that is no good: one line that says what and where."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from tests import tiny
from voxlm_training import train
from voxlm_training.data import SpeechDataset, read_rows
from voxlm_training.evaluate import main as evaluate


def words(*times):
    return [{"word": "fox", "start": start, "end": end} for start, end in times]


NAN, INFINITE = float("nan"), float("inf")
BAD_ROWS = {
    "not UTF-8": b'{"audio": "good.wav", "text": "caf\xe9"}',
    "not JSON": b'{"audio": "good.wav", "text": "fox"',
    "no 'text'": {"audio": "good.wav"},
    "no 'audio'": ["good.wav", "fox"],
    "the text is int": {"text": 5},
    "the text is list": {"text": ["fox"]},
    "a surrogate": b'{"audio": "good.wav", "text": "fox \\ud800"}',
    "the audio is int": {"audio": 7},
    "the audio is list": {"audio": ["good.wav"]},
    "no such audio file": {"audio": "missing.wav"},
    "no such audio file ": {"audio": "missing.wav", "duration": 1.0},
    "no such audio file  ": {"audio": "folder"},
    "no such audio file   ": {"audio": "fifo"},
    "no such audio file    ": {"audio": "nul\0.wav"},
    "unreadable audio": {"audio": "text.wav"},
    "unreadable audio ": {"audio": "empty.wav"},
    "between 0.1 and 30.0 s": {"audio": "no-samples.wav"},
    "a duration of '1'": {"duration": "1"},
    "a duration of nan": {"duration": NAN},
    "a duration of -1": {"duration": -1},
    "a duration of True": {"duration": True},
    "'words' is str": {"words": "fox"},
    "no word with its times": {"words": ["fox"]},
    "no word with its times ": {"words": [{"start": 0, "end": 1}]},
    "from nan to 0.2 s": {"words": words((NAN, 0.2))},
    "from 0.1 to inf s": {"words": words((0.1, INFINITE))},
    "from -0.5 to 0.2 s": {"words": words((-0.5, 0.2))},
    "from 0.3 to 0.2 s": {"words": words((0.3, 0.2))},
    "from '0' to '1' s": {"words": words(("0", "1"))},
    "from None to None s": {"words": [{"word": "fox"}]},
    "'word_anchors' has a word from nan": {"word_anchors": words((NAN, 1.0))},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings, and things that are none."""
    folder = tmp_path_factory.mktemp("rows")
    soundfile.write(folder / "good.wav", tiny.noise(1.0), tiny.RATE)
    soundfile.write(folder / "no-samples.wav", np.zeros(0), tiny.RATE)
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan, np.float32), tiny.RATE, subtype="FLOAT")
    (folder / "text.wav").write_text("no audio")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_left_out_with_its_file_and_line(folder, reason):
    row = BAD_ROWS[reason]
    if isinstance(row, dict):
        row = {"audio": "good.wav", "text": "fox", **row} if not reason.startswith("no '") else row
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    good = json.dumps({"audio": "good.wav", "text": "fox", "speaker": ["odd"]}).encode()
    (folder / "manifest.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, line, good]))
    rows, report = read_rows([{"manifest": folder / "manifest.jsonl", "exclude_speakers": ["1"]}])
    assert len(rows) == 2 and report.kept == 2 and sum(report.left_out.values()) == 1
    assert f"{folder}/manifest.jsonl:2" in str(report) and reason.strip() in str(report)


@pytest.mark.parametrize("kind", ["folder", "librispeech"])
def test_a_transcript_that_is_not_utf8_is_named(folder, tmp_path, kind):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.flac", tiny.noise(1.0), tiny.RATE)
    if kind == "folder":
        (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
        (tmp_path / "b.txt").write_text("fox")
        place = tmp_path / "a.txt"
    else:
        (tmp_path / "x.trans.txt").write_bytes(b"a CAF\xe9\nb FOX\n")
        place = f"{tmp_path}/x.trans.txt:1"
    rows, report = read_rows([{kind: tmp_path}], "lower")
    assert [row.text for row in rows] == ["fox"] and str(place) in str(report)


def test_what_turns_out_to_be_unreadable_in_training_is_skipped_with_a_line(folder, capsys):
    lines = [{"audio": name, "text": name, "duration": 0.5} for name in ("nan.wav", "text.wav", "good.wav")]
    (folder / "late.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, _ = read_rows([{"manifest": folder / "late.jsonl"}])
    dataset = SpeechDataset(rows, tiny.model().processor)
    assert [dataset[number]["text"] for number in range(3)] == ["good.wav"] * 3
    shown = capsys.readouterr().err
    assert f"skipped {folder}/late.jsonl:1: The audio is empty" in shown
    with pytest.raises(ValueError, match="None of the 2 recordings"):
        SpeechDataset(rows[:2], dataset.processor)[0]


def recipe(folder) -> dict:
    stage = {"kind": "transcription", "parts": ["lora"], "seconds_per_batch": 2, "max_steps": 1}
    (folder / "one.jsonl").write_text(json.dumps({"audio": "good.wav", "text": "fox"}))
    data = {"normaliser": "lower", "train": [{"manifest": str(folder / "one.jsonl")}]}
    return {"model": str(folder / "model"), "output": str(folder / "out"), "data": data, "stages": [stage]}


BAD_RECIPES = {
    "stages.0.max_stepss=3": "stages.0 has no option 'max_stepss'; did you mean 'max_steps'?",
    "stages.0.kind=transcribe": "stages.0: unknown kind of stage 'transcribe'",
    "stages.0.learning_rate=fast": "stages.0.learning_rate must be a number, got 'fast'",
    "stages.0.seconds_per_batch=null": "stages.0.seconds_per_batch must be a number, got None",
    "stages.0.parts=lora": "stages.0.parts: unknown parts 'lora'",
    "stages.0.parts=[lora, head]": "stages.0.parts: unknown parts",
    "stages.0.parts=[]": "stages.0.parts: unknown parts []",
    "stages.0={kind: alignment}": "stages.0: a stage of kind alignment needs `parts`",
    "stages.0={kind: alignment, parts: [alignment], seconds_per_batch: 2, head: x}": "stages.0.head: unknown alignment head 'x'; "
    "known are spelling, frames",
    "stages.0.head=spelling": "stages.0 has no option 'head'",
    "stages.0={kind: calibration, max_steps: 3}": "stages.0 has no option 'max_steps'",
    "stages.0={kind: calibration, recordings: 0}": "stages.0.recordings must be above 0, got 0",
    "stages.0={kind: reader, recordings: 3}": "stages.0: a stage of kind reader needs `base`",
    "stages.0={kind: warm_start, merge: 3}": "stages.0 has no option 'merge'; did you mean 'merges'?",
    "stages.0=transcription": "not a valid recipe",
    "data.cach=x": "data has no option 'cach'; did you mean 'cache'?",
    "data.normaliser=upper": "Unknown normaliser 'upper'; known are none, lower",
    "data.train=[]": "data.train must be a list of sources, got []",
    "data.train=x": "data.train must be a list of sources, got 'x'",
    "data.train.0={manifst: x}": "data.train.0: A data source needs exactly one of",
    "data.train.0.manifest=nowhere.jsonl": "data.train.0.manifest: there is no nowhere.jsonl",
    "data.train.0={folder: nowhere}": "data.train.0.folder: there is no nowhere",
    "data.train.0={silence: 3, coun: 1}": "data.train.0: A source of kind silence has no option 'coun'",
    "data.train.0.every=0": "`every` of the source",
    "data.dev=[{manifest: nowhere}]": "data.dev.0.manifest: there is no nowhere",
    "model=/nowhere/model": "model: /nowhere/model cannot be loaded",
    "model={audio: a, txt: b}": "model has no option 'txt'; did you mean 'text'?",
    "model={audio: -1, text: x}": "model.audio must be text, got -1",
    "model=5": "model must be text, got 5",
    "data.train=true": "data.train must be a list of sources, got True",
    "data.dev=false": "data.dev must be a list of sources, got False",
    "data.normaliser=[]": "data.normaliser must be text, got []",
    "data.max_s=''": "data.max_s must be a number, got ''",
    "data.max_s=.nan": "data.max_s must be a finite number, got nan",
    "data.copies=1.5": "data.copies must be a whole number, got 1.5",
    "data.augment='5'": "data.augment must be true or false, got '5'",
    "data.cache=5": "data.cache must be text, got 5",
    "stages.0.kind={}": "stages.0: unknown kind of stage {}",
    "stages.0.parts=[[]]": "stages.0.parts: unknown parts [[]]",
    "stages.0={kind: reader, base: -1}": "stages.0.base must be text, got -1",
    "stages.0={kind: reader, base: x, recordings: 0}": "stages.0.recordings must be above 0, got 0",
    "stages.0={kind: warm_start, noise: .inf}": "stages.0.noise must be a finite number, got inf",
    "stages.0.learning_rate=.inf": "stages.0.learning_rate must be a finite number, got inf",
    "stages.0.learning_rate=-1": "stages.0.learning_rate must be at least 0, got -1",
    "stages.0.max_steps=.nan": "stages.0.max_steps must be a finite number, got nan",
    "stages.0.max_steps=true": "stages.0.max_steps must be a number, got True",
    "stages.0.warmup_steps=.inf": "stages.0.warmup_steps must be a finite number, got inf",
    "stages.0.seconds_per_batch=-1": "stages.0.seconds_per_batch must be above 0, got -1",
    "stages.0.save_steps=-1": "stages.0.save_steps must be above 0, got -1",
    "stages.0.save_total_limit=0": "stages.0.save_total_limit must be above 0, got 0",
    "stages.0.bf16='5'": "stages.0.bf16 must be true or false, got '5'",
    "stages.0.report_to=x": "stages.0.report_to: x is not supported",
    "stages.0.report_to=[5]": "stages.0.report_to must be a name or a list of names, got [5]",
    "modle=x": "Unknown keys in the recipe: modle",
    "seed": "form key.subkey=value",
}


@pytest.mark.parametrize("override", BAD_RECIPES)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(folder, override, capsys, monkeypatch):
    if not (folder / "model").exists():
        toy = tiny.model(lora_config={"r": 2})
        toy.save_pretrained(folder / "model")
        toy.processor.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    monkeypatch.setattr(sys, "argv", ["voxlm-train", str(folder / "recipe.yaml"), override])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main()
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("voxlm-train")]
    assert ended.value.code == 2 and len(shown) == 1 and BAD_RECIPES[override] in shown[0], shown
    assert not (folder / "out").exists()


@pytest.mark.parametrize("content", [None, b"model: [", b"- a\n- b", b"5", b"", b"model: caf\xe9", b"\0"])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, content, capsys, monkeypatch):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["voxlm-train", str(path)])
    with pytest.raises(SystemExit) as ended:
        train.main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and str(path) in lines[0]


def test_a_stage_that_cannot_begin_is_one_line(folder, capsys, monkeypatch):
    contents = recipe(folder)
    toy = tiny.model(lora_config={"r": 2})
    toy.save_pretrained(folder / "model")
    toy.processor.save_pretrained(folder / "model")
    for stage, message in (
        ({"kind": "reader", "base": "/nowhere"}, "stage 1, reader: "),
        ({"kind": "warm_start", "report_to": []}, "stage 1, warm_start: The warm start trains the frame gate"),
        ({"kind": "transcription", "parts": ["alignment"], "seconds_per_batch": 1}, "no recording has word times"),
    ):
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**contents, "stages": [stage]}))
        monkeypatch.setattr(sys, "argv", ["voxlm-train", str(folder / "recipe.yaml")])
        with pytest.raises(SystemExit) as ended:
            train.main()
        shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("voxlm-train")]
        assert ended.value.code == 2 and len(shown) == 1 and message in shown[0]


def test_a_full_disk_is_one_line(folder, capsys, monkeypatch):
    def full(recipe):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/log.json")

    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    monkeypatch.setattr(sys, "argv", ["voxlm-train", str(folder / "recipe.yaml")])
    monkeypatch.setattr(train, "run", full)
    with pytest.raises(SystemExit) as ended:
        train.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert ended.value.code == 2 and "somewhere/log.json could not be written" in line and "resumes" in line


def test_the_evaluation_names_what_is_not_there(tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.jsonl").write_text("{")
    for manifest in ("nowhere.jsonl", "bad.jsonl"):
        arguments = ["--model", "nowhere", "--manifest", str(tmp_path / manifest), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["voxlm-eval", *arguments])
        with pytest.raises(SystemExit) as ended:
            evaluate()
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and manifest in line


@pytest.mark.parametrize("program, package", [("train", "omegaconf"), ("train", "tensorboard"), ("evaluate", "jiwer")])
def test_a_missing_extra_is_one_line(program, package):
    code = f"import sys; sys.modules[{package!r}] = None; from voxlm_training.commands import {program}; {program}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and package in done.stderr and len(done.stderr.splitlines()) == 1
    assert 'pip install "voxlm-hf[train]"' in done.stderr


def test_a_recipe_in_a_pipe_is_refused_and_not_waited_for(folder):
    with pytest.raises(ValueError, match="no regular file"):
        train.read_recipe(folder / "fifo", [])
