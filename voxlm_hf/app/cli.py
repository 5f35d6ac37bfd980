"""The command line: `voxlm transcribe FILE...`, `voxlm align FILE TEXT`, `voxlm plot FILE PICTURE` and `voxlm batch SOURCE...`."""

import argparse
import functools
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .. import VoxLMForSpeechSeq2Seq, VoxLMProcessor
from ..cpu_voxlm import can_be_packed
from . import batch
from .formats import WRITERS
from .plot import plot_words, read_words


# The checkpoint that ships with the source, beside the package in a checkout.
DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "hub_export" / "voxlm-135m"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `voxlm` command."""
    parser = argparse.ArgumentParser(prog="voxlm", description="Speech to text with word times and confidences.")
    commands = parser.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser("transcribe", help="transcribe audio files")
    transcribe.add_argument("files", nargs="+", metavar="FILE", help="audio files")
    transcribe.add_argument("--output-dir", type=Path, help="write one file per recording here instead of to stdout")
    align = commands.add_parser("align", help="find the times of the words of a known text")
    align.add_argument("file", metavar="FILE", help="audio file")
    align.add_argument("text", metavar="TEXT", help="what is said in it, or @FILE to read that from a text file")
    plot = commands.add_parser("plot", help="draw a spectrogram with a box for each word")
    plot.add_argument("file", metavar="FILE", help="audio file")
    plot.add_argument("picture", metavar="PICTURE", type=Path, help="file to draw into: .png, .svg, .pdf")
    plot.add_argument("--text", help="what is said in it, or @FILE; by default it is transcribed")
    plot.add_argument("--reference", type=Path, metavar="JSON", help="words with times to draw below them")
    many = commands.add_parser("batch", help="transcribe thousands of files with Ray; a restart skips finished ones")
    many.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="manifest (.jsonl, .parquet), glob, folder or file; paths or URLs"
    )
    many.add_argument("--output", required=True, metavar="DIR", help="folder or URL for the shards of results")
    many.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl", help="of the shards")
    many.add_argument("--files-per-shard", type=int, default=32)
    many.add_argument("--workers", type=int, help="copies of the model (default: as many as cores or GPUs allow)")
    many.add_argument("--threads", type=int, default=2, help="cores of each worker (default: 2)")
    many.add_argument("--address", help="of a Ray cluster; its nodes need this package, the model and the files")
    for command, default in ((transcribe, "txt"), (align, "tsv")):
        command.add_argument(
            "--format", choices=list(WRITERS), default=default, help=f"output format (default: {default})"
        )
    for command in (transcribe, many):
        command.add_argument("--vad", choices=["energy", "silero"], default="energy", help="voice activity detector")
        command.add_argument("--batch-size", type=int, default=8, help="segments in one pass (default: 8)")
        command.add_argument(
            "--chunk-length", type=float, metavar="SECONDS", help="longest segment of a long recording"
        )
    for command in (transcribe, align, plot, many):
        command.add_argument("--model", help="folder or Hub id (default: hub_export/voxlm-135m of the checkout)")
        command.add_argument("--prompt", help="instruction or context for the LLM (default: the trained one)")
        command.add_argument("--device", default="cpu", help="cpu, cuda, mps, ... (default: cpu)")
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

    Returns:
        exit code 0 when every file was transcribed or aligned, 1 when some could not be, 2 when nothing could start (bad
        arguments, no model).
    """
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if arguments.command == "transcribe" and arguments.output_dir:
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
        source = arguments.model or str(DEFAULT_MODEL)
        if arguments.model is None and not DEFAULT_MODEL.is_dir():
            raise ValueError("the default model exists in a checkout only; give --model FOLDER or a Hub id")
        if arguments.command == "batch":
            return transcribe_sources(source, arguments)
        model = load_model(source, arguments.dtype, arguments.device)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"voxlm: cannot start: {one_line(error)}", file=sys.stderr)
        return 2
    return {"transcribe": transcribe_files, "align": align_file, "plot": plot_file}[arguments.command](model, arguments)


def load_model(source: str, dtype: str, device: str) -> VoxLMForSpeechSeq2Seq:
    """The model in a folder or on the Hub, with its processor, ready to transcribe; `dtype` is one of `--dtype`'s choices."""
    weights = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(source, dtype=weights)
    model.to(device)
    model.processor = VoxLMProcessor.from_pretrained(source)
    if dtype == "int8":
        return model.quantize_dynamic()
    return model.pack_weights() if can_be_packed(model) else model


