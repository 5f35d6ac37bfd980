"""The tutorial of training/README.md, followed to the letter but for its size."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
TINY = "stages.0.num_train_epochs=1 stages.0.max_steps=2 data.copies=1 data.train.1.silence=1 stages.0.report_to=none"


def test_the_tutorial(tmp_path):
    text = (ROOT / "training" / "README.md").read_text()
    commands = re.search(r"<!-- tutorial -->\n```bash\n(.*?)```", text, re.S)[1].splitlines()
    assert commands[0].startswith("pip install") and len(commands) == 4
    recordings = tmp_path / "my-recordings"
    recordings.mkdir()
    for name, clip, said in (
        ("a", "austen-0880", "He was not an ill-disposed young man."),
        ("b", "84-121123-0001", "But in less than five minutes the staircase groaned beneath an extraordinary weight."),
    ):
        shutil.copy(DATA / f"{clip}.flac", recordings / f"{name}.wav")  # read by content, not by name
        (recordings / f"{name}.txt").write_text(said)
    for name in ("training", "hub_export", "voxlm_hf", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_folder = Path(sys.executable).parent
    for command in commands[1:]:
        command = command.replace("python ", f"{sys.executable} ")
        if command.startswith("voxlm"):
            command = f"{bin_folder}/{command}"
        if "voxlm-train" in command:
            command += f" {TINY}"
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    assert "young man" in done.stdout


def test_every_recipe_names_what_exists():
    from training.train import STAGES, read_recipe

    recipes = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
    assert len(recipes) >= 5
    for path in recipes:
        recipe = read_recipe(path, [])
        assert {stage["kind"] for stage in recipe["stages"]} <= set(STAGES), path
        if isinstance(recipe["model"], dict):
            from transformers import AutoConfig

            from voxlm_hf import VoxLMConfig

            fields = {key: value for key, value in recipe["model"].items() if key not in ("audio", "text")}
            parts = {"audio_config": AutoConfig.for_model("whisper"), "text_config": AutoConfig.for_model("qwen2")}
            VoxLMConfig(**parts, **fields)


@pytest.mark.parametrize("name", ["label_words", "synthesise", "evaluate", "train"])
def test_every_command_of_the_readme_has_help(name):
    done = subprocess.run(
        [sys.executable, "-m", f"training.{name}", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "usage" in done.stdout
