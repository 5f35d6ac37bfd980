"""Checkpoints and results that survive a kill at any moment: what is whole is found, what is not is left out."""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from voxlm_hf.app import files


# The files without which the Trainer cannot continue as if nothing had happened, whatever the number of processes.
NEEDED = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt")
# Set by `accelerate launch`, which tells `TrainingArguments` nothing of it.
SHARDED_BY_LAUNCHER = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def checkpoints_of(folder: Path) -> list[Path]:
    """The folders of a stage's checkpoints, in the order of their steps."""
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob("*") if path.is_dir()}
    found = [path for path, step in steps.items() if step.isdecimal()]
    return sorted(found, key=lambda path: int(steps[path]))


def shapes_of(weights) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a safetensors file that is open."""
    return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}


def check_shapes(path: Path, found: dict[str, tuple], needed: dict[str, tuple], others=()):
    """
    Raises:
        ValueError: naming the first of the `needed` tensors that `found` in `path` lacks or has in another shape, or the
            first that is neither needed nor one of the `others` that may be there.
    """
    lacking, left_over = sorted(needed.keys() - found.keys()), sorted(found.keys() - needed.keys() - set(others))
    other = [name for name in sorted(needed.keys() & found.keys()) if needed[name] != found[name]]
    if lacking:
        difference = f"lacks what the model trains, such as {lacking[0]}"
    elif other:
        difference = f"has {other[0]} of the shape {found[other[0]]}, the model of {needed[other[0]]}"
    elif left_over:
        difference = f"has what the model does not train, such as {left_over[0]}"
    else:
        return
    raise ValueError(f"{path} {difference}; was the recipe changed? Remove it, or choose another `output`")


class WriteError(OSError):
    """A file cannot be written, for instance because the disk is full."""


# How `torch.save`, which raises nothing better, begins what it says of a file that it cannot write or has written in part.
TORCH_WRITE_ERRORS = ("basic_ios::clear", "PytorchStreamWriter failed", "[enforce fail at inline_container.cc")
WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def cannot_write(error: Exception) -> bool:
    """Whether an error says that a file could not be written."""
    if isinstance(error, OSError):
        return error.errno in WRITE_ERRNOS
    if isinstance(error, SafetensorError):
        return "os error" in str(error)
    return str(error).startswith(TORCH_WRITE_ERRORS)


@contextmanager
def naming_unwritten_files(folders: list[Path], path: Path | None = None):
    """
    Say of the errors of all libraries that write into `folders`, or to `path`, which file it was.

    Raises:
        WriteError: when a file cannot be written. Where neither `path` nor the library says which, it is the newest of
            `torch.save` and of others; safetensors leaves none behind, but a change of its folder.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not cannot_write(error):
            raise
        path = getattr(error, "filename2", None) or getattr(error, "filename", None) or path
        if path is None:
            is_safetensors = isinstance(error, SafetensorError)
            found = [*folders, *(entry for folder in folders for entry in folder.rglob("*"))]
            found = [entry for entry in found if (entry.is_dir() if is_safetensors else entry.is_file())]
            path = max(found, key=lambda entry: entry.stat().st_mtime_ns, default=folders[0])
            path = f"{path}/*.safetensors" if is_safetensors else path
        reason = str(error).splitlines()[0]
        raise WriteError(f"{path} could not be written: {reason}. Free some space; the same command resumes") from error


@contextmanager
def written_whole(path: Path):
    """
    As `voxlm_hf.app.files.written_whole`.

    Raises:
        WriteError: when it cannot be written.
    """
    with naming_unwritten_files([], path), files.written_whole(path) as unfinished:
        yield unfinished


def last_whole_checkpoint(folder: Path, arguments: TrainingArguments) -> tuple[Path | None, list[str]]:
    """
    The last checkpoint of a stage that can be resumed exactly. Changes nothing.

    Args:
        folder (`Path`): of the stage; it need not exist.
        arguments ([`TrainingArguments`]): of the stage, for the files that it saves.

    Returns:
        the path of the checkpoint, `None` without any, and a line about each later one, saying what is wrong with it.
    """
    damages = []
    for path in reversed(checkpoints_of(folder)):
        damage = damage_of(path, arguments)
        if damage is None:
            return path, damages
        damages.append(f"{path}: {damage}")
    return None, damages


def remove_checkpoints_after(folder: Path, last: Path | None):
    """Remove the checkpoints after `last` (all without one), so that none is taken for a newer one later."""
    paths = checkpoints_of(folder)
    for path in paths[paths.index(last) + 1 if last else 0 :]:
        shutil.rmtree(path)


def damage_of(checkpoint: Path, arguments: TrainingArguments) -> str | None:
    """What keeps a checkpoint from being resumed, `None` for a whole one."""
    # Sharded weights and optimisers have files of other names.
    sharded = arguments.fsdp or arguments.deepspeed or any(os.environ.get(name) for name in SHARDED_BY_LAUNCHER)
    needed = NEEDED[:1] if sharded else NEEDED
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if not sharded:
        missing += missing_random_states(checkpoint, arguments.world_size)
    if missing:
        return f"{missing[0]} is missing"
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not WHOLE.get(path.suffix, lambda path: True)(path):
            return f"{path.name} is cut off or damaged"
    return None


def missing_random_states(checkpoint: Path, processes: int) -> list[str]:
    """
    The files with the states of the random generators that a checkpoint lacks; none where another number of processes
    has written all of its own, since the Trainer then continues without them.
    """
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{number}.pth" for number in range(processes)]
    missing = [name for name in names if not (checkpoint / name).is_file()]
    by_others = any(path.name not in names for path in checkpoint.glob("rng_state*.pth"))
    return [] if by_others and len(missing) == len(names) else missing


def is_whole_json(path: Path) -> bool:
    """Whether a file is JSON to its end."""
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def is_whole_zip(path: Path) -> bool:
    """Whether a file of `torch.save`, a zip archive with check sums, is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False


def is_whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


WHOLE: dict[str, Callable[[Path], bool]] = {
    ".json": is_whole_json,
    ".safetensors": is_whole_safetensors,
    ".pt": is_whole_zip,
    ".pth": is_whole_zip,
    ".bin": is_whole_zip,
}
