"""
Upload a checkpoint folder to the Hub.

    voxlm-push FOLDER REPO_ID [--private] [--branch B] [--message M] [--tag T] [--dry-run]

Refuses to upload a folder that holds pickles, an access token, or files over the Hub's limits.
"""

import argparse
import re
import sys
import zipfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError


# The Hub's limits: https://huggingface.co/docs/hub/repositories-recommendations
LARGEST_FILE, MOST_FILES = 50 * 10**9, 100_000
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
# How a binary pickle starts: the opcode PROTO and the number of its protocol.
PICKLE_STARTS = {bytes([0x80, protocol]) for protocol in range(2, 6)}
# How the Hub's access tokens look; 30 letters or more, so that no shorter name with this prefix matches. Chosen by
# hand, not tuned.
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


def files_to_push(folder: Path) -> list[Path]:
    """
    The files of a checkpoint folder to upload, in order.

    Raises:
        ValueError: naming a file that must not be uploaded, or one that is missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a checkpoint; write one with voxlm-export")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    if len(files) > MOST_FILES:
        raise ValueError(f"{folder} holds {len(files):,} files, the Hub takes {MOST_FILES:,}")
    for path in files:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link to {path.resolve()}, outside the folder")
        if path.suffix.lower() in PICKLES or is_pickle(path):
            raise ValueError(
                f"{path} may hold a pickle, which runs code when it is loaded; a checkpoint is safetensors only"
            )
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes, the Hub takes {LARGEST_FILE:,} a file; export with smaller "
                "shards"
            )
        found = None if path.suffix == ".safetensors" else TOKEN.search(path.read_bytes())
        if found:
            raise ValueError(
                f"{path} holds what looks like an access token ({found[0][:6].decode()}...); remove and revoke it"
            )
    return files


def is_pickle(path: Path) -> bool:
    """
    Whether a file, whatever its name, starts like a pickle or is an archive that contains one, as `torch.save` writes.
    """
    with open(path, "rb") as file:
        if file.read(2) in PICKLE_STARTS:
            return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).suffix.lower() in PICKLES for name in archive.namelist())


def push(
    folder: Path,
    repo_id: str,
    private: bool = False,
    branch: str | None = None,
    message: str = "Upload VoxLM checkpoint",
    tag: str | None = None,
    api: HfApi | None = None,
) -> str:
    """
    Upload a folder as one commit; files that the Hub already has are not sent again.

    Returns:
        the commit's id, to pin with `revision=`.

    Raises:
        ValueError: for a folder that must not be uploaded (see `files_to_push`).
        HfHubHTTPError: for what the Hub refuses.
    """
    files_to_push(folder)
    api = api or HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=branch, commit_message=message).oid
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
    parser.add_argument("--dry-run", action="store_true", help="only list the files that would be uploaded")
    arguments = parser.parse_args(argv)
    try:
        if arguments.dry_run:
            for path in files_to_push(arguments.folder):
                print(f"{path.stat().st_size:>14,}  {path.relative_to(arguments.folder)}")
            return 0
        commit = push(
            arguments.folder,
            arguments.repo_id,
            arguments.private,
            arguments.branch,
            arguments.message,
            arguments.tag,
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        print(f"voxlm-push: {error}", file=sys.stderr)
        return 1
    print(f'AutoModel.from_pretrained("{arguments.repo_id}", trust_remote_code=True, revision="{commit}")')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
