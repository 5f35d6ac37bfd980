"""`voxlm transcribe`: outputs, exit codes, one line per bad file, interrupts."""

import io
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from tests import HANGS_AFTER_S, tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.app import output
from voxlm_hf.app.cli import main, short_first
from voxlm_hf.app.files import output_paths, write_atomically


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny.model()
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "one.wav"
    soundfile.write(path, tiny.noise(0.8), 16000)
    return path


def test_one_file_goes_to_stdout(folder, recording, capsys):
    assert main(["transcribe", str(recording), "--model", folder, "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    spoken = {"language", "language_probability"}
    own = {"source", "text", "words", "duration", "truncated", "word_scores", "segments", "error"}
    assert set(result) == own | spoken
    assert result["source"] == str(recording) and result["error"] is None
    assert result["duration"] == 0.8


@pytest.fixture(scope="module")
def with_reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    model = tiny.with_reader(previous_id=0, languages={"en": 1, "de": 45})
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return str(folder)


def test_language_context_and_hotwords_reach_the_model(with_reader, recording, tmp_path, capsys, monkeypatch):
    words, asked = tmp_path / "words.txt", {}
    words.write_text("stew\n\n turnips, carrots \n")
    transcribe = VoxLMForSpeechSeq2Seq.transcribe
    monkeypatch.setattr(
        VoxLMForSpeechSeq2Seq, "transcribe", lambda *args, **given: asked.update(given) or transcribe(*args, **given)
    )
    options = ["--language", "German", "--context", "about dinner", "--hotwords", f"@{words}"]
    assert main(["transcribe", str(recording), "--model", with_reader, "--format", "json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["language"] == "de"
    assert asked["hotwords"] == ["stew", "turnips, carrots"] and asked["context"] == "about dinner"
    assert (
        main(["transcribe", str(recording), "--model", with_reader, "--language", "auto", "--hotwords", "a,, b"]) == 0
    )
    assert asked["hotwords"] == ["a", "b"] and asked["language"] is None


@pytest.mark.parametrize("option", [["--language", "xx"], ["--hotwords", "@/no/such/file"], ["--context", "</s>"]])
def test_options_that_cannot_be_used_are_2_and_one_line(with_reader, recording, option, capsys):
    assert main(["transcribe", str(recording), "--model", with_reader, *option]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("voxlm: cannot start") and not said.out


@pytest.fixture
def align(folder, recording, capsys):
    """Run `voxlm align` with a text; its exit code and what it prints on stdout and stderr."""

    def run(text):
        code = main(["align", str(recording), "--model", folder, "--format", "json", text])
        return code, *capsys.readouterr()

    return run


def test_align_prints_the_words_as_given(align):
    code, out, err = align("The fox!")
    words = json.loads(out)["words"]
    assert code == 0 and [word["word"] for word in words] == ["The", "fox!"]
    assert all(repr(word["word"]) in err for word in words if not word["spoken"])


def test_the_text_to_align_may_be_in_a_file(align, tmp_path):
    (tmp_path / "text.txt").write_text("The fox!")
    assert align(f"@{tmp_path / 'text.txt'}")[:2] == align("The fox!")[:2]


@pytest.mark.parametrize("text", ["", "@/no/such/file"])
def test_a_text_that_cannot_be_aligned_is_one_line(align, recording, text):
    code, _, err = align(text)
    assert code == 1 and f"voxlm: {recording}: " in err and "Traceback" not in err


@pytest.fixture
def plot(folder, recording, tmp_path, capsys):
    """Run `voxlm plot`; its exit code, the picture and what it prints on stderr."""

    def run(name, *options):
        code = main(["plot", str(recording), str(tmp_path / name), "--model", folder, *options])
        return code, tmp_path / name, capsys.readouterr().err

    return run


def test_plot_draws_a_picture(plot):
    code, picture, _ = plot("a.png")
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")


def test_plot_draws_a_given_text_beside_a_reference(plot, tmp_path):
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps({"words": [{"word": "$fox", "start": 0.1, "end": 0.3}]}))
    code, picture, _ = plot("b.svg", "--text", "the fox", "--reference", str(reference))
    assert code == 0 and "the" in picture.read_text()


@pytest.mark.parametrize("content", ["{", "[]", '[{"word": "a"}]', '{"text": "a"}', '["a"]'])
def test_a_reference_that_cannot_be_read_is_named(plot, recording, tmp_path, content):
    reference = tmp_path / "reference.json"
    reference.write_text(content)
    code, _, err = plot("c.png", "--reference", str(reference))
    assert code == 1 and f"voxlm: {recording}: {reference}" in err


def test_a_picture_of_no_known_kind_is_not_drawn(plot):
    code, picture, err = plot("c.txt")
    assert code == 2 and not picture.exists() and "must end with one of" in err


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
        ["transcribe", "a.wav", "--device", "cuda:99"],
        ["transcribe", "a.wav", "--device", "meta"],
        ["transcribe", "a.wav", "--device", "nonsense"],
        ["transcribe", "a.wav", "--batch-size", "0"],
        ["transcribe", "a.wav", "--chunk-length", "nan"],
        ["transcribe", "a.wav", "--chunk-length", "-5"],
        ["transcribe", "a.wav", "--prompt", "\udcff"],
        ["transcribe", "a.wav", "b.wav", "--format", "srt"],
        ["transcribe", "a.wav", "b.wav", "--format", "vtt"],
        ["transcribe", "a.wav", "b.wav", "--format", "tsv"],
        ["transcribe", "-", "-"],
        ["transcribe", "a.wav", "--output-dir", __file__],
        ["transcribe", __file__, "--format", "py", "--output-dir", str(Path(__file__).parent)],
        ["align", "a.wav", "\udcff"],
        ["batch", "-", "--output", "x"],
        ["batch", "a.wav", "--output", "x", "--workers", "0"],
        ["sing"],
    ],
)
def test_what_cannot_start_is_2(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.err.strip() and not said.out


def test_help_is_0(capsys):
    assert main(["transcribe", "--help"]) == 0
    assert "--output-dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    "files, expected",
    [
        (["a/x.wav", "b/y.mp3"], ["x.txt", "y.txt"]),
        (["a/x.wav", "b/x.mp3", "c/y.wav"], ["a/x.txt", "b/x.txt", "y.txt"]),
        (["a/x.wav", "a/x.flac"], ["x.wav.txt", "x.flac.txt"]),
        (["a/x.wav", "a/x.flac", "a/x.wav.mp3"], ["x.wav.txt", "x.flac.txt", "x.wav.mp3.txt"]),
        (["a/x.wav", "a/b/x.wav", "c/x.wav"], ["a/x.txt", "a/b/x.txt", "c/x.txt"]),
        (["a/x.wav", "a/../a/x.wav"], ["x.txt", "x.txt"]),
        (["a/x.wav", "link/x.wav"], ["x.txt", "x.txt"]),
        (["-", "a/stdin.wav", "stdin"], ["-/stdin.txt", "a/stdin.txt", "stdin.txt"]),
        (["x\udcff.wav"], ["x\udcff.txt"]),
    ],
)
def test_outputs_are_kept_apart_whatever_the_order(tmp_path, monkeypatch, files, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    for order in itertools.islice(itertools.permutations(range(len(files))), 6):
        paths = output_paths([files[number] for number in order], Path("out"), "txt")
        assert [path.as_posix() for path in paths] == [f"out/{expected[number]}" for number in order]


def test_short_files_come_first_within_a_window(tmp_path):
    for seconds in (3, 1, 2):
        soundfile.write(tmp_path / f"{seconds}.wav", tiny.noise(seconds), 16000)
    files = [str(tmp_path / f"{seconds}.wav") for seconds in (3, 1, 2, 1)] + ["-", "/no/such/file"]
    assert short_first(files, 3) == [1, 2, 0, 4, 5, 3]


@pytest.fixture
def two_names(tmp_path):
    """Two recordings called x, one of them in a folder whose name is no text."""
    paths = []
    for folder in (b"a", b"\xff"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), folder, b"x.wav")))
        path.parent.mkdir()
        soundfile.write(os.fsencode(path), tiny.noise(0.6), 16000, format="WAV")
        paths.append(str(path))
    return paths


