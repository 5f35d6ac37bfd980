"""Push to and load from a stand-in for the Hub, as users do it: in processes that know nothing but its address."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from tests import HANGS_AFTER_S, tiny
from tests.hub_stand_in import Hub
from voxlm_hub_export.export import export


ROOT = Path(__file__).resolve().parents[1]
REPO = "me/my-voxlm"
LOAD = """
import json, sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, revision=sys.argv[2])
result = model.transcribe(sys.argv[3])
print(json.dumps({"text": result["text"], "norm": float(model.alignment.key_norm.weight.sum())}))
"""


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "model"
    export(tiny.model(llm="qwen3"), folder)
    return folder


def environment(hub, home: Path, **more) -> dict:
    """Of a user whose cache is empty and whose Hub is the stand-in."""
    hidden = {"HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "PYTHONPATH"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    token = "hf_" + "t" * 34
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", **more}


def push(hub, folder, home, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "voxlm_hub_export.push", str(folder), REPO, *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment(hub, home), capture_output=True, text=True, timeout=HANGS_AFTER_S
    )


def load(hub, home, revision, clip, **more) -> subprocess.CompletedProcess:
    """In a folder from which this package cannot be imported."""
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-c", LOAD, REPO, revision, str(clip)]
    environ = environment(hub, home, **more)
    return subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, timeout=HANGS_AFTER_S)


def moved(folder, to) -> Path:
    """A copy of the checkpoint with another weight."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    for path in to.glob("*.safetensors"):
        tensors = load_file(path)
        if "alignment.key_norm.weight" in tensors:
            tensors["alignment.key_norm.weight"] = torch.full_like(tensors["alignment.key_norm.weight"], 3.0)
            save_file(tensors, path, {"format": "pt"})
    return to


def test_what_was_pushed_is_what_others_load(hub, folder, tmp_path):
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, tiny.noise(1.0), 16000)
    done = push(hub, folder, tmp_path / "pusher", "--tag", "v1")
    assert done.returncode == 0, done.stderr
    commit = hub.repositories[REPO]["refs"]["main"]
    assert f'revision="{commit}"' in done.stdout and hub.repositories[REPO]["refs"]["v1"] == commit
    sent = hub.repositories[REPO]["commits"][commit]
    assert {path.name for path in folder.iterdir()} | {".gitattributes"} == set(sent)
    assert all(sent[path.name] == path.read_bytes() for path in folder.iterdir())

    first = load(hub, tmp_path / "user", commit, clip)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1])["text"] == tiny.model(llm="qwen3").transcribe(str(clip)).text

    # The branch moves on: who pinned the commit keeps what it had, who names the branch gets the new one.
    done = push(hub, moved(folder, tmp_path / "moved"), tmp_path / "pusher")
    assert done.returncode == 0 and hub.repositories[REPO]["refs"]["main"] != commit
    again, newest = (load(hub, tmp_path / "user", revision, clip) for revision in (commit, "main"))
    assert again.stdout == first.stdout
    assert json.loads(newest.stdout.splitlines()[-1])["norm"] == pytest.approx(
        3.0 * tiny.model(llm="qwen3").config.alignment_hidden_size
    )

    # Without a Hub the cache is enough.
    asked = len(hub.requests)
    offline = load(hub, tmp_path / "user", commit, clip, HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout, offline.stderr
    assert len(hub.requests) == asked


def test_a_download_that_breaks_off_goes_on_or_fails_clearly(hub, folder, tmp_path):
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, tiny.noise(1.0), 16000)
    assert push(hub, folder, tmp_path / "pusher").returncode == 0
    hub.cuts = 10**9
    broken = load(hub, tmp_path / "user", "main", clip, HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert broken.returncode != 0 and not broken.stdout and "Error" in broken.stderr.splitlines()[-1]
    hub.cuts = 1
    whole = load(hub, tmp_path / "user", "main", clip)
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout.splitlines()[-1])["text"] == tiny.model(llm="qwen3").transcribe(str(clip)).text


def test_a_push_that_is_killed_leaves_the_repository_whole(hub, folder, tmp_path):
    assert push(hub, folder, tmp_path / "pusher").returncode == 0
    before = dict(hub.repositories[REPO]["refs"])
    hub.held.clear()
    command = [sys.executable, "-m", "voxlm_hub_export.push", str(moved(folder, tmp_path / "moved")), REPO]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(hub, tmp_path / "pusher"))
    asked, deadline = len(hub.requests), time.monotonic() + HANGS_AFTER_S
    while not any(line.startswith("PUT") for line in hub.requests[asked:]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.held.set()
    assert hub.repositories[REPO]["refs"] == before
    done = push(hub, tmp_path / "moved", tmp_path / "pusher")
    assert done.returncode == 0, done.stderr
    commit = hub.repositories[REPO]["refs"]["main"]
    assert commit != before["main"]
    sent = hub.repositories[REPO]["commits"][commit]
    assert all(sent[path.name] == path.read_bytes() for path in (tmp_path / "moved").iterdir())


def test_a_revision_that_is_not_there_is_named(hub, folder, tmp_path):
    assert push(hub, folder, tmp_path / "pusher", "--tag", "v1").returncode == 0
    missing = load(hub, tmp_path / "user", "v2", "clip.wav")
    assert missing.returncode != 0 and "v2" in missing.stderr
