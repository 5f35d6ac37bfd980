"""Where `voxlm transcribe` puts its results: a file for each in a folder, or one document on stdout."""

import errno
import sys
from pathlib import Path

from .files import output_paths, write_atomically
from .formats import WRITERS, encode


def print_text(text: str):
    """
    Write to stdout at once.

    Raises:
        OSError: when it cannot be written; BrokenPipeError when nobody reads it.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    try:
        sys.stdout.write(encode(text).decode())
        sys.stdout.flush()
    except OSError as error:
        raise type(error)(error.errno, f"cannot write to standard output: {error.strerror}") from None


class FolderOutput:
    """
    One file for each recording, written as soon as its result is there.

    Args:
        files: the recordings' names on the command line.
        suffix: one of `WRITERS`.
        folder: where the outputs go, named by `output_paths`.
    """

    def __init__(self, files: list[str], suffix: str, folder: Path):
        self.files, self.write, self.paths = files, WRITERS[suffix], output_paths(files, folder, suffix)

    def add(self, number: int, result: dict) -> str | None:
        """Write the result of a recording; returns why there is none. An older output is then as it was."""
        path = self.paths[number]
        if result.get("error"):
            return result["error"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, encode(self.write({"source": self.files[number], **result})))
        except OSError as error:
            return str(error)


class StandardOutput:
    """
    Results on stdout in the order of the recordings, each as soon as those before it are there or have failed.

    Several results are a JSON list or, as text, each under a line "# FILE". Leaving the context writes what still waits for
    an earlier recording, so that an interrupt loses nothing, and ends the list.

    Args:
        files: the recordings' names on the command line.
        suffix: one of `WRITERS`.
    """

    def __init__(self, files: list[str], suffix: str):
        self.files, self.write, self.several = files, WRITERS[suffix], len(files) > 1
        self.as_list = suffix == "json" and self.several
        self.waiting, self.next, self.printed = {}, 0, 0

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if kind is not None and issubclass(kind, OSError):
            return  # stdout is no more
        for number in sorted(self.waiting):
            self._print(number)
        if self.as_list:
            print_text("\n]\n" if self.printed else "[]\n")

    def add(self, number: int, result: dict) -> str | None:
        """Take the result of a recording and print what is next; returns why there is none.

        Raises:
            OSError: when stdout cannot be written to.
        """
        self.waiting[number] = result
        while self.next in self.waiting:
            self._print(self.next)
            self.next += 1
        return result.get("error")

    def _print(self, number: int):
        result = self.waiting.pop(number)
        if result.get("error"):
            return
        text = self.write({"source": self.files[number], **result})
        if self.as_list:
            text = (",\n" if self.printed else "[\n") + text.rstrip("\n")
        elif self.several:
            text = f"# {self.files[number]}\n{text}"
        self.printed += 1
        print_text(text)
