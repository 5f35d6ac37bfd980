"""
Every stage of a recipe, one after the other, on a device that is not the CPU (see `tests.second_device`), with the losses it
has on the CPU. In a process of its own, since the device is there for the whole process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml
from torch.utils import backend_registration

from tests import HANGS_AFTER_S, tiny
from voxlm_training.train import run


ROOT = Path(__file__).resolve().parents[1]
RUN = """
import json, sys
import torch, yaml
from accelerate import PartialState
from transformers import TrainingArguments
from tests.second_device import SECOND, second_device
from voxlm_training import stages, train

def second(arguments):
    arguments._setup_devices
    PartialState._shared_state["device"] = SECOND
    return SECOND

TrainingArguments.device = property(second)
# safetensors reads the memory of a tensor, which those of this device do not have.
devices = []
stages.save_file = lambda state, path, metadata: devices.append({tensor.device.type for tensor in state.values()}) or path.touch()
train.save_model = lambda model, folder: None
with second_device():
    for path in sys.argv[1:]:
        train.run(yaml.safe_load(open(path)))
# What the stages train was trained there.
assert devices == [{"second"}] * 10, devices
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    tiny.save_whisper(folder)
    rows = []
    for number, text in enumerate(["the quick brown fox", "over the lazy dog", "he hoped"]):
        soundfile.write(folder / f"{number}.wav", tiny.noise(0.6 + 0.2 * number, number), tiny.RATE)
        words = [{"word": word, "start": n / 10, "end": n / 10 + 0.1} for n, word in enumerate(text.split())]
        rows.append(json.dumps({"audio": f"{number}.wav", "text": text, "words": words}))
    (folder / "manifest.jsonl").write_text("\n".join(rows))
    common = {"report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0,
              "dataloader_pin_memory": False, "use_cpu": True}  # fmt: skip
    trained = {"max_steps": 2, "seconds_per_batch": 2, "eval_steps": 2, "max_new_tokens": 4, "state_noise": 0.0}
    source = {"manifest": str(folder / "manifest.jsonl")}
    return folder, {
        "model": {
            "audio": str(folder / "audio"),
            "text": str(folder / "text"),
            "projector_readout": "token_mixture",
            "frame_gate_threshold": 0.3,
            "projector_kind": "convnext",
            "projector_encoder_layers": 1,
            "lora_config": {"r": 2},
        },
        "output": None,
        "data": {"normaliser": "lower", "augment": True, "train": [source, {"silence": 1}], "dev": [source]},
        "stages": [
            {"kind": "warm_start", "merges": 5, "steps": 2, "eval_steps": 2, "bf16": False, **common},
            {"kind": "transcription", "parts": ["projector", "lora"], **trained, **common},
            {"kind": "alignment", "parts": ["alignment"], **trained, **common},
            {"kind": "reader", "base": str(folder / "audio"), "settings": {"end_frames": 4}, "steps": 2, **common},
            {"kind": "reader_tuning", "base": str(folder / "audio"), "steps": 2, "bf16": False, **common},
        ],
    }


def losses(output: Path) -> dict[str, list[float]]:
    """The losses of each stage."""
    logs = {path.parent.name: json.loads(path.read_text()) for path in sorted(output.glob("*/log.json"))}
    names = ("loss", "alignment_loss", "eval_loss", "eval_word_start_error_ms")
    return {stage: [entry[key] for entry in log for key in names if key in entry] for stage, log in logs.items()}


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="a torch without Python devices",
)
def test_all_stages_run_on_another_device_as_on_the_cpu(recipe):
    """With a cache of encoder states, and with the encoder running in each step."""
    folder, contents = recipe
    run({**contents, "output": str(folder / "cpu")})
    on_cpu = losses(folder / "cpu")
    paths = []
    for name, extra in (("fresh", {}), ("cached", {"cache": str(folder / "features")})):
        data = {**contents["data"], **extra}
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump({**contents, "data": data, "output": str(folder / name)}))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, paths)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=HANGS_AFTER_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [len(values) > 2 for values in on_cpu.values()] == [True, True, True, False, False] and len(on_cpu) == 5
    for name in ("fresh", "cached"):
        for stage, values in losses(folder / name).items():
            assert values == pytest.approx(on_cpu[stage], rel=5e-3), (name, stage)
