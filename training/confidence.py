"""
Word confidences: measures of their quality, and the map that calibrates them.

    python -m voxlm_training.confidence MODEL --manifest FILE ... [--speakers A B ...]

fits the map and saves it in MODEL/config.json. Fit it on speech that is neither in the training data nor in the data that
results are reported on. A recipe does the same by a stage of kind "calibration".
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
from accelerate import PartialState
from matplotlib.figure import Figure
from scipy.optimize import minimize
from sklearn.metrics import average_precision_score, roc_auc_score

from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.app.files import write_atomically
from voxlm_hf.confidence_voxlm import CONFIDENCE_TERMS as TERMS
from voxlm_hf.confidence_voxlm import word_confidence

from .data import Row, SpeechDataset, read_rows
from .text import normalise, whisper_normaliser


# Of the expected calibration error, which depends on their number. Chosen by hand, not tuned.
BINS = 10
# Longest recording in seconds that a stage calibrates on. Chosen by hand, not tuned.
LONGEST_S = 60.0
# Confidences of exactly 0 or 1 would have an infinite cross-entropy. Chosen by hand, not tuned.
SMALLEST = 1e-6


@dataclass
class ConfidenceScores:
    """
    How well confidences tell right words from wrong ones.

    Args:
        words (`int`), right (`float`): words of the hypotheses, and the share of them that is right.
        nce (`float`): normalised cross-entropy (NIST): 1 is perfect, 0 is as good as the share of right words as a
            constant confidence.
        ece (`float`): expected calibration error over ten bins of equal width (Guo et al. 2017).
        auroc (`float`): probability that a right word has a higher confidence than a wrong one.
        error_auprc (`float`): area under the precision-recall curve of finding the wrong words.
    """

    words: int
    right: float
    nce: float
    ece: float
    auroc: float
    error_auprc: float


def right_words(reference: str, words: list[str]) -> np.ndarray:
    """
    Which of the `words` of a hypothesis are right, `(words,)` of bool: those that an edit-distance alignment finds in
    `reference`, spelt out or in figures. An item without letters and figures is not a word and always counts as right.
    """
    spoken = np.array([any(char.isalnum() for char in word) for word in words], dtype=bool)
    figures = np.array([any(char.isdigit() for char in word) for word in words], dtype=bool)
    hits = _found(reference, words, normalise)
    if figures.any():
        # Whisper's normaliser turns numbers in words into figures, so that "twenty five" and "25" match.
        hits |= figures & _found(reference, words, whisper_normaliser())
    return ~spoken | hits


def _found(reference: str, words: list[str], normaliser) -> np.ndarray:
    """`(words,)` of bool: whether all parts of a word after the normaliser, and at least one, match the reference."""
    parts = [normaliser(word).split() for word in words]
    flat = [part for group in parts for part in group]
    hits = np.zeros(len(flat), dtype=bool)
    expected = normaliser(reference)
    if expected and flat:
        for chunk in jiwer.process_words(expected, " ".join(flat)).alignments[0]:
            if chunk.type == "equal":
                hits[chunk.hyp_start_idx : chunk.hyp_end_idx] = True
    ends = np.cumsum([len(group) for group in parts])
    return np.array([bool(group) and hits[end - len(group) : end].all() for group, end in zip(parts, ends)], dtype=bool)


def all_right_words(references: list[str], words: list[list[dict]]) -> np.ndarray:
    """`right_words` of many results, joined; `words` holds the `{"word", ...}` of each result."""
    each = [right_words(text, [word["word"] for word in result]) for text, result in zip(references, words)]
    return np.concatenate([np.zeros(0, dtype=bool), *each])


def calibration_bins(confidences: np.ndarray, right: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean confidence, share of right words and number of words of each bin of equal width that is not empty."""
    number = np.minimum((confidences * BINS).astype(int), BINS - 1)
    return [
        (float(confidences[number == bin].mean()), float(right[number == bin].mean()), int((number == bin).sum()))
        for bin in np.unique(number)
    ]


def score_confidences(confidences: np.ndarray, right: np.ndarray) -> ConfidenceScores:
    """
    Args:
        confidences: `(words,)` in 0..1; right: `(words,)` of bool.

    Raises:
        ValueError: when all words are right or all are wrong; the measures need both.
    """
    if right.all() or not right.any():
        raise ValueError(f"{right.sum()} of {len(right)} words are right; both right and wrong ones are needed")
    probabilities, share = confidences.clip(SMALLEST, 1 - SMALLEST), right.mean()
    entropy = -(right * np.log(probabilities) + ~right * np.log(1 - probabilities)).mean()
    baseline = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    ece = sum(count * abs(mean - hit) for mean, hit, count in calibration_bins(confidences, right)) / len(right)
    return ConfidenceScores(
        words=len(right),
        right=float(share),
        nce=float(1 - entropy / baseline),
        ece=float(ece),
        auroc=float(roc_auc_score(right, confidences)),
        error_auprc=float(average_precision_score(~right, -confidences)),
    )


