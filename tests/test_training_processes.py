"""The same training in one process and in two, data-parallel and sharded: the losses agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from tests import HANGS_AFTER_S, tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_training.train import run


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "training" / "accelerate"
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp-2cpu.yaml")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Eight clips of one length, so that two processes with batches of two see what one sees in batches of four."""
    folder = tmp_path_factory.mktemp("processes")
    lines = []
    for number in range(8):
        soundfile.write(folder / f"{number}.wav", tiny.noise(1.0, number), 16000)
        words = [{"word": "fox", "start": 0.5, "end": 0.8}]
        lines.append(json.dumps({"audio": f"{number}.wav", "text": "the quick brown fox", "words": words}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    toy = tiny.model(lora_config={"r": 2})
    toy.save_pretrained(folder / "base")
    toy.processor.save_pretrained(folder / "base")
    stage = {
        "kind": "transcription",
        "parts": ["lora", "projector", "alignment"],
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "report_to": [],
        "save_strategy": "no",
        "seconds_per_batch": 2.0,
    }
    data = {"normaliser": "lower", "train": [{"manifest": str(folder / "manifest.jsonl")}]}
    contents = {"model": str(folder / "base"), "output": str(folder / "out"), "data": data, "stages": [stage]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(contents))
    return folder


def launched(folder: Path, launcher: list[str], *overrides: str) -> str:
    """What a run of the recipe in a folder prints."""
    command = [*launcher, "-m", "voxlm_training.train", str(folder / "recipe.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(recipe: Path, name: str, launcher: list[str], kind: str, *overrides: str) -> list[float]:
    """Of each step, and after them what the alignment head has of each."""
    assert kind in launched(recipe, launcher, f"output={recipe / name}", *overrides)
    log = json.loads((recipe / name / "1-transcription" / "log.json").read_text())
    return [entry[key] for key in ("loss", "alignment_loss") for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def alone(recipe):
    return losses(
        recipe, "alone", [sys.executable], "1 process(es), DistributedType.NO", "stages.0.gradient_accumulation_steps=2"
    )


def test_two_processes_have_the_losses_of_one(recipe, alone):
    together = losses(recipe, "two", TWO_PROCESSES, "2 process(es), DistributedType.MULTI_CPU")
    assert len(together) == 8 and together[3] < together[0]
    assert together == pytest.approx(alone, abs=1e-3)
    assert VoxLMForSpeechSeq2Seq.from_pretrained(recipe / "two" / "final").config.lora_config["r"] == 2


@pytest.fixture(scope="module")
def all_stages(tmp_path_factory):
    """A recipe with every kind of stage, whose batches all lack something: silence has no word times, LoRA no gate."""
    folder = tmp_path_factory.mktemp("stages")
    tiny.save_whisper(folder)
    lines = []
    for number in range(8):
        words = [{"word": "fox", "start": 0.1, "end": 0.4}]
        soundfile.write(folder / f"{number}.wav", tiny.noise(1.0, number), 16000)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": "fox", **({"words": words} if number == 0 else {})}))
    (folder / "broken.wav").write_text("no audio")
    lines.append(json.dumps({"audio": "broken.wav", "text": "fox", "duration": 1.0}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    common = {"report_to": [], "logging_steps": 1, "save_steps": 1, "warmup_steps": 0}
    trained = {"seconds_per_batch": 1.0, "max_steps": 2, **common}
    contents = {
        "model": {
            "audio": str(folder / "audio"),
            "text": str(folder / "text"),
            "projector_readout": "token_mixture",
            "frame_gate_threshold": 0.3,
            "lora_config": {"r": 2},
        },
        "output": str(folder / "out"),
        "data": {"normaliser": "lower", "cache": str(folder / "features"), "train": [{"manifest": str(folder / "manifest.jsonl")}]},
        "stages": [
            {"kind": "transcription", "parts": ["projector", "lora", "alignment"], **trained},
            {"kind": "warm_start", "merges": 5, "steps": 2, "frames_per_batch": 60, **common},
            {"kind": "alignment", "parts": ["alignment"], **trained},
            {"kind": "reader", "base": str(folder / "audio"), "settings": {"end_frames": 4}, "recordings": 3, "steps": 2, **common},
        ],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(contents))
    return folder


def test_two_processes_run_all_stages_and_fill_one_cache(all_stages):
    launched(all_stages, TWO_PROCESSES)
    trained = sorted(path.parent.name for path in (all_stages / "out").glob("*/trained.safetensors"))
    assert trained == ["1-transcription", "2-warm_start", "3-alignment", "4-reader"]
    shards = {path: path.stat().st_mtime_ns for path in (all_stages / "features").iterdir()}
    assert len(shards) == 2, "each process writes its own"
    keys = [key for path in shards for key in load_file(path)]
    assert len(keys) == len(set(keys)) == 8
    # One process finds all of it, and its encoder makes the same of the recordings.
    contents = {**yaml.safe_load((all_stages / "recipe.yaml").read_text()), "stages": []}
    run({**contents, "output": str(all_stages / "alone")})
    assert {path: path.stat().st_mtime_ns for path in (all_stages / "features").iterdir()} == shards
    contents["data"]["cache"] = str(all_stages / "again")
    run({**contents, "output": str(all_stages / "alone")})
    again = {key: tensor for path in (all_stages / "again").iterdir() for key, tensor in load_file(path).items()}
    for path in shards:
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(tensor, again[key], atol=2e-3, rtol=0)


SHARDED = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests import HANGS_AFTER_S, tiny

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
toy = tiny.model(lora_config={"r": 2}, projector_readout="token_mixture", frame_gate_threshold=0.2)
rows = [{"audio": tiny.noise(1.0, number), "text": "the quick brown fox"} for number in range(4)]
batch = toy.processor.collate(rows[rank :: world])
mesh = init_device_mesh("cpu", (world,))
for module in toy.modules():
    if type(module).__name__ in {"WhisperEncoderLayer", *toy._no_split_modules}:
        fully_shard(module, mesh=mesh)
fully_shard(toy, mesh=mesh)
optimizer = torch.optim.SGD([parameter for parameter in toy.parameters() if parameter.requires_grad], lr=0.02)
losses = []
for _ in range(4):
    loss = toy(**batch).loss
    loss.backward()
    optimizer.step(), optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    losses.append(float(mean) / world)
if rank == 0:
    json.dump(losses, open(sys.argv[1], "w"))
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes abort the interpreter when it takes itself down; all is written by now
"""


def test_fsdp2_shards_have_the_losses_of_one_process(tmp_path):
    """torch's `fully_shard` over gloo; accelerate itself shards on accelerators only."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    found = []
    for processes in (1, 2):
        result = tmp_path / f"{processes}.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [*command, str(tmp_path / "sharded.py"), str(result)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=HANGS_AFTER_S,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(result.read_text()))
    assert abs(found[0][-1] - found[0][0]) > 1e-3, "nothing was trained"
    assert found[1] == pytest.approx(found[0], abs=1e-4)
