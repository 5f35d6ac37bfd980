"""Every snippet and command of the README and of the model card runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import HANGS_AFTER_S, tiny
from voxlm_hf.app.cli import main
from voxlm_hub_export.legacy import main as convert_legacy


ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "hub_export" / "voxlm-135m" / "README.md"


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a Markdown file, in order, with the comment line before each."""
    return re.findall(rf"(?:<!--[^\n]*-->\n)?```{language}\n.*?```", path.read_text(), flags=re.S)


def code_of(block: str) -> str:
    return re.search(r"```\w+\n(.*?)```", block, flags=re.S)[1]


SNIPPETS = [
    (path.name if path.parent == ROOT else "card", number, block)
    for path in (ROOT / "README.md", CARD)
    for number, block in enumerate(blocks(path, "python"))
]


@pytest.mark.parametrize("name, number, block", SNIPPETS, ids=[f"{name}-{number}" for name, number, _ in SNIPPETS])
def test_snippets_run(name, number, block, tmp_path):
    code = code_of(block)
    if "needs the Hub" in block:
        code = with_tiny_bases(code, tmp_path)
    if "a converted checkpoint" in block:
        legacy = ROOT / "tests" / "data" / "legacy"
        bases = ["--audio-base", str(legacy / "bases/whisper_a"), "--text-base", str(legacy / "bases/qwen2_a")]
        assert convert_legacy([str(legacy / "a_qwen2/model.pt"), str(tmp_path / "my-converted"), *bases]) == 0
        code = code.replace('"my-converted"', repr(str(tmp_path / "my-converted")))
    if "model." in code and "from_pretrained" not in code and "from_base_models" not in code:
        code = code_of(blocks(ROOT / "README.md", "python")[0]) + code  # goes on with the model of the first one
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=HANGS_AFTER_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def with_tiny_bases(code: str, folder: Path) -> str:
    """Point a snippet's Hub ids, and what it writes, to tiny models in a folder."""
    tiny.save_whisper(folder)
    for names, place in (
        (("openai/whisper-small", "openai/whisper-base"), "audio"),
        (("Qwen/Qwen2-1.5B", "HuggingFaceTB/SmolLM2-135M"), "text"),
        (("my-voxlm",), "made"),
    ):
        assert place == "made" or any(name in code for name in names)
        for name in names:
            code = code.replace(f'"{name}"', repr(str(folder / place)))
    return code


def test_the_transcribe_command(monkeypatch, capsys):
    (command,) = (code_of(block) for block in blocks(ROOT / "README.md", "bash") if "transcribe command" in block)
    words = shlex.split(command.split("&&")[-1])
    assert words[0] == ".venv/bin/voxlm"
    monkeypatch.chdir(ROOT)
    assert main(words[1:]) == 0
    assert '"start"' in capsys.readouterr().out


def test_the_plot_command(monkeypatch, tmp_path):
    (command,) = (code_of(block) for block in blocks(ROOT / "README.md", "bash") if "plot command" in block)
    words = shlex.split(command)
    assert words[:2] == ["voxlm", "plot"]
    monkeypatch.chdir(ROOT)
    assert main([str(tmp_path / word) if word.endswith(".png") else word for word in words[1:]]) == 0
    assert (tmp_path / "words.png").stat().st_size > 10_000


def test_the_test_command_is_what_ci_runs():
    (command,) = (code_of(block) for block in blocks(ROOT / "README.md", "bash") if "test command" in block)
    assert command.rstrip().endswith(".venv/bin/python -m pytest")
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()
