"""Exports: modes, storage, what happens when something goes wrong half-way."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import HANGS_AFTER_S, tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.app.files import unfinished_folder
from voxlm_hub_export.export import CODE_FILES, PACKAGE, export, main, merged_state


DRAFTING = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.5, "projector_vocab_size": 40}


@pytest.mark.parametrize("storage", ["as is", "float16", "int8"])
def test_a_better_checkpoint_changes_one_file(tmp_path, storage):
    model = tiny.model(lora_config={"r": 2}, **DRAFTING)
    export(model, tmp_path / "first", "lora", storage)
    better = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "first")
    with torch.no_grad():
        better.projector.linear_in.weight += 1
    better.set_projector_vocabulary(range(5, 60), 10)
    export(better, tmp_path / "second", "lora", storage, frozen_from=tmp_path / "first")
    export(better, tmp_path / "first", "lora", storage, frozen_from=tmp_path / "first", force=True)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "second")
    assert again.projector.token_ids.tolist() == list(range(5, 60)) and again.config.projector_vocab_size == 55
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, better.state_dict()[name], rtol=1e-2, atol=1e-2)
        if ".base_layer." in name or name.startswith("encoder."):
            torch.testing.assert_close(tensor, better.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_shards_of_another_model_are_not_taken(tmp_path):
    export(tiny.model(), tmp_path / "first")
    other = tiny.model()
    with torch.no_grad():
        other.encoder.conv1.weight += 1
    with pytest.raises(ValueError, match="encoder.conv1.weight differs"):
        export(other, tmp_path / "second", frozen_from=tmp_path / "first")


def trained(**fields):
    """A tiny model whose LoRA does something."""
    model = tiny.model(lora_config={"r": 2}, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def logits(model):
    inputs = model.get_processor().apply_transcription_request(tiny.noise(1.0))
    with torch.no_grad():
        return model(**inputs).logits


LOAD = """
import sys, torch
from transformers import AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
folder, out, peft = sys.argv[1:]
assert "voxlm_hf" not in sys.modules
if not int(peft):
    sys.modules["peft"] = None
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
inputs = torch.load(out + "/inputs.pt", weights_only=True)
torch.save({"logits": model(**inputs).logits, "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}, out + "/outputs.pt")
"""


@pytest.mark.parametrize("mode, head", [("merged", {}), ("lora", {}), ("merged", DRAFTING)])
def test_a_stranger_loads_it_and_gets_the_same_logits(tmp_path, mode, head):
    model = trained(**head)
    export(model, tmp_path / "model", mode)
    assert (".lora_" in (tmp_path / "model" / "model.safetensors.index.json").read_text()) == (mode == "lora")
    inputs = dict(model.processor.apply_transcription_request(tiny.noise(1.0)))
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-P", "-c", LOAD, str(tmp_path / "model"), str(tmp_path), str(int(mode == "lora"))]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    if mode == "lora":
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert outputs["trainable"] == trainable > 0
    torch.testing.assert_close(outputs["logits"], logits(model), atol=0 if mode == "lora" else 1e-5, rtol=0)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_storage_is_the_dtype_it_loads_with(tmp_path, storage):
    export(trained(), tmp_path / "model", "lora", storage)
    assert VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model").dtype == getattr(torch, storage)


def test_shards_are_as_large_as_asked(tmp_path):
    model = trained()
    export(model, tmp_path / "model", shard_bytes=20_000)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 4
    assert all(path.stat().st_size < 30_000 or len(load_file(path)) == 1 for path in shards)
    torch.testing.assert_close(
        logits(VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")), logits(model), atol=1e-5, rtol=0
    )


@pytest.fixture
def bases(tmp_path):
    """Two base models in folders, and a model trained on them."""
    tiny.save_bases(tmp_path, "qwen2")
    audio, text = tmp_path / "audio", tmp_path / "text"
    model = VoxLMForSpeechSeq2Seq.from_base_models(audio, text, lora_config={"r": 2})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)
    return model, (str(audio), str(text))


def test_a_delta_is_small_and_gives_the_same_logits(tmp_path, bases):
    model, names = bases
    export(model, tmp_path / "delta", "delta", bases=names)
    stored = load_file(tmp_path / "delta" / "trained.safetensors")
    assert not any(name.startswith("encoder.") for name in stored)
    assert len(list((tmp_path / "delta").glob("*.safetensors"))) == 1
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "delta")
    torch.testing.assert_close(logits(again), logits(model), atol=0, rtol=0)
    assert again.transcribe(tiny.noise(1.0)) == model.transcribe(tiny.noise(1.0))
    again.save_pretrained(tmp_path / "whole")  # what a delta became is a whole model
    whole = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "whole")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_delta_refuses_another_missing_or_moved_base(tmp_path, bases):
    model, (audio, text) = bases
    export(model, tmp_path / "delta", "delta", bases=(audio, text))
    (path,) = Path(text).glob("*.safetensors")
    original = path.read_bytes()
    path.write_bytes(original[:-4] + bytes(4))
    with pytest.raises(ValueError, match="not those that this checkpoint was trained on"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "delta")
    path.write_bytes(original)
    file = tmp_path / "delta" / "config.json"
    config = json.loads(file.read_text())
    config["base_models"]["text"]["name"] = str(tmp_path / "gone")
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gone .*cannot be had"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "delta", local_files_only=True)


def test_a_delta_of_another_base_is_not_written(tmp_path, bases):
    model, names = bases
    with torch.no_grad():
        model.encoder.conv1.weight += 1
    with pytest.raises(ValueError, match="encoder.conv1.weight differs"):
        export(model, tmp_path / "delta", "delta", bases=names)
    assert not (tmp_path / "delta").exists()


def test_what_was_there_stays_when_an_export_fails(tmp_path, monkeypatch):
    export(tiny.model(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(FileExistsError, match="--force"):
        export(tiny.model(), tmp_path / "model")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("voxlm_hub_export.export.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(tiny.model(), tmp_path / "model", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_takes_no_more_is_said_in_one_line(tmp_path):
    export(tiny.model(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    limited = (
        "import resource, sys\nfrom voxlm_hub_export.export import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        f"sys.exit(main([{str(tmp_path / 'model')!r}, {str(tmp_path / 'model')!r}, '--force']))"
    )
    run = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert run.returncode == 1 and "voxlm-export: Error while serializing" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_export_leaves_the_old_one_whole(tmp_path):
    export(tiny.model(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    slow = (
        "import time, voxlm_hub_export.export as e\nfrom tests import tiny\nreal = e.save_file\n"
        "def save(*a, **k):\n    real(*a, **k); print('writing', flush=True); time.sleep(60)\n"
        f"e.save_file = save\ne.export(tiny.model(), {str(tmp_path / 'model')!r}, force=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True)
    assert "writing" in (line.strip() for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")


KILLED_AT_CALL = """
import os, signal, sys
from pathlib import Path
import voxlm_hf.app.files as e
from tests import tiny
from voxlm_hub_export.export import export
from voxlm_training.train import save_model
folder, where, count, can_exchange = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if not can_exchange:
    e.exchange = lambda new, folder: False
model, calls = tiny.model(), []
owner, name = (os, where.split(".")[1]) if where.startswith("os.") else (e.shutil, "rmtree")
real = getattr(owner, name)

def killing(*args, **kwargs):
    calls.append(args)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(owner, name, killing)
if where == "exchange":
    swap = e.exchange
    e.exchange = lambda *paths: (swap(*paths), os.kill(os.getpid(), signal.SIGKILL))
export(model, folder, force=True) if sys.argv[5] == "export" else save_model(model, Path(folder))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange folders")
@pytest.mark.parametrize(
    "by, where, count, can_exchange",
    [
        ("export", "exchange", 99, 1),
        ("export", "os.rename", 2, 0),
        ("export", "shutil.rmtree", 1, 0),
        ("training", "os.rename", 2, 0),
    ],
)
def test_after_a_kill_at_any_step_of_moving_the_next_is_whole_and_alone(tmp_path, by, where, count, can_exchange):
    folder = tmp_path / "model"
    export(tiny.model(), folder)
    command = [sys.executable, "-c", KILLED_AT_CALL, str(folder), where, str(count), str(can_exchange), by]
    assert subprocess.run(command, timeout=HANGS_AFTER_S).returncode == -signal.SIGKILL
    if can_exchange:
        VoxLMForSpeechSeq2Seq.from_pretrained(folder)  # at every moment a whole checkpoint is there
    with pytest.raises(FileExistsError):  # also brings back what was moved away
        export(tiny.model(), folder)
    VoxLMForSpeechSeq2Seq.from_pretrained(folder)
    export(tiny.model(), folder, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_leaves_another_one_that_is_under_way_alone(tmp_path):
    folder = tmp_path / "model"
    with unfinished_folder(folder) as other:
        dead = tmp_path / ".model-abcdefgh.unfinished"
        (dead / "deep").mkdir(parents=True)
        neighbour = tmp_path / ".model2-abcdefgh.unfinished"
        neighbour.mkdir()
        export(tiny.model(), folder)
        assert other.is_dir() and neighbour.is_dir() and not dead.exists()


def test_an_export_to_a_link_replaces_what_it_stands_for(tmp_path):
    export(tiny.model(), tmp_path / "model")
    (tmp_path / "latest").symlink_to("model")
    export(tiny.model(projector_stride=2), tmp_path / "latest", force=True)
    assert (tmp_path / "latest").is_symlink()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["projector_stride"] == 2


def test_the_readme_of_a_folder_is_kept(tmp_path):
    export(tiny.model(), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("a card")
    export(tiny.model(), tmp_path / "model", force=True)
    assert (tmp_path / "model" / "README.md").read_text() == "a card"


def test_options_that_do_not_go_together(tmp_path, capsys):
    for options in ({"mode": "delta"}, {"mode": "whole"}, {"bases": ("a", "b")}):
        with pytest.raises(ValueError, match="delta alone needs the base models"):
            export(tiny.model(), tmp_path / "model", **options)
    with pytest.raises(ValueError, match="no frozen weights"):
        export(tiny.model(), tmp_path / "model", "delta", "int8", bases=("a", "b"))
    assert main([str(tmp_path / "no-model"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("voxlm-export: ")


def test_the_command_line(tmp_path):
    model = trained()
    export(model, tmp_path / "model", "lora")
    assert main([str(tmp_path / "model"), str(tmp_path / "merged"), "--storage", "float32"]) == 0
    merged = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "merged")
    assert merged.config.lora_config is None
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)
    assert main([str(tmp_path / "model"), str(tmp_path / "merged")]) == 1


def test_updating_the_code_deletes_modules_that_the_package_no_longer_has(tmp_path):
    export(tiny.model(), tmp_path / "model")
    others = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.suffix != ".py"}
    (tmp_path / "model" / "gone_voxlm.py").write_text("import os")
    (tmp_path / "model" / "mine.py").write_text("keep = True")
    (tmp_path / "model" / "modeling_voxlm.py").write_text("old")
    assert main(["--code", str(tmp_path / "model")]) == 0
    assert {path.name for path in (tmp_path / "model").glob("*.py")} == {*CODE_FILES, "mine.py"}
    assert (tmp_path / "model" / "modeling_voxlm.py").read_text() == (PACKAGE / "modeling_voxlm.py").read_text()
    assert all((tmp_path / "model" / name).read_bytes() == content for name, content in others.items())


@pytest.mark.parametrize("mode", ["merged", "lora"])
def test_no_file_names_a_folder_of_the_machine_that_exported_it(tmp_path, bases, mode):
    model, (audio, text) = bases
    export(model, tmp_path / "model", mode)
    files = list((tmp_path / "model").rglob("*.json")) + list((tmp_path / "model").rglob("*.jinja"))
    assert {"config.json", "processor_config.json", "tokenizer_config.json"} <= {file.name for file in files}
    folders = {audio, text, str(Path(audio).parent), str(tmp_path)}
    for file in files:
        content = file.read_text()
        assert not [folder for folder in folders if folder in content], file.name
        assert not [key for key in ("_name_or_path", "name_or_path", "is_local") if f'"{key}"' in content], file.name
    VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model").get_processor()


def test_merging_lora_leaves_the_model_as_it_is_and_is_pefts_own_merge():
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, config = merged_state(model)
    assert model.config.lora_config is not None and config.lora_config is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(".lora_" in name for name in state)
    adapted = [
        name.removesuffix(".lora_A.default.weight") for name in before if name.endswith(".lora_A.default.weight")
    ]
    assert adapted
    for name in adapted:  # W + alpha / r * B A (Hu et al. 2021); peft's alpha is 8 by default
        low_rank = before[f"{name}.lora_B.default.weight"] @ before[f"{name}.lora_A.default.weight"]
        scale = model.config.lora_config.get("lora_alpha", 8) / model.config.lora_config["r"]
        expected = before[f"{name}.base_layer.weight"] + scale * low_rank
        torch.testing.assert_close(state[f"{name}.base_layer.weight"], expected, atol=1e-6, rtol=0)
        assert not torch.equal(state[f"{name}.base_layer.weight"], before[f"{name}.base_layer.weight"])


def test_lora_weights_that_are_not_finite_are_not_merged(tmp_path):
    model = trained()
    next(parameter for name, parameter in model.named_parameters() if ".lora_B" in name).data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        export(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_exported_code_runs_nothing_it_was_not_given():
    """No eval, no pickles, no network but the Hub's client for base models."""
    for name in CODE_FILES:
        tree = ast.parse((PACKAGE / name).read_text())
        imported = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {
            node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
        }
        assert not imported & {"pickle", "socket", "requests", "httpx", "urllib", "subprocess", "importlib"}, name
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        called -= {"open"} if name == "audio_voxlm.py" else set()  # of recordings
        assert not called & {"eval", "exec", "compile", "__import__", "torch.load", "open"}, name
        if "snapshot_download" in called:
            assert name == "loading_voxlm.py"


def test_code_goes_into_checkpoints_only(tmp_path, capsys):
    (tmp_path / "mine_voxlm.py").write_text("mine")
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["--code", str(folder)]) == 1
        assert "no VoxLM checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine_voxlm.py"]