def test_several_files_are_one_json_list_that_names_them(folder, two_names, capsys):
    files = [two_names[0], "/no/such/file", two_names[1]]
    assert main(["transcribe", *files, "--model", folder, "--format", "json"]) == 1
    assert [item["source"] for item in json.loads(capsys.readouterr().out)] == two_names
    assert main(["transcribe", files[1], files[1], "--model", folder, "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_several_texts_are_under_the_names_of_their_files(folder, two_names, capsys):
    assert main(["transcribe", *two_names, "--model", folder]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert heads == ["# " + name.replace("\udcff", r"\udcff") for name in two_names]


def test_names_that_are_no_text_in_a_folder_of_outputs(folder, two_names, tmp_path):
    out = tmp_path / "out\udcfe"
    assert main(["transcribe", *two_names, "--model", folder, "--format", "json", "--output-dir", str(out)]) == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.json")) == ["a/x.json", "\udcff/x.json"]
    assert json.loads((out / "\udcff" / "x.json").read_bytes())["source"] == two_names[1]


def test_waiting_results_are_printed_in_order_and_in_the_end(capsys):
    with pytest.raises(KeyboardInterrupt), output.StandardOutput(["a", "b", "c", "d"], "json") as printer:
        assert printer.add(2, {"text": "two"}) is None and not capsys.readouterr().out
        assert printer.add(0, {"text": "", "error": "bad"}) == "bad"
        printer.add(1, {"text": "one"})
        raise KeyboardInterrupt
    assert [item["source"] for item in json.loads(capsys.readouterr().out)] == ["b", "c"]


@pytest.fixture
def no_space(monkeypatch):
    """A disk with room for three bytes."""
    real_open = open

    class Full(io.FileIO):
        def write(self, content):
            super().write(content[:3])
            raise OSError(28, "No space left on device")

    def open_full(path, mode="r", *arguments, **options):
        return Full(path, mode) if "x" in mode or "w" in mode else real_open(path, mode, *arguments, **options)

    monkeypatch.setattr("builtins.open", open_full)


def test_a_full_disk_leaves_the_older_result(folder, recording, tmp_path, no_space, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "one.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").touch()
    os.truncate(tmp_path / "elsewhere.json", 5)
    assert main(["transcribe", str(recording), "--model", folder, "--format", "json", "--output-dir", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(recording) in line and "one.json" in line and "No space left" in line
    assert [path.name for path in out.iterdir()] == ["one.json"] and (out / "one.json").stat().st_size == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere.json", "one.wav", "out"]


def test_a_file_is_written_as_others_are(tmp_path):
    path = tmp_path / ("n" * 250 + ".txt")
    write_atomically(path, b"first")
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    path.chmod(0o600)
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second" and stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(OSError, match="no-folder"):
        write_atomically(tmp_path / "no-folder" / "x", b"")


def test_a_damaged_model_is_named(folder, tmp_path, capsys):
    for source in Path(folder).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    weights = tmp_path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    assert main(["transcribe", "a.wav", "--model", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{weights} is truncated" in line


def test_a_damaged_recording_is_one_line(folder, tmp_path, capsys):
    path = tmp_path / "cut.flac"
    soundfile.write(path, tiny.noise(4), 16000)
    os.truncate(path, path.stat().st_size // 2)
    assert main(["transcribe", str(path), "--model", folder]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"voxlm: {path}: only ") and "of the 4.00 s" in line and said.out


def test_the_command_names_files_and_the_library_numbers(folder, capsys, caplog):
    model = tiny.model()
    capsys.readouterr()
    for _ in range(2):  # the second time, the command must have left the logging as it was
        caplog.clear()
        assert model.transcribe(["gone.wav"])[0].error and model.align(["gone.wav"], ["a"])[0].error
        assert [record.getMessage() for record in caplog.records] == [
            "Recording 0 could not be transcribed: No such audio file: gone.wav",
            "Recording 0 could not be aligned: No such audio file: gone.wav",
        ]
        assert main(["transcribe", "gone.wav", "--model", folder]) == 1
        assert capsys.readouterr().err.splitlines() == ["voxlm: gone.wav: No such audio file: gone.wav"]


# What needs a process of its own


def command(*arguments, **options):
    """The command in a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "voxlm_command", *arguments],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """A recording for standard input, and an MP3 that libmpg123 complains of."""
    folder = tmp_path_factory.mktemp("streams")
    soundfile.write(folder / "in.wav", tiny.noise(0.6), 16000)
    soundfile.write(folder / "loud.mp3", 9 * tiny.noise(4), 16000)
    content = bytearray((folder / "loud.mp3").read_bytes())
    content[9000:9200] = bytes(200)
    (folder / "loud.mp3").write_bytes(content)
    return folder


def test_standard_streams(folder, streams):
    """Input from a pipe, and of the file that fails and of the damaged one a line each."""
    files = ["-", "/no/such/file", str(streams / "loud.mp3")]
    with open(streams / "in.wav", "rb") as file:
        process = command("transcribe", *files, "--model", folder, stdin=file, stdout=subprocess.PIPE)
        out, err = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 1 and out.startswith("# -\n")
    lines = [line for line in err.splitlines() if "loud.mp3" not in line and "real time" not in line]
    assert lines == ["voxlm: /no/such/file: No such audio file: /no/such/file"]


def test_an_output_that_nobody_reads_ends_the_command(folder, streams):
    with open(streams / "in.wav", "rb") as file:
        process = command("transcribe", "-", "--model", folder, stdin=file, stdout=subprocess.PIPE)
        process.stdout.close()
        said = process.stderr.read()
    assert process.wait(HANGS_AFTER_S) == 128 + signal.SIGPIPE and said == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_loses_nothing_that_is_finished(folder, tmp_path, number):
    for name in range(40):
        soundfile.write(tmp_path / f"{name}.wav", tiny.noise(1 if name else 29, name), 16000)
    files, out = [str(tmp_path / f"{name}.wav") for name in range(40)], tmp_path / "out"
    process = command("transcribe", *files, "--model", folder, "--output-dir", str(out), "--batch-size", "1")
    deadline = time.monotonic() + HANGS_AFTER_S
    while not list(out.glob("*.txt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate()[1]
    written = list(out.iterdir())
    assert process.returncode == 128 + number and 1 <= len(written) < 40
    assert said == f"voxlm: interrupted; {len(written)} of 40 files are done\n"
    assert all(path.suffix == ".txt" and path.stat().st_size for path in written)


def test_an_interrupt_while_loading_is_one_line(folder):
    process = command("transcribe", "a.wav", "--model", folder)
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():  # the first of its libraries
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "voxlm: interrupted\n" and process.returncode == 130


def test_a_text_in_a_pipe_is_refused_and_not_waited_for(align, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = align(f"@{tmp_path / 'pipe'}")
    assert code == 1 and err.splitlines() == [err.strip()] and "no regular file" in err
