"""Starting again after a kill at any moment."""

import json
import resource
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_training.checkpoints import WriteError, last_whole_checkpoint, naming_unwritten_files, written_whole
from voxlm_training.data import Row, SpeechDataset
from voxlm_training.features import TensorStore
from voxlm_training.recipe import RecipeError
from voxlm_training.stages import run_stage
from voxlm_training.train import save_model


FIELDS = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3, "lora_config": {"r": 2}}
COMMON = {"save_steps": 2, "logging_steps": 1, "warmup_steps": 0, "report_to": [], "disable_tqdm": True}
KINDS = {
    "warm_start": {"merges": 5, "steps": 6, "frames_per_batch": 60, "learning_rate": 1e-2},
    "transcription": {"parts": ["projector", "lora"], "seconds_per_batch": 1.0, "max_steps": 6, "state_noise": 0.5},
    "reader": {"base": None, "settings": {"end_frames": 4}, "recordings": 3, "steps": 6, "frames_per_batch": 60},
    "reader_tuning": {"base": None, "settings": {"end_frames": 4}, "steps": 6, "frames_per_batch": 60, "bf16": False},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny Whisper, of which the models of this file have the encoder."""
    folder = tmp_path_factory.mktemp("bases")
    tiny.save_whisper(folder)
    return folder


def train(bases, folder, kind, fields=None, **changes):
    """What a stage has trained, always from the same start; of a model with other `fields`, by other options."""
    torch.manual_seed(0)
    model = VoxLMForSpeechSeq2Seq.from_base_models(
        str(bases / "audio"), str(bases / "text"), **{**FIELDS, **(fields or {})}
    )
    rows = [Row(str(n), tiny.noise(0.5 + n / 10, n), text, 0.5 + n / 10) for n, text in enumerate(("fox", "dog", "he"))]
    options = {**COMMON, **KINDS[kind], **changes}
    if kind in ("reader", "reader_tuning"):
        options["base"] = str(bases / "audio")
    run_stage(model, SpeechDataset(rows, model.processor), None, folder, 3, kind, **options)
    return load_file(folder / "trained.safetensors")


DAMAGES = {
    "trainer_state.json": ("missing", "empty", "half"),
    "model.safetensors": ("missing", "empty", "half"),
    "optimizer.pt": ("missing", "empty", "half"),
    "scheduler.pt": ("missing", "half"),
    "rng_state.pth": ("missing", "empty", "half"),
}


def damage(path: Path, how: str):
    if how == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if how == "half" else b"")


@pytest.fixture(scope="module")
def whole(bases, tmp_path_factory):
    """The folder of each kind of stage after an unbroken run, with checkpoints 4 and 6."""
    folders = {kind: tmp_path_factory.mktemp(kind) / f"1-{kind}" for kind in KINDS}
    for kind, folder in folders.items():
        train(bases, folder, kind)
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_resumes_to_the_very_same_weights(bases, whole, tmp_path, kind, capsys):
    """Killed between step 4 and 6, while its last checkpoint was being written."""
    folder = tmp_path / f"1-{kind}"
    shutil.copytree(whole[kind], folder)
    (folder / "trained.safetensors").unlink()
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    found, expected = train(bases, folder, kind), load_file(whole[kind] / "trained.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found.keys() == expected.keys()
    line = f"cannot resume from {folder}/checkpoint-6: trainer_state.json is missing; continues from checkpoint-4\n"
    assert line in capsys.readouterr().out
    log = json.loads((folder / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_whose_steps_are_done_takes_no_more(bases, tmp_path, kind):
    """Killed after the last checkpoint, in the middle of an epoch of three batches, before the result was whole."""
    folder = tmp_path / f"1-{kind}"
    steps = {"max_steps": 4} if kind == "transcription" else {"steps": 4, "frames_per_batch": 40}
    # Copies, since what was loaded is the file itself, in memory.
    expected = {name: tensor.clone() for name, tensor in train(bases, folder, kind, **steps).items()}
    damage(folder / "trained.safetensors", "missing" if kind == "reader" else "half")
    found = train(bases, folder, kind, **steps)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found.keys() == expected.keys()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    log = json.loads((folder / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("name, how", [(name, how) for name, hows in DAMAGES.items() for how in hows])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(whole, tmp_path, name, how):
    folder = tmp_path / "stage"
    shutil.copytree(whole["transcription"], folder)
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True)
    assert last_whole_checkpoint(folder, arguments) == (folder / "checkpoint-6", [])
    damage(folder / "checkpoint-6" / name, how)
    last, (line,) = last_whole_checkpoint(folder, arguments)
    assert last == folder / "checkpoint-4" and "checkpoint-6" in line and name in line
    damage(folder / "checkpoint-4" / name, how)
    last, lines = last_whole_checkpoint(folder, arguments)
    assert last is None and len(lines) == 2


def test_without_a_whole_checkpoint_a_stage_begins_again(bases, whole, tmp_path, capsys):
    folder = tmp_path / "1-transcription"
    shutil.copytree(whole["transcription"], folder)
    (folder / "trained.safetensors").write_bytes(b"cut off")
    for checkpoint in folder.glob("checkpoint-*"):
        damage(checkpoint / "model.safetensors", "half")
    (folder / "copy-of-checkpoint-6").mkdir()
    found, expected = train(bases, folder, "transcription"), load_file(whole["transcription"] / "trained.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shown = capsys.readouterr().out
    assert "trained.safetensors is damaged, the stage runs again" in shown and "from the beginning" in shown
    assert (folder / "copy-of-checkpoint-6").is_dir()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "fields, named",
    [
        ({"lora_config": {"r": 3}}, "the model of"),
        ({"lora_config": {"r": 2, "target_modules": ["q_proj"]}}, "what the model does not train, such as .*lora_A"),
        ({"projector_kind": "convnext"}, "lacks what the model trains, such as projector"),
        ({"lora_config": None}, "what the model does not train, such as .*lora_A"),
    ],
)
def test_what_another_recipe_has_trained_is_refused_in_a_sentence(bases, whole, tmp_path, fields, named, finished):
    folder = tmp_path / "1-transcription"
    shutil.copytree(whole["transcription"], folder)
    if not finished:
        (folder / "trained.safetensors").unlink()
    with pytest.raises(RecipeError, match=f"^stage 1, transcription: {folder}/.*{named}.* was the recipe changed"):
        train(bases, folder, "transcription", fields)


def test_random_states_of_another_number_of_processes_do_not_count_as_missing(whole, tmp_path):
    folder = tmp_path / "stage"
    shutil.copytree(whole["transcription"], folder)
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True)
    for checkpoint in folder.glob("checkpoint-*"):
        for number in range(2):
            shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{number}.pth")
        (checkpoint / "rng_state.pth").unlink()
    assert last_whole_checkpoint(folder, arguments)[0] == folder / "checkpoint-6"


def test_the_trained_model_is_never_half_a_model(tmp_path, monkeypatch):
    toy = tiny.model(lora_config={"r": 2})
    save_model(toy, tmp_path / "final")
    before = (tmp_path / "final" / "model.safetensors").read_bytes()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(toy.processor), "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(toy, tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    save_model(toy, tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_result_that_is_not_finished_leaves_nothing(tmp_path, error):
    (tmp_path / "result").write_text("before")
    with pytest.raises(error), written_whole(tmp_path / "result") as unfinished:
        unfinished.write_text("half")
        raise error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("result", "before")]


def test_shards_are_never_overwritten_and_damaged_ones_are_made_again(tmp_path, capsys):
    store = TensorStore(tmp_path)
    for number in range(3):
        store.add({f"key-{number}": torch.full((2,), float(number))})
    first, *others = sorted(tmp_path.iterdir())
    content = {path: path.read_bytes() for path in others}
    name = next(iter(load_file(first)))
    first.unlink()
    again = TensorStore(tmp_path)
    assert name not in again and len(again.files) == 2
    again.add({name: torch.ones(2), "new": torch.ones(2)})
    assert {path: path.read_bytes() for path in others} == content and len(TensorStore(tmp_path).files) == 4
    others[0].write_bytes(content[others[0]][:-3])
    (tmp_path / f"x.{socket.gethostname()}.{2**22 + 1}.unfinished").write_bytes(b"")
    assert len(TensorStore(tmp_path).files) == 3 and f"{others[0]} is skipped" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.unfinished"))


WRITERS = {
    "model.safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "optimizer.pt": lambda path: torch.save(torch.zeros(100_000), path),
    "log.json": lambda path: path.write_text("0" * 400_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    """A limit on the size of files in the place of a full disk."""
    (tmp_path / "older").write_text("")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(WriteError) as raised, naming_unwritten_files([tmp_path]):
            WRITERS[name](tmp_path / name)
        with pytest.raises(WriteError, match=f"{tmp_path}/{name} "), written_whole(tmp_path / name) as unfinished:
            WRITERS[name](unfinished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line, shown = str(raised.value), name.replace("model", "*")
    assert f"{tmp_path}/{shown} could not be written: " in line and "the same command resumes" in line
    assert len(line.splitlines()) == 1


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (FileNotFoundError(2, "No such file"), RuntimeError("shapes differ")):
        with pytest.raises(type(error)), naming_unwritten_files([tmp_path]):
            raise error
