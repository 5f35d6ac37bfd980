"""The tutorial of training/README.md, followed to the letter but for its size."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests import HANGS_AFTER_S
from voxlm_hf import VoxLMConfig
from voxlm_training.checks import check_keys, check_recipe
from voxlm_training.recipe import read_recipe
from voxlm_training.stages import STAGES


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


def test_all_recipes_are_found():
    kinds = {stage["kind"] for path in RECIPES for stage in read_recipe(path, [])["stages"]}
    assert len(RECIPES) >= 5 and kinds == set(STAGES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_options_that_exist(path, monkeypatch):
    """Everything that is checked before a run, but for the recordings, which are not here."""
    recipe = read_recipe(path, [])
    monkeypatch.setattr("voxlm_training.checks.ON_DISK", ())
    check_recipe(recipe)
    with pytest.raises(ValueError, match="no option"):
        check_keys("stages.0", {"no_such_option": 1}, recipe["stages"][0])


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
