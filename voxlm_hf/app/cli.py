"""The command line: `voxlm transcribe FILE...` and `voxlm align FILE TEXT`."""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .. import VoxLMForSpeechSeq2Seq, VoxLMProcessor
from .formats import WRITERS


# The checkpoint that ships with the source, beside the package in a checkout.
DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "hub_export" / "voxlm-135m"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `voxlm` command."""
    parser = argparse.ArgumentParser(prog="voxlm", description="Speech to text with word times and confidences.")
    commands = parser.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser("transcribe", help="transcribe audio files")
    transcribe.add_argument("files", nargs="+", metavar="FILE", help="audio files")
    transcribe.add_argument("--output-dir", type=Path, help="write one file per recording here instead of to stdout")
    align = commands.add_parser("align", help="times of the words of a text that is known")
    align.add_argument("file", metavar="FILE", help="audio file")
    align.add_argument("text", metavar="TEXT", help="what is said in it, or @FILE to read that from a text file")
    for command, default in ((transcribe, "txt"), (align, "tsv")):
        command.add_argument("--model", help="folder or Hub id (default: hub_export/voxlm-135m of the checkout)")
        command.add_argument(
            "--format", choices=list(WRITERS), default=default, help=f"output format (default: {default})"
        )
        command.add_argument("--prompt", help="instruction or context for the LLM (default: the one of training)")
        command.add_argument("--device", default="cpu", help="cpu, cuda, mps, ... (default: cpu)")
        command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
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
        model = load_model(arguments)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"voxlm: cannot start: {one_line(error)}", file=sys.stderr)
        return 2
    return align_file(model, arguments) if arguments.command == "align" else transcribe_files(model, arguments)


def load_model(arguments) -> VoxLMForSpeechSeq2Seq:
    """The model that the arguments ask for, with its processor."""
    if arguments.model is None and not DEFAULT_MODEL.is_dir():
        raise ValueError("the default model lies in a checkout only; give --model FOLDER or a Hub id")
    source = arguments.model or str(DEFAULT_MODEL)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(source, dtype=getattr(torch, arguments.dtype))
    model.to(arguments.device)
    model.processor = VoxLMProcessor.from_pretrained(source)
    return model


def transcribe_files(model, arguments) -> int:
    """`voxlm transcribe`; returns the exit code."""
    targets = output_paths(arguments.files, arguments.output_dir, arguments.format)
    failed = 0
    # The files' own bar; a single long file shows the bar of `transcribe`.
    for file, target in tqdm(list(zip(arguments.files, targets)), disable=len(targets) < 2, unit="file"):
        try:
            result = model.transcribe(file, prompt=arguments.prompt)
            text = WRITERS[arguments.format](result)
            if target is None:
                sys.stdout.write(text if len(targets) == 1 else f"# {file}\n{text}")
            else:
                target.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:
            failed += 1
            tqdm.write(f"voxlm: {file}: {one_line(error)}", file=sys.stderr)
    return 1 if failed else 0


def align_file(model, arguments) -> int:
    """`voxlm align`; returns the exit code. Words that are not in the recording are named on stderr."""
    try:
        text = arguments.text
        if text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        result = model.align(arguments.file, text, prompt=arguments.prompt)
    except (OSError, ValueError) as error:
        print(f"voxlm: {arguments.file}: {one_line(error)}", file=sys.stderr)
        return 1
    sys.stdout.write(WRITERS[arguments.format](result))
    unsaid = [f"{word['word']!r} at {word['start']:.2f} s" for word in result.words if not word["spoken"]]
    if unsaid:
        print(f"voxlm: not heard in the recording: {', '.join(unsaid)}", file=sys.stderr)
    return 0


def output_paths(files: list[str], output_dir: Path | None, suffix: str) -> list[Path | None]:
    """Where each file's output goes: `None` for stdout; files of one name in different folders get numbers."""
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
