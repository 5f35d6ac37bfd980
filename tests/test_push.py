"""What goes to the Hub, and what never does. The Hub itself is played by a list of calls."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

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
        "allow_patterns": sorted(path.name for path in folder.iterdir()),
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


def zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "KEY=1")
    return content.getvalue()


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return content.getvalue()


def torch_saved() -> bytes:
    content = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, content)
    return content.getvalue()


@pytest.mark.parametrize("name", ["README.md", "vocab.json", "deep/other.dat"])
@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps([1], protocol) for protocol in range(6)),
        b"text\n" + zipped("a.pkl"),
        b"text\n" + tarred(),
        torch_saved(),
        zipped("a.txt"),
        zipped("a.pkl"),
        gzip.compress(b"x", mtime=0),
        tarred(),
    ],
    ids=range(13),
)
def test_pickles_and_archives_stay_at_home_under_any_name(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} (may hold a pickle|is an archive)"):
        files_to_push(folder, include=[name])


OTHERS = [
    ".env",
    "id_rsa",
    "credentials",
    "notes.txt",
    "run.sh",
    "Config.json",
    "MODEL.SAFETENSORS",
    "config.json\n",
    "a*b",
]
OTHERS += [
    "modeling_voxlm.py.bak",
    "optimizer.safetensors.txt",
    "sub/config.json",
    ".ssh/id_ed25519",
    "__pycache__/x.pyc",
]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_part_of_a_checkpoint_is_named_and_nothing_is_uploaded(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('"API=secret"')
    hub = Hub()
    with pytest.raises(ValueError, match="not part of a checkpoint") as error:
        push(folder, "me/model", api=hub)
    assert repr(name) in str(error.value) and not hub.calls
    push(folder, "me/model", api=hub, include=[name])
    assert len(hub.calls[1][2]["allow_patterns"]) == sum(path.is_file() for path in folder.rglob("*"))


def test_only_files_that_are_there_can_be_included(folder, capsys):
    assert main([str(folder), "me/model", "--include", "../other.txt", "--dry-run"]) == 1
    assert "has no '../other.txt'" in capsys.readouterr().err


def test_a_folder_below_git_is_looked_through_and_git_in_the_folder_left_out(folder, tmp_path):
    below = tmp_path / ".git" / "model"
    below.parent.mkdir()
    folder.rename(below)
    count = len(files_to_push(below))
    (below / ".git").mkdir()
    (below / ".git" / "config").write_text("[remote]")
    assert len(files_to_push(below)) == count
    (below / "id_rsa").write_text("x")
    with pytest.raises(ValueError, match="'id_rsa'"):
        files_to_push(below)


# Made up, and put together here so that no scanner takes this file for one that holds them.
SECRETS = ["hf_" + "a" * 34, "AKIA" + "A1" * 8, "ghp_" + "b" * 36, "AIza" + "c" * 35, "sk-" + "d" * 48]
SECRETS += ["hf_" + "oauth_" + "f" * 40, "hf_" + "jwt_" + "f" * 40, "api_" + "org_" + "g" * 34, "AKIA" + "A1" * 8 + "_"]
SECRETS += ["aws_secret_" + "access_key = " + "h/" * 20, "glpat" + "-" + "i" * 20, "npm" + "_" + "j" * 36]
SECRETS += ["sk_" + "live_" + "k" * 24, "rk_" + "test_" + "k" * 24, "https://me:" + "pass@example.org"]
SECRETS += ["machine api.wandb.ai\n  login user\n  pass" + "word " + "1" * 40, "WANDB_" + "API_KEY=" + "0a" * 20]
SECRETS += ["eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjMifQ.c2ln", "PuTTY-User-" + "Key-File-3: ssh-ed25519"]
SECRETS += ["---- BEGIN " + "SSH2 ENCRYPTED PRIVATE KEY ----", "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----"]
SECRETS += ["xoxb-" + "1" * 24, "-----BEGIN " + "OPENSSH PRIVATE KEY-----", "github_pat_" + "e" * 60]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "utf-32"])
def test_secrets_stay_at_home_in_every_encoding(folder, secret, encoding):
    (folder / "README.md").write_bytes(f"The key is {secret}.".encode(encoding))
    with pytest.raises(ValueError, match="README.md holds what looks like a"):
        files_to_push(folder)


def test_secrets_in_json_and_safetensors_stay_at_home(folder):
    (folder / "vocab.json").write_text(json.dumps([f"the key:\n{SECRETS[4]}"]))
    with pytest.raises(ValueError, match="vocab.json holds what looks like an API key"):
        files_to_push(folder)
    (folder / "vocab.json").unlink()
    token, config = SECRETS[0], json.loads((folder / "config.json").read_text())
    escaped = json.dumps({**config, "prompt": token}).replace("hf_a", "\\u0068f_a")
    assert token not in escaped
    (folder / "config.json").write_text(escaped)
    with pytest.raises(ValueError, match="config.json holds what looks like an access token .hf_aaa"):
        files_to_push(folder)
    (folder / "config.json").write_text(json.dumps(config))
    file = next(folder.glob("encoder*.safetensors"))
    tensors = load_file(file)
    hidden = torch.tensor(list(f"x {token}".encode()), dtype=torch.uint8)
    for content, metadata in ((tensors, {"by": token}), ({**tensors, token: hidden[:1]}, {}), ({"t": hidden}, {})):
        save_file(content, file, metadata)
        with pytest.raises(ValueError, match=f"{file.name} holds what looks like an access token"):
            files_to_push(folder)
    file.write_text("PASSWORD=1")
    with pytest.raises(ValueError, match=f"{file.name} is no safetensors file"):
        files_to_push(folder)


@pytest.mark.parametrize(
    "content",
    [
        '{"a": "\\u0068f_%s", "a": 1}',  # the second one alone is seen by most readers
        json.dumps({"a": json.dumps({"b": json.dumps(["hf_%s"])})}).replace("hf_", "\\u0068f_"),
        '{"a": {"\\u0068f_%s": 1}}',
        json.dumps({"aws_secret_access_key": "%s%s"}).replace("_secret", "\\u005fsecret"),
    ],
)
def test_secrets_are_found_however_json_writes_them(folder, content):
    (folder / "vocab.json").write_text(content.replace("%s", "ab" * 17))
    with pytest.raises(ValueError, match="vocab.json holds what looks like an"):
        files_to_push(folder)


def test_secrets_in_names_stay_at_home(folder):
    (folder / f"{SECRETS[0]}.safetensors").write_bytes((folder / "trained.safetensors").read_bytes())
    with pytest.raises(ValueError, match="The name of a file .* looks like an access token .hf_aaa...."):
        files_to_push(folder)


def test_json_nested_deeply_is_refused_in_one_line(folder):
    (folder / "vocab.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="vocab.json is nested too deeply"):
        files_to_push(folder)


@pytest.mark.parametrize("place", ["/home/me/base", "~/base", "C:\\base", "file:///base"])
@pytest.mark.parametrize("part", ["audio_config", None])
def test_paths_of_this_machine_stay_at_home(folder, place, part):
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config)["_name_or_path"] = place
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json has the _name_or_path .*, a path of this machine"):
        files_to_push(folder)
    (config[part] if part else config)["_name_or_path"] = "openai/whisper-base"
    (folder / "config.json").write_text(json.dumps(config))
    files_to_push(folder)


def test_an_index_of_weights_elsewhere_stays_at_home(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../x.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the checkpoint's folder"):
        files_to_push(folder)


@pytest.mark.parametrize(
    "text",
    [
        "see https://huggingface.co:443/me@home and mailto:me@example.org, http://localhost:8000/x",
        "machine learning with a login and password protected pages",
        "WANDB_API_KEY=your-key-here and aws_secret_access_key in the environment; task-oriented-dialogue-with-speech-models",
    ],
)
def test_texts_about_secrets_are_no_secrets(folder, text):
    (folder / "README.md").write_text(text)
    files_to_push(folder)


def test_a_secret_across_two_blocks_is_found(folder, monkeypatch):
    monkeypatch.setattr("voxlm_hub_export.push.BLOCK", 5000)
    (folder / "README.md").write_text("x" * 4979 + " " + SECRETS[0])
    with pytest.raises(ValueError, match="access token"):
        files_to_push(folder)


def test_large_files_links_and_pipes_stay_at_home(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("voxlm_hub_export.push.LARGEST_FILE", 100)
    with pytest.raises(ValueError, match="the Hub takes 100 a file"):
        files_to_push(folder)
    monkeypatch.undo()
    (tmp_path / "secret.txt").write_text("s")
    (tmp_path / "more").mkdir()
    for target in (tmp_path / "secret.txt", folder / "config.json", tmp_path / "more", tmp_path / "nowhere"):
        (folder / "README.md").symlink_to(target)
        with pytest.raises(ValueError, match="README.md is a link to"):
            files_to_push(folder)
        (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    with pytest.raises(ValueError, match="no plain file"):
        files_to_push(folder)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        files_to_push(tmp_path)