def fit_calibration(scores: list[dict], right: np.ndarray) -> dict[str, float]:
    """
    Fit `config.confidence_calibration` by logistic regression with all weights at 0 or above, so that the map is
    monotone. What no word has, as without a reader, has no weight.

    Args:
        scores: `word_scores` of transcriptions; right: `(words,)` of bool.
    """
    kept = [name for name in TERMS if name in ("scale", "entropy") or any(name in score for score in scores)]
    terms = np.array([[TERMS[name](score) for name in kept] for score in scores])
    signs = np.where(right, 1.0, -1.0)

    def loss(parameters):
        return np.logaddexp(0, -signs * (terms @ parameters[:-1] + parameters[-1])).mean()

    bounds = [*[(0, None)] * len(kept), (None, None)]
    # Starts as the raw logit with a small weight on the entropy; the problem is convex, so the start does not matter.
    start = [{"scale": 1.0, "entropy": 0.1}.get(name, 0.0) for name in kept]
    fitted = minimize(loss, [*start, 0.0], bounds=bounds, method="L-BFGS-B")
    return {name: round(float(value), 4) for name, value in zip([*kept, "bias"], fitted.x)}


def raw_confidences(scores: list[dict]) -> np.ndarray:
    """
    The uncalibrated probabilities in `word_scores`, `(words,)`: the reader's, or the LLM's where there is no reader.
    """
    return np.exp([score.get("reader", score["logprob"]) for score in scores])


def plot_reliability(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path):
    """
    Write a reliability diagram as PNG: share of right words against confidence, for each named `(confidences, right)`.
    """
    figure = Figure(figsize=(6, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="perfect")
    for name, (confidences, right) in curves.items():
        means, hits, _ = zip(*calibration_bins(confidences, right))
        top.plot(means, hits, marker="o", label=f"{name}: ECE {score_confidences(confidences, right).ece:.3f}")
        bottom.hist(confidences, bins=np.linspace(0, 1, BINS + 1), histtype="step", label=name)
    top.set(ylabel="share of right words", ylim=(0, 1))
    bottom.set(xlabel="confidence", ylabel="words", xlim=(0, 1))
    top.legend()
    figure.savefig(path, dpi=120)


def cross_fitted(scores: list[dict], right: np.ndarray, speakers: list[str]) -> np.ndarray:
    """Confidences `(words,)` of each speaker's words, calibrated on those of the others: what new speakers will get."""
    confidences = np.zeros(len(right))
    for speaker in sorted(set(speakers)):
        own = np.array([other == speaker for other in speakers])
        fitted = fit_calibration([score for score, kept in zip(scores, ~own) if kept], right[~own])
        confidences[own] = [word_confidence(score, fitted) for score, kept in zip(scores, own) if kept]
    return confidences


def calibrate(model, rows: list[Row], batch_size: int = 8) -> dict[str, float]:
    """
    Fit `config.confidence_calibration` on recordings, and set it. Prints the measures before and after, the latter
    on speakers that the map was not fitted on.

    Raises:
        ValueError: when all words of the transcriptions are right, or all are wrong.
    """
    results = model.transcribe([row.audio for row in rows], batch_size=batch_size)
    right = all_right_words([row.text for row in rows], [result.words or [] for result in results])
    scores = [score for result in results for score in result.word_scores or []]
    speakers = [row.speaker or row.id for row, result in zip(rows, results) for _ in result.word_scores or []]
    print("raw:", score_confidences(raw_confidences(scores), right))
    print("calibrated on other speakers:", score_confidences(cross_fitted(scores, right, speakers), right))
    calibration = fit_calibration(scores, right)
    model.config.confidence_calibration = calibration
    print(f"{len(scores)} words, {right.mean():.3f} right: {calibration}")
    return calibration


def calibrate_stage(
    model, dev: SpeechDataset | None, folder: Path, seed: int, recordings: int = 300, use_cpu: bool = False
):
    """
    A stage of kind "calibration": `calibrate` on recordings of `data.dev`; what `folder` has from an earlier run is set.

    Args:
        recordings (`int`): how many to draw.
        use_cpu (`bool`): leave an accelerator alone, as in [`TrainingArguments`].

    Raises:
        ValueError: without recordings to calibrate on, and as `calibrate`.
    """
    if dev is None:
        raise ValueError(
            "confidences are calibrated on `data.dev`: add recordings of speakers that are not in `data.train`"
        )
    result, processes = folder / "calibration.json", PartialState()
    if processes.is_main_process and not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        model.to("cpu" if use_cpu else processes.device).eval()
        calibration = calibrate(model, dev.draw(recordings, seed, LONGEST_S))
        write_atomically(result, json.dumps(calibration).encode())
    processes.wait_for_everyone()
    model.config.confidence_calibration = json.loads(result.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--manifest", type=Path, nargs="+", required=True)
    parser.add_argument("--speakers", nargs="*", help="only these speakers")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    chosen = {"only_speakers": arguments.speakers} if arguments.speakers else {}
    rows, report = read_rows([{"manifest": manifest, **chosen} for manifest in arguments.manifest])
    print(report)
    calibration = calibrate(VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model), rows, arguments.batch_size)
    config = json.loads((arguments.model / "config.json").read_text())
    config["confidence_calibration"] = calibration
    write_atomically(arguments.model / "config.json", f"{json.dumps(config, indent=2)}\n".encode())


if __name__ == "__main__":
    main()
