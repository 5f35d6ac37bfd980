"""What goes to the Hub, and what never does. The Hub itself is played by a list of calls."""

import pickle
import zipfile
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from voxlm_hub_export.export import export
from voxlm_hub_export.push import files_to_push, main, push


@pytest.fixture
def folder(tmp_path):
    export(tiny.model(), tmp_path / "model")
    return tmp_path / "model"


class Hub:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return SimpleNamespace(oid="c0ffee")

        return call


def test_one_commit_on_a_branch_with_a_tag(folder):
    hub = Hub()
    assert push(folder, "me/model", private=True, branch="next", message="better", tag="v2", api=hub) == "c0ffee"
    assert [name for name, *_ in hub.calls] == ["create_repo", "create_branch", "upload_folder", "create_tag"]
    assert hub.calls[0][2] == {"private": True, "exist_ok": True}
    assert hub.calls[2][2] == {
        "repo_id": "me/model",
        "folder_path": folder,
        "revision": "next",
        "commit_message": "better",
    }
    assert hub.calls[3][2] == {"tag": "v2", "revision": "c0ffee"}


def test_a_dry_run_lists_all_files_and_sends_none(folder, capsys, monkeypatch):
    monkeypatch.setattr("voxlm_hub_export.push.HfApi", None)
    assert main([str(folder), "me/model", "--dry-run"]) == 0
    listed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "deep/state.PKL"])
def test_pickles_stay_at_home(folder, name, capsys):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    hub = Hub()
    with pytest.raises(ValueError, match="may hold a pickle"):
        push(folder, "me/model", api=hub)
    assert not hub.calls
    assert main([str(folder), "me/model"]) == 1 and "voxlm-push: " in capsys.readouterr().err


def test_pickles_under_another_name_stay_at_home(folder):
    file = folder / "weights.dat"
    for save in (lambda: torch.save({"w": torch.zeros(2)}, file), lambda: file.write_bytes(pickle.dumps([1, 2]))):
        save()
        with pytest.raises(ValueError, match="may hold a pickle"):
            files_to_push(folder)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "nothing to run")
    assert file in files_to_push(folder)


def test_tokens_large_files_and_links_stay_at_home(folder, tmp_path, monkeypatch):
    (folder / ".env").write_text("TOKEN=hf_" + "a" * 34)
    with pytest.raises(ValueError, match="access token .hf_aaa"):
        files_to_push(folder)
    (folder / ".env").rename(folder / "run.sh")
    with pytest.raises(ValueError, match="access token"):
        files_to_push(folder)
    (folder / "run.sh").unlink()
    monkeypatch.setattr("voxlm_hub_export.push.LARGEST_FILE", 100)
    with pytest.raises(ValueError, match="the Hub takes 100 a file"):
        files_to_push(folder)
    monkeypatch.undo()
    (tmp_path / "secret.txt").write_text("s")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="outside the folder"):
        files_to_push(folder)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        files_to_push(tmp_path)
