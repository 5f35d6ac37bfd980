"""
Upload a checkpoint folder to the Hub.

    voxlm-push FOLDER REPO_ID [--private] [--branch B] [--message M] [--tag T] [--include FILE] [--dry-run]

Uploads the files that a checkpoint consists of. Any other file in the folder is named, and nothing is uploaded: move it
away, or add it with --include. Refuses pickles, archives, links, files that hold a key or an access token, configs
that name a path of this machine, and files over the Hub's limits.
"""

import argparse
import glob
import json
import os
import pickletools
import re
import sys
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from voxlm_hf.checkpoint_voxlm import INDEX_ENDING, shards_of

from .export import CODE_FILES
from .legacy import ORIGINAL_DECODING_FILE


# The Hub's limits: https://huggingface.co/docs/hub/repositories-recommendations
LARGEST_FILE, MOST_FILES = 50 * 10**9, 100_000
# What a checkpoint consists of, all of it at the top of its folder: configs, tokenizers of the kinds that transformers writes,
# the remote code, and what the Hub itself knows. Beside these, safetensors and their index.
CHECKPOINT_FILES = {
    *(
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        ORIGINAL_DECODING_FILE,
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", ".gitattributes"),
    *CODE_FILES,
}
WEIGHTS = re.compile(r"[\w.-]+\.safetensors(\.index\.json)?", re.ASCII)
# Folders that git and the Hub's client keep in a downloaded checkpoint; the client never uploads them.
NOT_CONTENT = (".git", ".cache")
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
# How a binary pickle starts: the opcode PROTO and the number of its protocol.
PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
# How zip (and torch.save), gzip, bzip2, xz, zstandard and 7z start; tar has its mark at byte 257.
ARCHIVE_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
# What else tar writes at its byte 257, found anywhere: an archive may have something before it.
TAR_MARKS = (b"ustar\x0000", b"ustar  \x00")
# What may be between a setting's name and its value, in JSON, YAML, Python, a shell or an ini file.
IS = rb"""["'\s=:,]{1,8}"""
# How keys and tokens begin, what they are, and how they go on: those of the Hub, AWS, GitHub, GitLab, npm, Google, OpenAI and
# others, Stripe, Slack, W&B; settings, logins and addresses with a password; and private keys. Their lengths are at most what
# the issuers write, and such that no other word matches.
SECRETS = {
    b"hf_": ("an access token", re.compile(rb"[A-Za-z0-9]{30}|(oauth|jwt)_[A-Za-z0-9_.-]{20}")),
    b"api_org_": ("an access token", re.compile(rb"[A-Za-z0-9]{30}")),
    b"eyJ": ("an access token", re.compile(rb"[A-Za-z0-9_-]{8,500}\.eyJ[A-Za-z0-9_-]{8}")),
    **dict.fromkeys((b"AKIA", b"ASIA"), ("an AWS key", re.compile(rb"[A-Z0-9]{16}(?![A-Za-z0-9])"))),
    **dict.fromkeys(
        (b"aws_secret_access_key", b"AWS_SECRET_ACCESS_KEY", b"ecretAccessKey"),
        ("an AWS key", re.compile(IS + rb"[A-Za-z0-9/+]{40}")),
    ),
    **dict.fromkeys(
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
        ("a GitHub token", re.compile(rb"[A-Za-z0-9_]{36}")),
    ),
    b"glpat-": ("a GitLab token", re.compile(rb"[A-Za-z0-9_-]{20}")),
    b"npm_": ("an npm token", re.compile(rb"[A-Za-z0-9]{36}")),
    b"AIza": ("a Google key", re.compile(rb"[A-Za-z0-9_-]{35}")),
    b"sk-": ("an API key", re.compile(rb"(?<![A-Za-z0-9]sk-)[A-Za-z0-9_-]{32}")),  # not within "task-"
    **dict.fromkeys(
        (b"sk_live_", b"sk_test_", b"rk_live_", b"rk_test_"), ("an API key", re.compile(rb"[A-Za-z0-9]{16}"))
    ),
    b"_API_KEY": ("an API key", re.compile(IS + rb"(?=[A-Za-z_-]{0,40}[0-9])[A-Za-z0-9_-]{20}")),
    b"wandb_v1_": ("an API key", re.compile(rb"[A-Za-z0-9_]{30}")),
    b"xox": ("a Slack token", re.compile(rb"[abeoprs]-[A-Za-z0-9-]{20}")),
    b"://": ("an address with a password", re.compile(rb"[\w.~%+-]{0,100}:[\w.~%!$&*+,;=?#-]{1,200}@[\w\[]")),
    b"machine": (
        "a login with a password",
        re.compile(rb"\s+\S{1,200}\s+((login|user|account)\s+\S{1,200}\s+){0,2}password\s+\S"),
    ),
    **dict.fromkeys((b"-----BEGIN ", b"---- BEGIN "), ("a private key", re.compile(rb"[A-Z0-9 ]{0,30}PRIVATE KEY"))),
    b"PuTTY-User-Key-File-": ("a private key", re.compile(rb"[0-9]")),
}
# A place on this machine, as the value of `_name_or_path` and its like; strings are a line each.
LOCAL_PLACE = re.compile(rb"^(\w*name_or_path)\n((?:/|~|\\\\|file:|[A-Za-z]:[\\/])[^\n]*)", re.MULTILINE)
# Files are searched in blocks that overlap by more than any of these is long, also at four bytes a character.
BLOCK, OVERLAP = 1 << 24, 1 << 12


def files_to_push(folder: Path, include: Collection[str] = ()) -> list[Path]:
    """
    The files of a checkpoint folder to upload, in order.

    Args:
        include: paths within the folder, with `/`, of files to upload that are not part of a checkpoint.

    Raises:
        ValueError: naming all files that are not part of a checkpoint, a file that must not be uploaded, or one that is
            missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a checkpoint; write one with voxlm-export")
    paths = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in NOT_CONTENT]
    files = sorted(path for path in paths if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(folder).as_posix() for path in files]
    missing = [name for name in include if name not in names]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]!r}, which --include names")
    if len(files) > MOST_FILES:
        raise ValueError(f"{folder} holds {len(files):,} files, the Hub takes {MOST_FILES:,}")
    for path, name in zip(files, names, strict=True):
        if secret := secret_in(os.fsencode(name)):
            raise ValueError(
                f"The name of a file in {path.parent} holds what looks like {secret}; rename it, and revoke it"
            )
        check_kind(path)
    others = [n for n in names if n not in CHECKPOINT_FILES and not WEIGHTS.fullmatch(n) and n not in include]
    if others:
        shown = ", ".join(map(repr, others[:10])) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        raise ValueError(
            f"Nothing was uploaded: {folder} holds {shown}, which is not part of a checkpoint. Move it away, or add it with "
            "--include FILE"
        )
    for path in files:
        check_content(path)
    return files


def check_kind(path: Path):
    """Raise a `ValueError` for a link, what is no plain file, a pickle, an archive, and a file that is too large."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {path.resolve()}; put the file itself there")
    if not path.is_file():
        raise ValueError(f"{path} is no plain file")
    if path.suffix.lower() in PICKLES or starts_with(path, PICKLE_STARTS) or is_text_pickle(path):
        raise ValueError(
            f"{path} may hold a pickle, which runs code when it is loaded; a checkpoint is safetensors only"
        )
    if starts_with(path, ARCHIVE_STARTS) or starts_with(path, (b"ustar",), at=257) or holds_archive(path):
        raise ValueError(f"{path} is an archive, which may hold a pickle or a secret; put its content there instead")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, the Hub takes {LARGEST_FILE:,} a file; export with smaller shards"
        )


