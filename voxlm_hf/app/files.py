"""Files that the command line writes: where they go, complete or not at all."""

import os
import secrets
import shutil
from collections import defaultdict
from pathlib import Path


def write_atomically(path: str | Path, content: bytes):
    """
    Write a file beside its place and move it there, so that it is complete or, after any error, what it was before.

    Raises:
        OSError: naming the file, when it cannot be written.
    """
    target = Path(os.path.realpath(path))
    # A name of its own, so that neither another process nor a name of greatest length is in the way.
    unfinished = target.with_name(f".{secrets.token_hex(8)}.unfinished")
    try:
        with open(unfinished, "xb") as file:  # closing it reports what a buffer could not be written for
            file.write(content)
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise


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
