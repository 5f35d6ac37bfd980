"""The process of the command line: signals, standard streams, and one line on stderr for each message."""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Iterator

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..generation_voxlm import recording_logger


class Interrupted(KeyboardInterrupt):
    """SIGTERM, to be treated like Ctrl-C."""

    signal = signal.SIGTERM


def say(message: str):
    """Print one line on stderr, above a progress bar if there is one."""
    tqdm.write(f"voxlm: {message}", file=sys.stderr)


@contextlib.contextmanager
def own_process() -> Iterator[None]:
    """Set up signals and standard streams of a process that is the command line, and leave the streams flushed."""
    signal.signal(signal.SIGTERM, _interrupt)
    if sys.stderr is None:  # the caller closed it
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is not None:
        # A pipe gets the same bytes as a file in --output-dir, whatever the locale.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    _separate_stderr()
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:  # has been reported, and would be once more when Python exits
                _discard(stream.fileno())


def _interrupt(number, frame):
    raise Interrupted


def _separate_stderr():
    """
    Give Python's stderr a descriptor of its own and libraries in C none: libmpg123 writes a line there for each odd frame.

    `faulthandler` still reports what ends the process by a signal.
    """
    if sys.stderr.fileno() == 2:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
        for handler in logging.getLogger("transformers").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    faulthandler.enable(file=sys.stderr)
    _discard(2)


def _discard(descriptor: int):
    """Send what is written to a descriptor nowhere."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


class _OneLine(logging.Handler):
    """Warnings of the package, one line each."""

    def emit(self, record: logging.LogRecord):
        say(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def messages_in_lines() -> Iterator[None]:
    """Meanwhile, the package's warnings are lines like those of `say`, and there are progress bars on a terminal only."""
    logger, handler, hub_bars = logging.getLogger("voxlm_hf"), _OneLine(), not are_progress_bars_disabled()
    bars, propagate = transformers_logging.is_progress_bar_enabled(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    # The command line names the files that fail, `transcribe` only their numbers.
    recording_logger.disabled = True
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        recording_logger.disabled = False
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
