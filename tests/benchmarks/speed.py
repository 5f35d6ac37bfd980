"""
How fast, side by side in one run: `python -m tests.benchmarks.speed OUTPUT [--whisper DIR] [--faster-whisper DIR] [--hour FILE]`.

Every system gets the same clips (cut from the recordings in tests/data, or from `--audio`), the same threads, and gives words with times. Per
length the systems take turns, several rounds, and the median counts. Times are shown as ratios to voxlm's. Written to OUTPUT: speed.json
and speed.md, which name the machine.

- voxlm: as it comes; voxlm int8: after `quantize_dynamic`.
- full window: voxlm fed 30 s for every clip.
- original's way: voxlm fed 30 s, one token at a time, and a second pass for the word times, as the original VoxLM computes.
- whisper: a Whisper checkpoint through transformers' pipeline with word timestamps.
- faster-whisper: a CTranslate2 Whisper in int8 with word timestamps.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.audio_voxlm import stream_audio


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


def voxlm_systems(model_name: str) -> dict:
    """Functions from clips and a batch size to texts."""
    model = VoxLMForSpeechSeq2Seq.from_pretrained(model_name)
    eight_bits = VoxLMForSpeechSeq2Seq.from_pretrained(model_name).quantize_dynamic()
    window = VoxLMForSpeechSeq2Seq.from_pretrained(model_name)
    processor = window.get_processor()
    window.config.pad_audio_to_window = processor.pad_audio_to_window = True

    def texts(model, clips, size, **options):
        return [result.text for result in model.transcribe(list(clips), batch_size=size, **options)]

    return {
        "voxlm": lambda clips, size: texts(model, clips, size),
        "voxlm int8": lambda clips, size: texts(eight_bits, clips, size),
        "full window": lambda clips, size: texts(window, clips, 1),
        # Any option beyond plain greedy search leads to stock `generate` and the teacher-forced pass.
        "original's way": lambda clips, size: texts(window, clips, 1, num_beams=1),
    }


def whisper_system(folder: str):
    from transformers import pipeline

    recognizer = pipeline("automatic-speech-recognition", model=folder, dtype=torch.float32)

    def run(clips, size):
        inputs = [{"raw": clip, "sampling_rate": RATE} for clip in clips]
        return [output["text"] for output in recognizer(inputs, batch_size=size, return_timestamps="word")]

    return run


def faster_whisper_system(folder: str):
    from faster_whisper import WhisperModel

    recognizer = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=torch.get_num_threads())

    def run(clips, size):
        texts = []
        for clip in clips:
            segments, _ = recognizer.transcribe(clip, language="en", beam_size=1, word_timestamps=True)
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return texts

    return run


def measure(systems: dict, clips: list[np.ndarray], size: int, rounds: int) -> dict[str, float]:
    """Median seconds per clip of each system; the systems take turns."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, run in systems.items():
            started = time.perf_counter()
            run(clips, size)
            times[name].append((time.perf_counter() - started) / len(clips))
    return {name: statistics.median(values) for name, values in times.items()}


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
    names = list(report["rows"][0]["seconds_per_clip"])
    lines = [f"Measured on {report['machine']}; medians of {report['rounds']} rounds; ratios to voxlm.", ""]
    lines += ["| clips | voxlm, s per clip | " + " | ".join(names[1:]) + " |", "|---" * (len(names) + 1) + "|"]
    for row in report["rows"]:
        seconds = row["seconds_per_clip"]
        ratios = " | ".join(f"{seconds[name] / seconds['voxlm']:.2f}" for name in names[1:])
        lines.append(f"| {row['length_s']:g} s, batch {row['batch_size']} | {seconds['voxlm']:.2f} | {ratios} |")
    for name, values in report["hour"].items():
        lines += ["", f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default=str(ROOT / "hub_export" / "voxlm-135m"))
    parser.add_argument("--whisper", help="Whisper checkpoint, folder or Hub id")
    parser.add_argument("--faster-whisper", help="folder of a CTranslate2 Whisper")
    parser.add_argument("--audio", type=Path, nargs="+", default=sorted((ROOT / "tests" / "data").glob("*.flac")))
    parser.add_argument("--lengths", type=float, nargs="+", default=[2, 5, 10, 30])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--clips", type=int, default=8, help="of each length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hour", help="long recording for voxlm and voxlm int8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    systems = voxlm_systems(arguments.model)
    if arguments.whisper:
        systems["whisper"] = whisper_system(arguments.whisper)
    if arguments.faster_whisper:
        systems["faster-whisper"] = faster_whisper_system(arguments.faster_whisper)
    for run in systems.values():
        run(clips_of(arguments.audio, 2, 1), 1)  # first calls are slow everywhere
    rows = []
    for length in tqdm(arguments.lengths, desc="lengths"):
        clips = clips_of(arguments.audio, length, arguments.clips)
        for size in arguments.batch_sizes:
            seconds = measure(systems, clips, size, arguments.rounds)
            rows.append({"length_s": length, "batch_size": size, "seconds_per_clip": seconds})
    hours = {}
    if arguments.hour:
        for name in ("voxlm", "voxlm int8"):
            model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model)
            model.get_processor()
            hours[name] = hour(model.quantize_dynamic() if name == "voxlm int8" else model, arguments.hour)
    report = {"machine": machine(), "rounds": arguments.rounds, "rows": rows, "hour": hours}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "speed.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "speed.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    main()
