"""The command line: `voxlm transcribe FILE...`, `voxlm align FILE TEXT`, `voxlm plot FILE PICTURE` and `voxlm batch SOURCE...`."""

import argparse
import contextlib
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from .. import VoxLMConfig, VoxLMForSpeechSeq2Seq, VoxLMProcessor
from ..audio_voxlm import file_duration_s
from ..cpu_voxlm import can_be_packed
from ..generation_voxlm import BATCHES_AHEAD, SHORTEST_CHUNK_S
from ..transcription_voxlm import error_line
from . import batch
from .files import output_paths
from .formats import WRITERS
from .output import FolderOutput, StandardOutput, print_text
from .plot import check_picture, plot_words, read_words
from .process import messages_in_lines, own_process, say


# The checkpoint that ships with the source, beside the package in a checkout.
DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "hub_export" / "voxlm-135m"


def at_least(least: float, kind: type):
    """A type of arguments: numbers that are not below `least`."""

    def number(text: str):
        value = kind(text)
        if not value >= least:  # so that NaN is refused too
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    number.__name__ = "whole number" if kind is int else "number"  # how argparse calls it when `kind` fails
    return number


def plain_text(argument: str) -> str:
    """A type of arguments: text, but for the name of a file after an "@" without bytes that are no text."""
    if not argument.startswith("@"):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise argparse.ArgumentTypeError("is not UTF-8") from None
    return argument


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `voxlm` command."""
    parser = argparse.ArgumentParser(prog="voxlm", description="Speech to text with word times and confidences.")
    commands = parser.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser("transcribe", help="transcribe audio files")
    transcribe.add_argument("files", nargs="+", metavar="FILE", help="audio files; - for standard input")
    transcribe.add_argument("--output-dir", type=Path, help="write one file per recording here instead of to stdout")
    align = commands.add_parser("align", help="find the times of the words of a known text")
    align.add_argument("file", metavar="FILE", help="audio file; - for standard input")
    align.add_argument(
        "text", metavar="TEXT", type=plain_text, help="what is said in it, or @FILE to read that from a text file"
    )
    plot = commands.add_parser("plot", help="draw a spectrogram with a box for each word")
    plot.add_argument("file", metavar="FILE", help="audio file; - for standard input")
    plot.add_argument("picture", metavar="PICTURE", type=Path, help="file to draw into: .png, .svg, .pdf")
    plot.add_argument("--text", type=plain_text, help="what is said in it, or @FILE; by default it is transcribed")
    plot.add_argument("--reference", type=Path, metavar="JSON", help="words with times to draw below them")
    many = commands.add_parser("batch", help="transcribe thousands of files with Ray; a restart skips finished ones")
    many.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="manifest (.jsonl, .parquet), glob, folder or file; paths or URLs"
    )
    many.add_argument("--output", required=True, metavar="DIR", help="folder or URL for the shards of results")
    many.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl", help="of the shards")
    many.add_argument("--files-per-shard", type=at_least(1, int), default=32)
    many.add_argument("--retry-failed", action="store_true", help="transcribe again what failed in an earlier run")
    many.add_argument(
        "--workers", type=at_least(1, int), help="copies of the model (default: as many as cores or GPUs allow)"
    )
    many.add_argument("--threads", type=at_least(1, int), default=2, help="cores of each worker (default: 2)")
    many.add_argument("--address", help="of a Ray cluster; its nodes need this package, the model and the files")
    for command, default in ((transcribe, "txt"), (align, "tsv")):
        command.add_argument(
            "--format", choices=list(WRITERS), default=default, help=f"output format (default: {default})"
        )
    for command in (transcribe, many):
        command.add_argument("--vad", choices=["energy", "silero"], default="energy", help="voice activity detector")
        command.add_argument("--batch-size", type=at_least(1, int), default=8, help="segments in one pass (default: 8)")
        command.add_argument(
            "--chunk-length",
            type=at_least(SHORTEST_CHUNK_S, float),
            metavar="SECONDS",
            help="longest segment of a long recording",
        )
        command.add_argument("--no-reader", action="store_true", help="let the LLM write without the reader")
    for command in (transcribe, align, plot, many):
        command.add_argument("--model", help="folder or Hub id (default: hub_export/voxlm-135m of the checkout)")
        command.add_argument(
            "--prompt", type=plain_text, help="instruction or context for the LLM (default: the trained one)"
        )
        command.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda or mps where there is one, else cpu)")
        command.add_argument(
            "--dtype",
            choices=["float32", "bfloat16", "float16", "int8"],
            default="float32",
            help="arithmetic; int8: LLM and reader in 8 bits on the CPU, faster (default: float32)",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*): by default those of the process, whose standard streams and signals are then set up.

    Returns:
        exit code 0 when every file was transcribed or aligned, 1 when some could not be or the command had to stop, 2 when
        nothing could start (bad arguments, no model), 130 or 143 after Ctrl-C or SIGTERM, 141 when nobody reads the output any more.
    """
    with own_process() if argv is None else contextlib.nullcontext(), messages_in_lines():
        try:
            arguments = build_parser().parse_args(argv)
        except SystemExit as stop:
            return int(stop.code or 0)
        try:
            return run(arguments)
        except KeyboardInterrupt as interrupt:
            # Results that are finished are written by now.
            say("interrupted" + (f"; {interrupt}" if str(interrupt) else ""))
            return 128 + getattr(interrupt, "signal", signal.SIGINT)
        except BrokenPipeError:
            return 128 + signal.SIGPIPE