def starts_with(path: Path, starts: tuple[bytes, ...], at: int = 0) -> bool:
    """Whether the bytes of a file at a place are one of `starts`."""
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(max(map(len, starts))).startswith(starts)


def is_text_pickle(path: Path) -> bool:
    """Whether a file that is not safetensors is a pickle of protocol 0 or 1, which nothing marks: it can be read to its end."""
    if path.suffix == ".safetensors":
        return False
    try:
        with open(path, "rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 2  # two letters may be a pickle by chance
    except ValueError:
        return False


def holds_archive(path: Path) -> bool:
    """Whether a file that is not safetensors is a zip or tar archive with something before it."""
    if path.suffix == ".safetensors":
        return False
    return zipfile.is_zipfile(path) or any(mark in path.read_bytes() for mark in TAR_MARKS)


def check_content(path: Path):
    """Raise a `ValueError` for a file that holds a secret, and for one that is not the safetensors or JSON it is called."""
    for text in texts_of(path):
        if secret := secret_in(text):
            raise ValueError(f"{path} holds what looks like {secret}; remove and revoke it")
    if path.name.endswith(INDEX_ENDING):
        shards_of(path)


def secret_in(text: bytes) -> str | None:
    """What the first secret in a text is, with its first letters; `None` if there is none."""
    for start, (kind, rest) in SECRETS.items():
        place = text.find(start)  # much faster than a regular expression, in hundreds of megabytes of weights
        while place >= 0:
            if rest.match(text, place + len(start)):
                return f"{kind} ({text[place : place + 6].decode()}...)"
            place = text.find(start, place + 1)
    return None


def texts_of(path: Path) -> Iterator[bytes]:
    """
    What is written in a file: its bytes in blocks, the same without zeros (as UTF-16 and UTF-32 have between letters) and, of
    JSON and of the header of safetensors, the strings without escapes.

    Raises:
        ValueError: for safetensors and JSON that cannot be read, and for JSON that names a place on this machine.
    """
    with open(path, "rb") as file:
        before = b""
        while block := file.read(BLOCK):
            yield before + block
            if b"\0" in block:
                yield (before + block).replace(b"\0", b"")
            before = block[-OVERLAP:]
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np"), open(path, "rb") as file:
                yield strings_of(file.read(int.from_bytes(file.read(8), "little")))
        elif path.suffix.lower() == ".json":
            strings = strings_of(path.read_bytes())
            yield strings
            if place := LOCAL_PLACE.search(strings):
                name, value = (part.decode() for part in place.groups())
                raise LocalPlaceError(f"{path} has the {name} {value!r}, a path of this machine; remove it")
    except LocalPlaceError:
        raise
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be searched for secrets") from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no {path.suffix.removeprefix('.')} file, or is truncated: {error}") from error


