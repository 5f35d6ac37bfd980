"""
Score models on recordings: `voxlm-eval --model FOLDER [--reference WHISPER] --manifest FILE --output DIR`.

Word and character error rates are pooled over all words, after the normaliser of Whisper's paper (Radford et al. 2022),
as on the Open ASR Leaderboard. Where the manifest has "words" or "word_anchors", word times are scored too, of the
transcription and with the text given; `--aligners` adds forced aligners of other projects, `--hard-cases` recordings
made harder. Confidences are scored raw and calibrated. Writes results.json, results.md, hypotheses.jsonl and
reliability.png.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jiwer
import numpy as np
import torch
from tqdm import tqdm
from transformers import pipeline

from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.audio_voxlm import read_audio, to_waveform
from voxlm_hf.transcription_voxlm import error_line

from . import hard_cases, timing
from .aligners import original_words, sphinx_words
from .confidence import all_right_words, plot_reliability, raw_confidences, score_confidences
from .data import Row, read_rows
from .text import normalise, whisper_normaliser


# A text with more than this many times its reference's words counts as a loop. Chosen by hand, not tuned.
RUNAWAY = 2
# Longest recording in seconds: an hour, so that a broken duration does not go unnoticed. Chosen by hand, not tuned.
LONGEST_S = 3600
# The two conditions that word times are scored in, and the key of each condition's words in the results.
CONDITIONS = (("transcribed", "words"), ("text given", "given"))


@dataclass
class Scores:
    """
    Text scores of one model on one set of recordings.

    Args:
        model, data (`str`): names of the model and the data.
        utterances (`int`), hours (`float`), reference_words (`int`): size of the set.
        wer, cer (`float`): pooled errors over reference words and characters.
        mean_utterance_wer (`float`): the mean of the utterances' WERs, as the original VoxLM reports it.
        substitutions, deletions, insertions (`int`)
        end_of_speech_rate (`float`, *optional*): share of texts that ended with eos within the token budget; unknown
            for transformers' own pipelines.
        runaways (`int`): texts with more than twice the words of their reference.
        real_time_factor (`float`): seconds of computing per second of audio. machine (`str`): the machine that
            computed.
    """

    model: str
    data: str
    utterances: int
    hours: float
    reference_words: int
    wer: float
    cer: float
    mean_utterance_wer: float
    substitutions: int
    deletions: int
    insertions: int
    end_of_speech_rate: float | None
    runaways: int
    real_time_factor: float
    machine: str


def score_texts(references: list[str], hypotheses: list[str]) -> dict:
    """
    The text scores of [`Scores`], and "utterance_errors": the numbers of errors and of reference words of each
    utterance.

    Raises:
        ValueError: when the numbers of texts differ, or no reference has a word.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, but {len(hypotheses)} hypotheses")
    normalise = whisper_normaliser()
    pairs = [(normalise(reference), normalise(hypothesis)) for reference, hypothesis in zip(references, hypotheses)]
    # jiwer refuses empty references; every word of their hypotheses is an insertion.
    spoken = [pair for pair in pairs if pair[0]]
    if not spoken:
        raise ValueError("No reference has a word, so there is no error rate")
    empty_insertions = sum(len(hypothesis.split()) for reference, hypothesis in pairs if not reference)
    words = jiwer.process_words([pair[0] for pair in spoken], [pair[1] for pair in spoken])
    characters = jiwer.process_characters([pair[0] for pair in spoken], [pair[1] for pair in spoken])
    count = words.hits + words.substitutions + words.deletions
    each = []
    for reference, hypothesis in pairs:
        errors = jiwer.process_words(reference, hypothesis) if reference else None
        length = len(reference.split())
        wrong = errors.substitutions + errors.deletions + errors.insertions if errors else len(hypothesis.split())
        each.append((wrong, length))
    return {
        "reference_words": count,
        "wer": (words.substitutions + words.deletions + words.insertions + empty_insertions) / count,
        "cer": characters.cer,
        "mean_utterance_wer": sum(wrong / length for wrong, length in each if length) / len(spoken),
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions + empty_insertions,
        "runaways": sum(
            len(hypothesis.split()) > RUNAWAY * max(1, len(reference.split())) for reference, hypothesis in pairs
        ),
        "utterance_errors": each,
    }


@dataclass
class Decoding:
    """
    Which of a VoxLM model's ways to a text is scored.

    Args:
        use_reader (`bool`): whether the reader proposes it.
        ctc_weight (`float`, *optional*): in place of `config.ctc_weight`, for texts by the LLM; 0 for the LLM alone.
    """

    use_reader: bool = True
    ctc_weight: float | None = None