def run(arguments: argparse.Namespace) -> int:
    """Run one command; returns the exit code."""
    try:
        check_arguments(arguments)
        source = arguments.model or str(DEFAULT_MODEL)
        if arguments.command == "batch":
            return transcribe_sources(source, arguments)
        model = load_model(source, arguments.dtype, arguments.device)
    except BrokenPipeError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        say(f"cannot start: {error_line(error)}")
        return 2
    command = {"transcribe": transcribe_files, "align": align_file, "plot": plot_file}[arguments.command]
    try:
        return command(model, arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        say(f"stopped: out of memory, try a smaller --batch-size or --chunk-length ({error_line(error)})")
        return 1


def check_arguments(arguments: argparse.Namespace):
    """
    Find what is wrong with arguments before a model is loaded, and make the folder for the output.

    Raises:
        ValueError, ImportError, OSError: saying what is wrong.
    """
    if arguments.model is None and not DEFAULT_MODEL.is_dir():
        raise ValueError("the default model exists in a checkout only; give --model FOLDER or a Hub id")
    if arguments.command == "batch":
        if "-" in arguments.sources:
            raise ValueError("`voxlm batch` cannot read standard input; give files, folders, globs or manifests")
    else:
        pick_device(arguments.device, arguments.dtype)
        check_standard_input(arguments.files if arguments.command == "transcribe" else [arguments.file])
    if arguments.command == "plot":
        check_picture(arguments.picture)
    if arguments.command == "transcribe" and arguments.output_dir is None:
        if len(arguments.files) > 1 and arguments.format in ("srt", "vtt", "tsv"):
            raise ValueError(
                f"{arguments.format} holds one recording, but there are {len(arguments.files)} files; give --output-dir"
            )
    elif arguments.command == "transcribe":
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(arguments.output_dir, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write into {arguments.output_dir}")
        inputs = {os.path.realpath(file) for file in arguments.files}
        for path in output_paths(arguments.files, arguments.output_dir, arguments.format):
            if os.path.realpath(path) in inputs:
                raise ValueError(f"the output {path} would replace an input; give another --output-dir")


def check_standard_input(files: list[str]):
    """Raise a `ValueError` when "-" among the files can give no audio."""
    if files.count("-") > 1:
        raise ValueError("standard input (-) can be read only once")
    if "-" in files and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("nothing is piped into standard input (-)")


def audio_of(file: str):
    """A file argument as the model takes it."""
    return sys.stdin.buffer if file == "-" else file


def pick_device(name: str | None, dtype: str) -> torch.device:
    """
    The device to compute on: the one that is asked for or, by default, an accelerator where there is one.

    Raises:
        ValueError: when it is not there, or cannot compute in 8 bits.
    """
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    device = name or ("cpu" if dtype == "int8" else there[0])
    try:
        made = torch.empty(1, device=device)
    except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
        reason = error_line(error).partition(". ")[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); there is {', '.join(there)}") from None
    if made.is_meta:
        raise ValueError(f"--device {name} computes nothing; there is {', '.join(there)}")
    if dtype == "int8" and made.device.type != "cpu":
        raise ValueError(f"--dtype int8 computes on the CPU, not on {name}; leave out one of the two")
    return made.device


def load_model(source: str, dtype: str, device: str | None) -> VoxLMForSpeechSeq2Seq:
    """
    The model in a folder or on the Hub, with its processor, ready to transcribe.

    Args:
        dtype: one of `--dtype`'s choices.
        device: see `pick_device`.

    Raises:
        ValueError, OSError: when it cannot be loaded.
    """
    device = pick_device(device, dtype)
    weights = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    try:
        model = VoxLMForSpeechSeq2Seq.from_pretrained(source, dtype=weights)
        model.processor = VoxLMProcessor.from_pretrained(source)
    except (json.JSONDecodeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{source} has a file that is damaged ({type(error).__name__}: {error})") from error
    model.to(device)
    if dtype == "int8":
        return model.quantize_dynamic()
    return model.pack_weights() if can_be_packed(model) else model


def transcribe_files(model, arguments) -> int:
    """`voxlm transcribe`; returns the exit code. Prints the speed on stderr."""
    files, started = arguments.files, time.perf_counter()
    order = short_first(files, BATCHES_AHEAD * arguments.batch_size)
    options = transcribe_options(arguments)
    try:
        results = model.transcribe([audio_of(files[number]) for number in order], stream=True, **options)
    except (OSError, ValueError, ImportError) as error:
        say(f"cannot start: {error_line(error)}")
        return 2
    if arguments.output_dir:
        opened = contextlib.nullcontext(FolderOutput(files, arguments.format, arguments.output_dir))
    else:
        opened = StandardOutput(files, arguments.format)
    done, failed, seconds = 0, 0, 0.0
    try:
        with opened as output:
            for number, result in zip(order, results):
                error = output.add(number, dict(result))
                if error:
                    say(f"{files[number]}: {error.removeprefix(files[number] + ' ')}")
                done, failed, seconds = done + (not error), failed + bool(error), seconds + result["duration"]
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"{done} of {len(files)} files are done",)
        raise
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        say(f"stopped: {error_line(error)}")
        return 1
    if seconds > 60 or len(files) > 1:
        wall = time.perf_counter() - started
        say(
            f"{done} of {len(files)} files, {seconds:.0f} s of audio in {wall:.0f} s, {seconds / wall:.1f} times real time"
        )
    return 1 if failed else 0


def short_first(files: list[str], window: int) -> list[int]:
    """
    An order in which to transcribe files, as their numbers: short ones first among each `window` files.

    The model takes the segments of a window in that order too, so a result is there as soon as it is computed.
    """
    lengths = [0.0 if file == "-" else file_duration_s(file) or 0.0 for file in files]
    return sorted(range(len(files)), key=lambda number: (number // window, lengths[number]))


def transcribe_options(arguments) -> dict:
    """The arguments of `transcribe` that the command line sets."""
    return {
        "prompt": arguments.prompt,
        "vad": arguments.vad,
        "batch_size": arguments.batch_size,
        "chunk_length_s": arguments.chunk_length,
        "use_reader": not arguments.no_reader,
    }


def transcribe_sources(source: str, arguments) -> int:
    """`voxlm batch`; returns the exit code."""
    if arguments.address is None:  # else the model is on the cluster's nodes
        VoxLMConfig.from_pretrained(source)
        pick_device(arguments.device, arguments.dtype)
    resume = f"run the same command again to resume; finished files in {arguments.output} are skipped"
    try:
        totals = batch.run(
            functools.partial(load_model, source, arguments.dtype, arguments.device),
            arguments.sources,
            arguments.output,
            suffix=arguments.format,
            files_per_shard=arguments.files_per_shard,
            workers=arguments.workers,
            threads=arguments.threads,
            address=arguments.address,
            retry_failed=arguments.retry_failed,
            **transcribe_options(arguments),
        )
    except KeyboardInterrupt as interrupt:
        interrupt.args = (resume,)
        raise
    except batch.Stopped as error:
        say(f"stopped: {error_line(error)}; {resume}")
        return 1
    speed = totals["seconds"] / max(totals["wall"], 1e-9)
    say(
        f"{totals['files']} files ({totals['failed']} failed, {totals['skipped']} finished before), "
        f"{totals['seconds']:.0f} s of audio in {totals['wall']:.0f} s, {speed:.1f} times real time"
    )
    if totals["failed_before"]:
        say(f"{totals['failed_before']} files failed in an earlier run; --retry-failed transcribes them again")
    return 1 if totals["failed"] or totals["failed_before"] else 0


def align_file(model, arguments) -> int:
    """`voxlm align`; returns the exit code. Names words that are not in the recording on stderr."""
    try:
        result = model.align(audio_of(arguments.file), text_of(arguments.text), prompt=arguments.prompt)
        print_text(WRITERS[arguments.format]({"source": arguments.file, **result}))
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        say(f"{arguments.file}: {error_line(error)}")
        return 1
    unsaid = [f"{word['word']!r} at {word['start']:.2f} s" for word in result.words if not word["spoken"]]
    if unsaid:
        say(f"not found in the recording: {', '.join(unsaid)}")
    return 0


def text_of(argument: str) -> str:
    """
    The text itself or, after an "@", the content of the file of that name.

    Raises:
        OSError, ValueError: when that cannot be read.
    """
    if not argument.startswith("@"):
        return argument
    if Path(argument[1:]).exists() and not Path(argument[1:]).is_file():  # a pipe may never end
        raise ValueError(f"{argument[1:]} is no regular file")
    try:
        return Path(argument[1:]).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument[1:]} is not UTF-8: {error}") from None


def plot_file(model, arguments) -> int:
    """`voxlm plot`; returns the exit code."""
    try:
        reference = read_words(arguments.reference) if arguments.reference else None
        waveform = model.get_processor().load_audio(audio_of(arguments.file))
        if arguments.text is None:
            result = model.transcribe(waveform, prompt=arguments.prompt)
        else:
            result = model.align(waveform, text_of(arguments.text), prompt=arguments.prompt)
        plot_words(waveform, model.processor.sampling_rate, result.words, arguments.picture, reference)
    except (OSError, ValueError) as error:
        say(f"{arguments.file}: {error_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
