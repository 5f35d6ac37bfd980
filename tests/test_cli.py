"""`voxlm transcribe`: outputs, exit codes, one line per bad file."""

import json

import pytest
import soundfile

from hub_export.export import export
from tests import tiny
from voxlm_hf.app.cli import main, output_paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export(tiny.model(), folder)
    return str(folder)


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "one.wav"
    soundfile.write(path, tiny.noise(0.8), 16000)
    return path


def test_one_file_goes_to_stdout(folder, recording, capsys):
    assert main(["transcribe", str(recording), "--model", folder, "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"text", "words", "duration", "truncated", "word_scores", "segments"}
    assert result["duration"] == 0.8


def test_align(folder, recording, tmp_path, capsys):
    command = ["align", str(recording), "--model", folder, "--format", "json"]
    assert main([*command, "The fox!"]) == 0
    direct = capsys.readouterr()
    result = json.loads(direct.out)
    assert [word["word"] for word in result["words"]] == ["The", "fox!"]
    assert all(repr(word["word"]) in direct.err for word in result["words"] if not word["spoken"])
    (tmp_path / "text.txt").write_text("The fox!")
    assert main([*command, f"@{tmp_path / 'text.txt'}"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    for wrong in ("", "@/no/such/file"):
        assert main([*command, wrong]) == 1
        assert f"voxlm: {recording}: " in capsys.readouterr().err


def test_plot(folder, recording, tmp_path, capsys):
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps({"words": [{"word": "$fox", "start": 0.1, "end": 0.3}]}))
    command = ["plot", str(recording), "--model", folder]
    for name, options in (("a.png", []), ("b.svg", ["--text", "the fox", "--reference", str(reference)])):
        picture = tmp_path / name
        assert main([*command[:2], str(picture), *command[2:], *options]) == 0
        assert picture.stat().st_size > 5000
    assert "the" in (tmp_path / "b.svg").read_text()
    for content in ("{", "[]", '[{"word": "a"}]', '{"text": "a"}', '["a"]'):
        reference.write_text(content)
        assert main([*command[:2], str(tmp_path / "c.png"), *command[2:], "--reference", str(reference)]) == 1
        assert f"voxlm: {recording}: {reference}" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "c.txt"), *command[2:]]) == 1 and not (tmp_path / "c.txt").exists()


def test_bad_files_do_not_stop_the_others(folder, recording, tmp_path, capsys):
    bad = tmp_path / "bad.wav"
    bad.write_text("text")
    files = [str(bad), str(recording), str(tmp_path / "missing.wav")]
    output = tmp_path / "out" / "deep"
    assert main(["transcribe", *files, "--model", folder, "--output-dir", str(output), "--format", "srt"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("voxlm:")]
    assert len(lines) == 3 and "bad.wav" in lines[0] and "missing.wav" in lines[1]
    assert "1 of 3 files, 1 s of audio" in lines[2]
    assert [path.name for path in output.iterdir()] == ["one.srt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["transcribe"],
        ["transcribe", "a.wav", "--format", "doc"],
        ["transcribe", "a.wav", "--model", "/no/such/model"],
        ["sing"],
    ],
)
def test_what_cannot_start_is_2(arguments, capsys):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_is_0(capsys):
    assert main(["transcribe", "--help"]) == 0
    assert "--output-dir" in capsys.readouterr().out


def test_files_of_one_name_do_not_overwrite_each_other(tmp_path):
    paths = output_paths(["a/x.wav", "b/x.mp3", "c/y.wav"], tmp_path, "txt")
    assert [path.name for path in paths] == ["x.txt", "x-2.txt", "y.txt"]
