"""
How fast, side by side in one run: `python -m tests.benchmarks.speed OUTPUT [--whisper DIR] [--faster-whisper DIR] [--hour FILE]`.

Every system gets the same clips (cut from the recordings in tests/data, or from `--audio`), the same threads, and gives words with times. Per
length the systems, each in a process of its own, take turns, several rounds, and the median counts. Times are shown as ratios to voxlm's,
memory as what the process grew by at most. Written to OUTPUT after every row: speed.json and speed.md, which name the machine.

- voxlm: with packed weights, as the command line computes on a CPU; unpacked: as it is loaded; int8: after `quantize_dynamic`.
- full window: unpacked and fed 30 s for every clip, one clip at a time.
- original's way: the same by the LLM alone, one token at a time, and a second pass for the word times, as the original VoxLM computes.
- whisper: a Whisper checkpoint through transformers' pipeline with word timestamps, greedily and in English.
- faster-whisper: a CTranslate2 Whisper in int8 with word timestamps, greedily and in English, one clip at a time.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.audio_voxlm import stream_audio
from voxlm_training.evaluate import stock_runner


ROOT = Path(__file__).resolve().parents[2]
RATE = 16000


def clips_of(recordings: list[Path], seconds: float, count: int) -> list[np.ndarray]:
    """`count` different clips of one length, from all the recordings one after the other."""
    speech = np.concatenate([block for path in recordings for block in stream_audio(path, RATE)])
    size = round(seconds * RATE)
    speech = np.tile(speech, -(-size // len(speech)) + 1)
    step = (len(speech) - size) // count
    return [speech[number * step : number * step + size] for number in range(count)]


def peak_memory(function) -> float:
    """Megabytes by which the process grows at most while `function` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    """A field of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    threads = f"{torch.get_num_threads()} threads"
    return f"{names[0] if names else platform.processor()}, {threads}, torch {torch.__version__}, {platform.system()}"


def load_voxlm(folder: str, arithmetic: str | None = None):
    """A function from clips and a batch size to texts; `arithmetic` is a method of the model, such as `"pack_weights"`."""
    model = VoxLMForSpeechSeq2Seq.from_pretrained(folder)
    if arithmetic:
        getattr(model, arithmetic)()
    return lambda clips, size: [result.text for result in model.transcribe(clips, batch_size=size)]


def load_full_window(folder: str, **options):
    """The same, fed the full window, one clip at a time whatever the batch size; `options` are for `transcribe`."""
    model = VoxLMForSpeechSeq2Seq.from_pretrained(folder)
    model.config.pad_audio_to_window = model.get_processor().pad_audio_to_window = True
    return lambda clips, size: [result.text for result in model.transcribe(clips, batch_size=1, **options)]


def load_whisper(name: str):
    """Runs Whisper as `voxlm-eval --reference` does."""
    runners = {}

    def run(clips, size):
        if size not in runners:
            runners[size] = stock_runner(name, "cpu", True, size)
        return [output["text"] for output in runners[size](clips)]

    return run


def load_faster_whisper(folder: str):
    from faster_whisper import WhisperModel

    recognizer = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=torch.get_num_threads())

    def run(clips, size):
        texts = []
        for clip in clips:
            segments, _ = recognizer.transcribe(clip, language="en", beam_size=1, word_timestamps=True)
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return texts

    return run


# Any option beyond plain greedy search leads to stock `generate` and the teacher-forced pass.
LOADERS = {
    "voxlm": lambda folder: load_voxlm(folder, "pack_weights"),
    "int8": lambda folder: load_voxlm(folder, "quantize_dynamic"),
    "unpacked": load_voxlm,
    "full window": load_full_window,
    "original's way": lambda folder: load_full_window(folder, num_beams=1),
    "whisper": load_whisper,
    "faster-whisper": load_faster_whisper,
}


class System:
    """One system in a process of its own: its threads, and the memory it keeps, are none of the others' business."""

    def __init__(self, name: str, folder: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, initializer=_load, initargs=(name, folder, threads))

    def __call__(self, clips: list[np.ndarray], size: int) -> tuple[float, float, list[str]]:
        """Seconds it took, megabytes by which it grew at most, and the texts."""
        return self.pool.submit(_run, clips, size).result()


def _load(name: str, folder: str, threads: int):
    global _system  # of this process
    torch.set_num_threads(threads)
    _system = LOADERS[name](folder)


def _run(clips, size):
    texts = []
    started = time.perf_counter()
    memory = peak_memory(lambda: texts.extend(_system(clips, size)))
    return time.perf_counter() - started, memory, texts


