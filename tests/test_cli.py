"""`voxlm transcribe`: outputs, exit codes, one line per bad file."""

import json

import pytest
import soundfile

from tests import tiny
from voxlm_hf.app.cli import main, output_paths


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
    assert set(result) == {"text", "words", "duration", "truncated", "word_scores", "segments"}
    assert result["duration"] == 0.8


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
    code, picture, _ = plot("c.txt")
    assert code == 1 and not picture.exists()


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
