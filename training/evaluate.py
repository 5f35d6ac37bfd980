"""Word error rate of a model on a manifest (JSONL with "audio", relative to it, and "text")."""

import argparse
import json
import time
from pathlib import Path

import jiwer
from tqdm import tqdm

from training.text import strip_punctuation
from voxlm_hf import VoxLMForSpeechSeq2Seq


def word_errors(references: list[str], hypotheses: list[str]) -> jiwer.WordOutput:
    """Pooled word errors after lower-casing and stripping punctuation; `.wer` is errors over reference words."""
    return jiwer.process_words(
        [strip_punctuation(text) for text in references], [strip_punctuation(text) for text in hypotheses]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="take every N-th row only")
    parser.add_argument("--output", type=Path, help="write the hypotheses here, as JSONL")
    arguments = parser.parse_args()
    model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model)
    rows = [json.loads(line) for line in arguments.manifest.open()][:: arguments.every]
    rows.sort(key=lambda row: row["duration"])
    started, results = time.time(), []
    for first in tqdm(range(0, len(rows), arguments.batch_size), unit="batch"):
        files = [str(arguments.manifest.parent / row["audio"]) for row in rows[first : first + arguments.batch_size]]
        results += model.transcribe(files, batch_size=arguments.batch_size)
    seconds, duration = time.time() - started, sum(result.duration for result in results)
    errors = word_errors([row["text"] for row in rows], [result.text for result in results])
    print(f"utterances {len(rows)}, {duration / 3600:.2f} h, {seconds:.0f} s ({duration / seconds:.1f} x real time)")
    print(
        f"pooled WER {100 * errors.wer:.2f} %: {errors.substitutions} substitutions, {errors.deletions} deletions, ",
        end="",
    )
    print(f"{errors.insertions} insertions, {errors.hits + errors.substitutions + errors.deletions} reference words")
    print(f"texts ended by the token budget: {sum(result.truncated for result in results)}")
    if arguments.output:
        lines = [
            json.dumps({**row, "hypothesis": result.text, "words": result.words}) + "\n"
            for row, result in zip(rows, results)
        ]
        arguments.output.write_text("".join(lines))


if __name__ == "__main__":
    main()