def measure(systems: dict[str, System], clips: list[np.ndarray], size: int, rounds: int) -> dict[str, dict]:
    """Median seconds per clip of each system, megabytes it took at most, and its texts; the systems take turns."""
    runs: dict[str, list] = {name: [] for name in systems}
    for number in range(rounds):
        for name, system in tqdm(systems.items(), desc=f"round {number + 1} of {rounds}", leave=False):
            runs[name].append(system(clips, size))
    return {
        "seconds_per_clip": {
            name: statistics.median(seconds for seconds, _, _ in own) / len(clips) for name, own in runs.items()
        },
        "peak_mb": {name: max(memory for _, memory, _ in own) for name, own in runs.items()},
        "texts": {name: own[-1][2] for name, own in runs.items()},
    }


def hour(model, path: str) -> dict[str, float]:
    """A long recording as a stream: real-time factor, seconds to the first words, megabytes above the loaded model."""
    marks = {}

    def run():
        started, words, end = time.perf_counter(), 0, 0.0
        for segment in model.transcribe(path, stream=True):
            words += len(segment.words)
            if words and "first" not in marks:
                marks["first"] = time.perf_counter() - started
            end = segment.segments[0]["end"]
        marks["wall"], marks["end"], marks["words"] = time.perf_counter() - started, end, words

    memory = peak_memory(run)
    return {
        "seconds of audio": marks["end"],
        "times real time": marks["end"] / marks["wall"],
        "seconds to the first words": marks["first"],
        "MB above the loaded model": memory,
        "words": marks["words"],
    }


def markdown(report: dict) -> str:
    names = list(report["rows"][0]["seconds_per_clip"]) if report["rows"] else []
    lines = [
        f"Measured on {report['machine']}; medians of {report['rounds']} rounds; times as ratios to the first's.",
        "",
    ]
    if names:
        lines += [
            f"| clips | {names[0]}, s per clip | " + " | ".join(names[1:]) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
    for row in report["rows"]:
        seconds = row["seconds_per_clip"]
        ratios = " | ".join(f"{seconds[name] / seconds[names[0]]:.2f}" for name in names[1:])
        lines.append(f"| {row['length_s']:g} s, batch {row['batch_size']} | {seconds[names[0]]:.2f} | {ratios} |")
    if names:
        lines += [
            "",
            "| clips | " + " | ".join(f"{name}, MB" for name in names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
    for row in report["rows"]:
        megabytes = " | ".join(f"{row['peak_mb'][name]:.0f}" for name in names)
        lines.append(f"| {row['length_s']:g} s, batch {row['batch_size']} | {megabytes} |")
    for name, values in report["hour"].items():
        lines += ["", f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def write(report: dict, output: Path):
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "speed.md").write_text(markdown(report), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default=str(ROOT / "hub_export" / "voxlm-135m"))
    parser.add_argument("--whisper", help="Whisper checkpoint, folder or Hub id")
    parser.add_argument("--faster-whisper", help="folder of a CTranslate2 Whisper")
    parser.add_argument("--audio", type=Path, nargs="+", default=sorted((ROOT / "tests" / "data").glob("*.flac")))
    parser.add_argument("--lengths", type=float, nargs="*", default=[2, 5, 10, 30])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--clips", type=int, default=8, help="of each length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--systems", choices=LOADERS, nargs="+", default=list(LOADERS), help="the first is compared with"
    )
    parser.add_argument("--hour", help="long recording, for voxlm with packed weights and in 8 bits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = {"machine": machine(), "rounds": arguments.rounds, "rows": [], "hour": {}}
    if arguments.hour:  # first, while nothing else is in memory
        for arithmetic in ("pack_weights", "quantize_dynamic"):
            model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model)
            model.get_processor()
            getattr(model, arithmetic)().transcribe(clips_of(arguments.audio, 2, 1))
            report["hour"][f"{Path(arguments.hour).name}, {arithmetic}"] = hour(model, arguments.hour)
            write(report, arguments.output)
    folders = dict.fromkeys(LOADERS, arguments.model)
    folders |= {"whisper": arguments.whisper, "faster-whisper": arguments.faster_whisper}
    names = [name for name in arguments.systems if folders[name]] if arguments.lengths else []
    systems = {name: System(name, folders[name], arguments.threads) for name in names}
    for system in systems.values():
        for size in arguments.batch_sizes:
            system(clips_of(arguments.audio, 2, 1), size)  # first calls are slow everywhere
    for length in arguments.lengths:
        clips = clips_of(arguments.audio, length, arguments.clips)
        for size in arguments.batch_sizes:
            row = measure(systems, clips, size, arguments.rounds)
            report["rows"].append({"length_s": length, "batch_size": size, **row})
            write(report, arguments.output)
            print(markdown(report), flush=True)


if __name__ == "__main__":
    main()