def transcribe_rows(
    model: str, rows: list[Row], batch_size: int, is_reference: bool, decoding: Decoding | None = None
) -> tuple[list[dict], float]:
    """
    Transcribe the rows. Where any row has known word times, a reference model is asked for word times too.

    Args:
        model (`str`): folder or Hub id of a VoxLM checkpoint, or with `is_reference` of any model for transformers'
            `automatic-speech-recognition` pipeline.
        decoding ([`Decoding`], *optional*): of VoxLM.

    Returns:
        for each row a dict with "text", "words" and, for VoxLM, "truncated", "word_scores" and, where times are known,
        "given": the reference text's words with the times that the model finds for them; and the seconds that
        transcribing took.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with_times = any(row.words or row.anchors for row in rows)
    if is_reference:
        run = stock_runner(model, device, with_times, batch_size)
    else:
        voxlm, decoding = VoxLMForSpeechSeq2Seq.from_pretrained(model).to(device), decoding or Decoding()
        if decoding.ctc_weight is not None:
            voxlm.config.ctc_weight = decoding.ctc_weight
            voxlm.config.validate()

        def run(files):
            results = voxlm.transcribe(files, batch_size=batch_size, use_reader=decoding.use_reader)
            return [dict(result) for result in results]

    # Recordings of similar length share a batch, for every model alike.
    order = sorted(range(len(rows)), key=lambda index: rows[index].duration or 0)
    results, seconds = [{}] * len(rows), 0.0
    for first in tqdm(range(0, len(order), batch_size), desc=Path(model).name, unit="batch"):
        batch = order[first : first + batch_size]
        started = time.perf_counter()
        outputs = run([rows[index].audio for index in batch])
        seconds += time.perf_counter() - started
        for index, output in zip(batch, outputs):
            results[index] = output
    if with_times and not is_reference:
        for row, result in tqdm(list(zip(rows, results)), desc="aligning", unit="text"):
            result["given"] = voxlm.align(row.audio, normalise(row.text)).words if normalise(row.text) else []
    return results, seconds


def stock_runner(model: str, device: torch.device, with_times: bool, batch_size: int) -> Callable:
    """A function from recordings to "text" and "words", by transformers' own pipeline, greedily and in English."""
    stock = pipeline("automatic-speech-recognition", model=model, device=device, dtype=torch.float32)
    greedy = {"num_beams": 1, "language": "en", "task": "transcribe"}
    asked = {"return_timestamps": "word"} if with_times else {}
    rate = stock.feature_extractor.sampling_rate

    def run(recordings):
        # Audio files are decoded here, as for VoxLM, because the stock pipeline needs ffmpeg for files.
        clips = [{"raw": waveform_of(recording, rate), "sampling_rate": rate} for recording in recordings]
        outputs = stock(clips, batch_size=batch_size, generate_kwargs=greedy, **asked)
        return [{"text": output["text"], "words": stock_words(output.get("chunks", []))} for output in outputs]

    return run


def waveform_of(audio, rate: int) -> np.ndarray:
    """Audio of any kind as `(samples,)` float32 at `rate` Hz; a bare array must have that rate."""
    samples, source_rate = read_audio(audio)
    return to_waveform(samples, source_rate or rate, rate)


def stock_words(chunks: list[dict]) -> list[dict]:
    """Words in VoxLM's format from the chunks of the stock pipeline."""
    return [
        {"word": chunk["text"].strip(), "start": chunk["timestamp"][0], "end": chunk["timestamp"][1]}
        for chunk in chunks
    ]


def score_all_times(results: list[tuple], rows: list[Row], data: str) -> list[timing.TimingScores]:
    """Word-time errors of all models from the `results` of `evaluate` for each; empty where no times are known."""
    scores = []
    for text_scores, utterances in results:
        for condition, key in CONDITIONS:
            words = [item.get(key) or [] for item in utterances]
            scores.append(timing.score_times(rows, words, Path(text_scores.model).name, data, condition))
    return [item for item in scores if item is not None]


def score_aligners(model: str, rows: list[Row], data: str) -> list[timing.TimingScores]:
    """Word-time errors of PocketSphinx and the original VoxLM's method (see `aligners`), with the text given."""
    voxlm = VoxLMForSpeechSeq2Seq.from_pretrained(model)
    processor = voxlm.get_processor()
    rows = [row for row in rows if timing.known_times(row) and row.duration <= voxlm.config.audio_window_s]
    found: dict[str, list] = {"PocketSphinx": [], "the original's recipe, on our scores": []}
    for row in tqdm(rows, desc="other aligners", unit="text"):
        waveform, text = processor.load_audio(row.audio), normalise(row.text)
        for words, result in zip(found.values(), (sphinx_words(waveform, text), original_words(voxlm, waveform, text))):
            words.append(result or [])
    scores = [timing.score_times(rows, words, name, data, "text given") for name, words in found.items()]
    return [item for item in scores if item is not None]