class LocalPlaceError(ValueError):
    """A config that names a place on this machine."""


def strings_of(text: bytes) -> bytes:
    """
    All strings of a JSON text, a line each and in their order: names too, also those that an object has twice, and the strings
    of JSON that is in a string.

    Raises:
        ValueError: for what is no JSON.
        RecursionError: for JSON that is nested deeply.
    """
    strings, left = [], [json.loads(text, object_pairs_hook=list)]
    while left:
        value = left.pop()
        if isinstance(value, (list, tuple)):
            left.extend(reversed(value))
        elif isinstance(value, str):
            strings.append(value)
            if value.lstrip()[:1] in ("{", "[", '"'):
                try:
                    left.append(json.loads(value, object_pairs_hook=list))
                except ValueError:  # it only begins like JSON
                    continue
    return "\n".join(strings).encode(errors="replace")


def push(
    folder: Path,
    repo_id: str,
    private: bool = False,
    branch: str | None = None,
    message: str = "Upload VoxLM checkpoint",
    tag: str | None = None,
    api: HfApi | None = None,
    include: Collection[str] = (),
) -> str:
    """
    Upload a folder as one commit; files that the Hub already has are not sent again.

    Args:
        include: see `files_to_push`.

    Returns:
        the commit's id, to pin with `revision=`.

    Raises:
        ValueError: for a folder that must not be uploaded (see `files_to_push`).
        HfHubHTTPError: for what the Hub refuses.
    """
    # As patterns, in which no name of a checkpoint's file has a meaning but its own.
    names = [glob.escape(path.relative_to(folder).as_posix()) for path in files_to_push(folder, include)]
    api = api or HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=branch, commit_message=message, allow_patterns=names
    ).oid
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit)
    return commit


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo_id")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--branch")
    parser.add_argument("--message", default="Upload VoxLM checkpoint")
    parser.add_argument("--tag", help="name for the commit")
    parser.add_argument("--include", metavar="FILE", action="append", default=[], help="upload this file of FOLDER too")
    parser.add_argument("--dry-run", action="store_true", help="only list the files that would be uploaded")
    arguments = parser.parse_args(argv)
    try:
        if arguments.dry_run:
            for path in files_to_push(arguments.folder, arguments.include):
                print(f"{path.stat().st_size:>14,}  {path.relative_to(arguments.folder)}")
            return 0
        commit = push(
            arguments.folder,
            arguments.repo_id,
            arguments.private,
            arguments.branch,
            arguments.message,
            arguments.tag,
            include=arguments.include,
        )
    except (OSError, ValueError, HfHubHTTPError, httpx2.TransportError) as error:
        print(f"voxlm-push: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f'AutoModel.from_pretrained("{arguments.repo_id}", trust_remote_code=True, revision="{commit}")')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
