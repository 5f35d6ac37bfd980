"""Files and folders that the commands write: where they go, complete or not at all."""

import ctypes
import os
import secrets
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


# Endings beside what is written: the new content, and an old folder where it has to be moved away first.
UNFINISHED, MOVED_AWAY = ".unfinished", ".old"


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """
    A path beside `path` to write a file to, which moves to its place at the end of the block, so that `path` is complete
    or, after any error, what it was before.

    Raises:
        OSError: naming the file, when it cannot be written.
    """
    target = Path(os.path.realpath(path))
    # A name of its own, so that neither another process nor a name of greatest length is in the way.
    unfinished = target.with_name(f".{secrets.token_hex(8)}{UNFINISHED}")
    try:
        yield unfinished
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise


def write_atomically(path: str | Path, content: bytes):
    """Write a file by `written_whole`."""
    # Closing the file reports what a buffer could not be written for.
    with written_whole(path) as unfinished, open(unfinished, "xb") as file:
        file.write(content)


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, deleted afterwards, which is locked as long as this process lives."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=UNFINISHED, dir=folder.parent))
    handle = None if fcntl is None else os.open(unfinished, os.O_RDONLY)
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def tidy(folder: Path):
    """Bring back what a killed process had moved away from `folder`, and delete what it left beside it."""
    if not folder.parent.is_dir():
        return
    beside = [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}-") and path.is_dir()]
    for path in (path for path in beside if path.name.endswith(MOVED_AWAY)):
        if not folder.exists() and (path / "folder").is_dir():
            os.rename(path / "folder", folder)
        shutil.rmtree(path, ignore_errors=True)
    for path in (path for path in beside if path.name.endswith(UNFINISHED) and fcntl is not None):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # of a process that is under way
        finally:
            os.close(handle)


def move_into_place(new: Path, folder: Path):
    """
    Move the finished folder `new` to `folder`. The old content is then where `new` was, or deleted.

    At every moment a whole content is at `folder`. Only where the system cannot exchange two folders, there is none between
    two renames; `tidy` brings the old one back after a kill just then.
    """
    new.chmod(0o755)  # mkdtemp made it private
    if not folder.exists():
        os.rename(new, folder)
        return
    if exchange(new, folder):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=MOVED_AWAY, dir=folder.parent))
    os.rename(folder, old / "folder")
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old / "folder", folder)
        raise
    finally:
        shutil.rmtree(old)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, by Linux' renameat2; whether that was possible here."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, exchange_flag = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h>
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange_flag) == 0


def output_paths(files: list[str], output_dir: Path, suffix: str) -> list[Path]:
    """
    Where each file's output goes, whatever the order of the files.

    Outputs are named after the stems of the files. Files whose stems clash keep their folders, as seen from the deepest folder
    that all files share, and where that is not enough, their whole names.

    Args:
        files: paths, or "-" for standard input, whose output is named "stdin".
        suffix: format of the outputs, without a dot.
    """
    places = [_place(file) for file in files]
    shared = os.path.commonpath([place.parent for place in places])

    def name(place: Path, detail: int) -> Path:
        folder = place.parent.relative_to(shared) if detail else Path()
        return folder / f"{place.name if detail > 1 else place.stem}.{suffix}"

    details = dict.fromkeys(places, 0)
    while True:
        groups = defaultdict(list)
        for place, detail in details.items():
            groups[name(place, detail)].append(place)
        clashing = [place for group in groups.values() if len(group) > 1 for place in group if details[place] < 2]
        if not clashing:
            return [output_dir / name(place, details[place]) for place in places]
        for place in clashing:
            details[place] += 1


def _place(file: str) -> Path:
    """A file's folder, without links, and its name: the same for the same argument, whatever way it is spelt."""
    if file == "-":
        return Path.cwd() / "-" / "stdin"  # in no real folder
    return Path(os.path.realpath(os.path.dirname(file) or ".")) / os.path.basename(file)