def score_hard_cases(
    models: list[tuple[str, bool]],
    results: list[tuple],
    rows: list[Row],
    data: str,
    batch_size: int,
    decoding: Decoding | None = None,
) -> list[hard_cases.Robustness]:
    """Robustness of each model's right word times in harder recordings; `results` as in `score_all_times`."""
    timed = [number for number, row in enumerate(rows) if timing.known_times(row)]
    plain_rows = [rows[number] for number in timed]
    scores = []
    before = [
        {
            key: [timing.word_errors(rows[number], plain[number].get(key) or []) for number in timed]
            for _, key in CONDITIONS
        }
        for _, plain in results
    ]
    for case in hard_cases.hard_cases(plain_rows, lambda audio: waveform_of(audio, hard_cases.SAMPLING_RATE)):
        for (model, stock), errors in zip(models, before):
            harder, _ = transcribe_rows(model, case.rows, batch_size, stock, decoding)
            for condition, key in CONDITIONS:
                if key not in harder[0]:
                    continue
                counts = hard_cases.compare(errors[key], case.rows, [item[key] for item in harder], case)
                scores.append(hard_cases.Robustness(Path(model).name, data, condition, case.name, *counts))
    return scores


def word_confidence_curves(utterances: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    Confidences "raw" and "calibrated" of all words, each with a flag per right word; empty if all or none are right.
    """
    words = [word for item in utterances for word in item["words"]]
    right = all_right_words([item["reference"] for item in utterances], [item["words"] for item in utterances])
    if right.all() or not right.any():
        return {}
    raw = raw_confidences([score for item in utterances for score in item["word_scores"]])
    return {"raw": (raw, right), "calibrated": (np.array([word["confidence"] for word in words]), right)}


def confidence_markdown(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """A table of the scores of confidences."""
    lines = ["| confidence | words | right | NCE | ECE | AUROC | AUPRC of errors |", "|---|---|---|---|---|---|---|"]
    for name, (confidences, right) in curves.items():
        scores = score_confidences(confidences, right)
        lines.append(
            f"| {name} | {scores.words:,} | {100 * scores.right:.1f} % | {scores.nce:.3f} | {scores.ece:.3f} | "
            f"{scores.auroc:.3f} | {scores.error_auprc:.3f} |"
        )
    return "\n".join(lines) + "\n"


def evaluate(
    model: str,
    rows: list[Row],
    data: str,
    batch_size: int = 8,
    is_reference: bool = False,
    decoding: Decoding | None = None,
):
    """
    Score one model.

    Returns:
        [`Scores`], and for each utterance `{"id", "reference", "errors", "reference_words", ...}` with its result (see
        `transcribe_rows`).
    """
    results, seconds = transcribe_rows(model, rows, batch_size, is_reference, decoding)
    texts = score_texts([row.text for row in rows], [result["text"] for result in results])
    audio_s = sum(row.duration for row in rows)
    ended = None
    if not is_reference:
        ended = sum(not result["truncated"] for result in results) / len(results)
    scores = Scores(
        model=model,
        data=data,
        utterances=len(rows),
        hours=audio_s / 3600,
        end_of_speech_rate=ended,
        real_time_factor=seconds / audio_s,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, batch {batch_size}",
        **{name: value for name, value in texts.items() if name != "utterance_errors"},
    )
    utterances = [
        {"id": row.id, "reference": row.text, **result, "errors": errors, "reference_words": length}
        for row, result, (errors, length) in zip(rows, results, texts["utterance_errors"])
    ]
    return scores, utterances


def markdown(all_scores: list[Scores], worst: list[dict]) -> str:
    """The table of text scores, and the worst utterances of the first model."""
    lines = [
        "| model | WER | CER | mean utterance WER | sub / del / ins | ended with eos | over twice as long | "
        "real-time factor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for scores in all_scores:
        ended = "-" if scores.end_of_speech_rate is None else f"{100 * scores.end_of_speech_rate:.2f} %"
        lines.append(
            f"| {Path(scores.model).name} | {100 * scores.wer:.2f} % | {100 * scores.cer:.2f} % | "
            f"{100 * scores.mean_utterance_wer:.2f} % | {scores.substitutions:,} / {scores.deletions:,} / "
            f"{scores.insertions:,} | {ended} | {scores.runaways} | {scores.real_time_factor:.3f} |"
        )
    first = all_scores[0]
    lines += [
        "",
        f"{first.data}: {first.utterances} utterances, {first.hours:.2f} h, {first.reference_words:,} words; Whisper's English "
        f"normaliser; {first.machine}.",
        "",
        "Worst utterances:",
        "",
    ]
    lines += [
        f"- {item['id']}: {item['errors']} errors in {item['reference_words']} words. "
        f"Reference: {item['reference']!r}. Hypothesis: {item['text']!r}"
        for item in worst
    ]
    return "\n".join(lines) + "\n"


@dataclass
class Results:
    """
    Everything measured in one run.

    Args:
        texts (`list[tuple[Scores, list[dict]]]`): what `evaluate` returned for each model.
        times (`list[timing.TimingScores]`), hard_cases (`list[hard_cases.Robustness]`)
        curves (`dict`): of the first model, see `word_confidence_curves`.
    """

    texts: list[tuple[Scores, list[dict]]]
    times: list[timing.TimingScores]
    hard_cases: list[hard_cases.Robustness]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]


def report_markdown(results: Results, num_worst: int) -> str:
    """All tables of a run, and the `num_worst` utterances of the first model with the most errors."""
    worst = sorted(results.texts[0][1], key=lambda item: -item["errors"])[:num_worst]
    report = markdown([scores for scores, _ in results.texts], worst)
    if results.times:
        report += "\nWord times:\n\n" + timing.markdown(results.times)
    if results.hard_cases:
        report += "\nWords with right times, in harder recordings:\n\n" + hard_cases.markdown(results.hard_cases)
    if results.curves:
        report += "\nConfidences of the first model's words:\n\n" + confidence_markdown(results.curves)
    return report


def write_results(results: Results, folder: Path, num_worst: int):
    """Write hypotheses.jsonl, results.md, results.json and, where confidences can be scored, reliability.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "hypotheses.jsonl").open("w") as file:
        for scores, items in results.texts:
            for item in items:
                file.write(json.dumps({"model": scores.model, **item}) + "\n")
    if results.curves:
        plot_reliability(results.curves, folder / "reliability.png")
    (folder / "results.md").write_text(report_markdown(results, num_worst))
    measured = {
        "texts": [asdict(scores) for scores, _ in results.texts],
        "times": [asdict(scores) for scores in results.times],
        "hard_cases": [asdict(scores) for scores in results.hard_cases],
        "confidences": {name: asdict(score_confidences(*curve)) for name, curve in results.curves.items()},
    }
    (folder / "results.json").write_text(json.dumps(measured, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a VoxLM checkpoint")
    parser.add_argument(
        "--reference", nargs="*", default=[], help="models for transformers' own pipeline, to compare with"
    )
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--data-name", help="name of the data in the results (default: the manifest's folder)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="score only every N-th row")
    parser.add_argument(
        "--aligners", action="store_true", help="also score PocketSphinx and the original VoxLM's method"
    )
    parser.add_argument("--hard-cases", action="store_true", help="also score word times in recordings made harder")
    parser.add_argument(
        "--no-reader", action="store_true", help="score the texts that the LLM writes without the reader"
    )
    parser.add_argument(
        "--ctc-weight", type=float, help="of the projector's CTC beside the LLM, with --no-reader (0: the LLM alone)"
    )
    parser.add_argument("--worst", type=int, default=10, help="how many of the utterances with the most errors to list")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args()
    try:
        rows, report = read_rows([{"manifest": arguments.manifest, "every": arguments.every}], max_s=LONGEST_S)
        print(report)
        if not rows:
            raise ValueError(f"{arguments.manifest} has no recording to score; see above")
        measured = measure(arguments, rows)
    except (OSError, ValueError) as error:
        print(f"voxlm-eval: {error_line(error)}", file=sys.stderr)
        sys.exit(2)
    write_results(measured, arguments.output, arguments.worst)
    print(report_markdown(measured, arguments.worst))


def measure(arguments: argparse.Namespace, rows: list[Row]) -> Results:
    """All that the command line asks for."""
    data = arguments.data_name or arguments.manifest.resolve().parent.name
    models = [(arguments.model, False), *((reference, True) for reference in arguments.reference)]
    if arguments.ctc_weight is not None and not arguments.no_reader:
        raise ValueError("--ctc-weight is for texts by the LLM: give it together with --no-reader")
    decoding = Decoding(not arguments.no_reader, arguments.ctc_weight)
    results = [evaluate(model, rows, data, arguments.batch_size, stock, decoding) for model, stock in models]
    measured = Results(
        texts=results,
        times=score_all_times(results, rows, data),
        hard_cases=score_hard_cases(models, results, rows, data, arguments.batch_size, decoding)
        if arguments.hard_cases
        else [],
        curves=word_confidence_curves(results[0][1]),
    )
    if arguments.aligners:
        measured.times += score_aligners(arguments.model, rows, data)
    return measured


if __name__ == "__main__":
    main()
