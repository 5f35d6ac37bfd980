"""The tutorial of training/README.md, followed to the letter but for its size."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, TrainingArguments

from tests import HANGS_AFTER_S
from voxlm_hf import VoxLMConfig
from voxlm_training.data import READERS, read_rows
from voxlm_training.reader import train_reader
from voxlm_training.train import PARTS, STAGES, TRAINER_OPTIONS, make_dataset, read_recipe, run_reader
from voxlm_training.warm_start import warm_start


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
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS_AFTER_S)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    assert "young man" in done.stdout


RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


def options_of(*functions) -> set[str]:
    """The names that functions take."""
    return {name for function in functions for name in inspect.signature(function).parameters}


STAGE_OPTIONS = {
    "warm_start": options_of(warm_start),
    "reader": options_of(run_reader, train_reader) | {"base", "settings"},
    "transcription": options_of(TrainingArguments) | {"parts", *TRAINER_OPTIONS},
    "alignment": options_of(TrainingArguments) | {"parts", *TRAINER_OPTIONS},
}


def test_all_recipes_are_found():
    assert len(RECIPES) >= 5 and set(STAGE_OPTIONS) == set(STAGES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_options_that_exist(path):
    recipe = read_recipe(path, [])
    for stage in recipe["stages"]:
        assert set(stage) - {"kind"} <= STAGE_OPTIONS[stage["kind"]]
        assert set(stage.get("parts", ())) <= set(PARTS)
    assert set(recipe["data"]) <= options_of(make_dataset, read_rows) - {"sources", "model"} | {"train", "dev"}
    for source in recipe["data"]["train"] + recipe["data"].get("dev", []):
        assert len(set(source) & set(READERS)) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_a_model_that_can_be_made(path):
    model = read_recipe(path, [])["model"]
    if isinstance(model, dict):
        fields = {key: value for key, value in model.items() if key not in ("audio", "text")}
        parts = {"audio_config": AutoConfig.for_model("whisper"), "text_config": AutoConfig.for_model("qwen2")}
        VoxLMConfig(**parts, **fields)
    else:
        assert (ROOT / model / "config.json").is_file()


README = (ROOT / "training" / "README.md").read_text()
MODULES = sorted(set(re.findall(r"-m (voxlm_training\.\w+)", README)))
SCRIPTS = sorted(set(re.findall(r"\bvoxlm-(?:eval|export|push|train)\b", README)))


def test_the_readme_names_commands():
    assert {"voxlm_training.confidence", "voxlm_training.label_words", "voxlm_training.train"} <= set(MODULES)
    assert set(SCRIPTS) == {"voxlm-eval", "voxlm-export", "voxlm-train"}


@pytest.mark.parametrize("command", [*MODULES, *SCRIPTS])
def test_every_command_of_the_readme_has_help(command):
    program = [sys.executable, "-m", command] if "." in command else [str(Path(sys.executable).parent / command)]
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "usage" in done.stdout