def transcribe_files(model, arguments) -> int:
    """`voxlm transcribe`; returns the exit code. Prints the speed on stderr."""
    files, failed, seconds, started = arguments.files, 0, 0.0, time.perf_counter()
    targets = output_paths(files, arguments.output_dir, arguments.format)
    try:
        results = model.transcribe(list(files), stream=True, **transcribe_options(arguments))
    except (OSError, ValueError, ImportError) as error:
        print(f"voxlm: cannot start: {one_line(error)}", file=sys.stderr)
        return 2
    for file, target, result in zip(files, targets, results):
        seconds += result["duration"]
        error = result.get("error")
        if error is None:
            text = WRITERS[arguments.format](result)
            try:
                if target is None:
                    sys.stdout.write(text if len(targets) == 1 else f"# {file}\n{text}")
                else:
                    target.write_text(text, encoding="utf-8")
            except OSError as failure:
                error = one_line(failure)
        if error is not None:
            failed += 1
            tqdm.write(f"voxlm: {file}: {error}", file=sys.stderr)
    if seconds > 60 or len(files) > 1:
        wall = time.perf_counter() - started
        summary = f"{seconds:.0f} s of audio in {wall:.0f} s, {seconds / wall:.1f} times real time"
        print(f"voxlm: {len(files) - failed} of {len(files)} files, {summary}", file=sys.stderr)
    return 1 if failed else 0


def transcribe_options(arguments) -> dict:
    """The arguments of `transcribe` that the command line sets."""
    return {
        "prompt": arguments.prompt,
        "vad": arguments.vad,
        "batch_size": arguments.batch_size,
        "chunk_length_s": arguments.chunk_length,
    }


def transcribe_sources(source: str, arguments) -> int:
    """`voxlm batch`; returns the exit code."""
    totals = batch.run(
        functools.partial(load_model, source, arguments.dtype, arguments.device),
        arguments.sources,
        arguments.output,
        suffix=arguments.format,
        files_per_shard=arguments.files_per_shard,
        workers=arguments.workers,
        threads=arguments.threads,
        address=arguments.address,
        **transcribe_options(arguments),
    )
    speed = totals["seconds"] / max(totals["wall"], 1e-9)
    print(
        f"voxlm: {totals['files']} files ({totals['failed']} failed, {totals['skipped']} finished before), "
        f"{totals['seconds']:.0f} s of audio in {totals['wall']:.0f} s, {speed:.1f} times real time",
        file=sys.stderr,
    )
    return 1 if totals["failed"] else 0


def align_file(model, arguments) -> int:
    """`voxlm align`; returns the exit code. Names words that are not in the recording on stderr."""
    try:
        result = model.align(arguments.file, text_of(arguments.text), prompt=arguments.prompt)
    except (OSError, ValueError) as error:
        print(f"voxlm: {arguments.file}: {one_line(error)}", file=sys.stderr)
        return 1
    sys.stdout.write(WRITERS[arguments.format](result))
    unsaid = [f"{word['word']!r} at {word['start']:.2f} s" for word in result.words if not word["spoken"]]
    if unsaid:
        print(f"voxlm: not found in the recording: {', '.join(unsaid)}", file=sys.stderr)
    return 0


def text_of(argument: str) -> str:
    """The text itself or, after an "@", the content of the file of that name."""
    return Path(argument[1:]).read_text(encoding="utf-8") if argument.startswith("@") else argument


def plot_file(model, arguments) -> int:
    """`voxlm plot`; returns the exit code."""
    try:
        reference = read_words(arguments.reference) if arguments.reference else None
        waveform = model.get_processor().load_audio(arguments.file)
        if arguments.text is None:
            result = model.transcribe(waveform, prompt=arguments.prompt)
        else:
            result = model.align(waveform, text_of(arguments.text), prompt=arguments.prompt)
        plot_words(waveform, model.processor.sampling_rate, result.words, arguments.picture, reference)
    except (OSError, ValueError, ImportError) as error:
        print(f"voxlm: {arguments.file}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def output_paths(files: list[str], output_dir: Path | None, suffix: str) -> list[Path | None]:
    """Where each file's output goes: `None` for stdout. Files of the same name in different folders get numbers."""
    if output_dir is None:
        return [None] * len(files)
    taken: set[Path] = set()
    paths = []
    for file in files:
        path, number = output_dir / f"{Path(file).stem}.{suffix}", 2
        while path in taken:
            path, number = output_dir / f"{Path(file).stem}-{number}.{suffix}", number + 1
        taken.add(path)
        paths.append(path)
    return paths


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
