"""
What word times and confidences cost on top of the text, side by side in one run: `python -m tests.benchmarks.word_times [MODEL]`.

Prints the share of time that they add over the recordings in tests/data, the milliseconds of the monotonic decoder for a 30 s
utterance of 80 words, and how far bfloat16 is from float32.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.timing_voxlm import word_seconds


ROOT = Path(__file__).resolve().parents[2]


def seconds_of(function, repeats: int = 3) -> float:
    """The least of several runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main(model_name: str):
    model = VoxLMForSpeechSeq2Seq.from_pretrained(model_name)
    clips = [model.get_processor().load_audio(path) for path in sorted((ROOT / "tests" / "data").glob("*.flac"))]
    model.transcribe(clips[0])
    text = sum(seconds_of(lambda clip=clip: model.transcribe(clip, return_timestamps=False)) for clip in clips)
    both = sum(seconds_of(lambda clip=clip: model.transcribe(clip)) for clip in clips)
    print(f"text alone {text:.2f} s, with times and confidences {both:.2f} s: {100 * (both / text - 1):+.1f} %")

    generator = np.random.default_rng(0)
    scores = generator.normal(size=(81, 1500))
    scores -= np.logaddexp.reduce(scores, axis=0)
    onsets = generator.normal(size=1500)
    print(f"decoder, 30 s and 80 words: {1000 * seconds_of(lambda: word_seconds(scores, onsets, 0.02, 30.0)):.1f} ms")

    half = VoxLMForSpeechSeq2Seq.from_pretrained(model_name, dtype=torch.bfloat16)
    half.processor = model.processor
    off = []
    for clip in clips:
        words = model.transcribe(clip).text
        pairs = zip(model.align(clip, words).words, half.align(clip, words).words)
        off += [abs(one[edge] - other[edge]) for one, other in pairs for edge in ("start", "end")]
    print(
        f"bfloat16 against float32: mean {1000 * np.mean(off):.1f} ms, within 20 ms {100 * np.mean(np.array(off) <= 0.02):.1f} %"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "hub_export" / "voxlm-135m"))
