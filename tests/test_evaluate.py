"""Scoring."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from tests import tiny
from voxlm_training.data import read_rows
from voxlm_training.evaluate import Scores, evaluate, markdown, score_texts
from voxlm_training.text import normalise


def test_normalisation():
    assert normalise("Mr. Brown’s well-known “hat”—lost!") == "mister brown's well known hat lost"
    assert normalise("'Tis Dr. O'Neill's") == "tis doctor o'neill's"


def test_error_rates_are_pooled_after_whispers_normaliser():
    """Counted by hand: colour = color, Mr. = mister, five = 5; one substitution, one deletion in six words."""
    result = score_texts(["THE COLOUR, FIVE", "Mr. Brown", "d"], ["the color 5", "mister green", ""])
    assert (result["substitutions"], result["deletions"], result["insertions"]) == (1, 1, 0)
    assert result["reference_words"] == 6 and result["wer"] == pytest.approx(2 / 6)
    assert result["mean_utterance_wer"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert result["utterance_errors"] == [(0, 3), (1, 2), (1, 1)]


def test_words_written_in_silence_and_loops_are_counted():
    result = score_texts(["", "one word"], ["what is this", "one word one word word"])
    assert result["insertions"] == 6 and result["runaways"] == 2 and result["reference_words"] == 2
    with pytest.raises(ValueError, match="No reference has a word"):
        score_texts([""], ["a"])
    with pytest.raises(ValueError, match="2 references, but 1 hypotheses"):
        score_texts(["a", "b"], ["a"])


METRIC = Path(__file__).resolve().parents[1] / "training" / "metrics" / "speech_errors.py"


@pytest.fixture
def speech(tmp_path):
    toy = tiny.model(llm="qwen3")
    toy.save_pretrained(tmp_path / "toy")
    toy.processor.save_pretrained(tmp_path / "toy")
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", tiny.noise(0.5 + number / 4, number), 16000)
    anchors = [
        {"word": "the", "start": 0.1, "end": 0.2, "index": 0},
        {"word": "fox", "start": 0.3, "end": 0.4, "index": 2},
    ]
    row = {"text": "the quick fox", "word_anchors": anchors}
    lines = [json.dumps({"id": str(n), "audio": f"{n}.wav", **row}) for n in range(3)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_model_is_scored_as_it_transcribes(speech):
    rows, _ = read_rows([{"manifest": speech / "manifest.jsonl"}])
    scores, utterances = evaluate(str(speech / "toy"), rows, "noise", batch_size=2)
    toy = tiny.model(llm="qwen3")
    assert [item["text"] for item in utterances] == [toy.transcribe(row.audio).text for row in rows]
    assert scores.wer == score_texts(["the quick fox"] * 3, [item["text"] for item in utterances])["wer"]
    ended = [not item["truncated"] for item in utterances]
    assert scores.end_of_speech_rate == sum(ended) / 3
    assert scores.hours == pytest.approx((0.5 + 0.75 + 1.0) / 3600) and scores.real_time_factor > 0


def test_command_line(speech):
    command = [
        sys.executable,
        "-m",
        "voxlm_training.evaluate",
        "--model",
        str(speech / "toy"),
        "--output",
        str(speech / "out"),
    ]
    done = subprocess.run([*command, "--manifest", str(speech / "manifest.jsonl")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((speech / "out" / "results.json").read_text())
    assert Scores(**results["texts"][0]).utterances == 3
    assert {item["condition"] for item in results["times"]} <= {"transcribed", "text given"}
    assert [item["matched"] for item in results["times"] if item["condition"] == "text given"] == [6]
    assert results["hard_cases"] == []
    assert len((speech / "out" / "hypotheses.jsonl").read_text().splitlines()) == 3
    assert (speech / "out" / "results.md").read_text() in done.stdout


def test_other_aligners_and_hard_cases_are_scored_when_asked_for(speech):
    command = [
        sys.executable,
        "-m",
        "voxlm_training.evaluate",
        "--model",
        str(speech / "toy"),
        "--aligners",
        "--hard-cases",
    ]
    command += ["--manifest", str(speech / "manifest.jsonl"), "--output", str(speech / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((speech / "out" / "results.json").read_text())
    original = [item for item in results["times"] if item["model"] == "the original's recipe, on our scores"]
    assert [(item["condition"], item["matched"]) for item in original] == [("text given", 6)]
    given = [item for item in results["hard_cases"] if item["condition"] == "text given"]
    assert len(given) == 5 and {item["lost"] for item in given} == {0}
    # The words right in the plain recordings are the same ones in every case.
    assert len({item["right"] for item in given}) == 1
    table = (speech / "out" / "results.md").read_text()
    assert "5 s of silence before" in table and "3 utterances in a row" in table


def test_the_table_says_what_it_measured():
    scores = Scores("a/voxlm", "noise", 3, 0.5, 1200, 0.123, 0.05, 0.2, 100, 20, 30, 0.999, 0, 0.1234, "x86, 2 cores")
    table = markdown([scores], [{"id": "u1", "errors": 4, "reference_words": 5, "reference": "a", "text": "b"}])
    assert "| voxlm | 12.30 % | 5.00 % | 20.00 % | 100 / 20 / 30 | 99.90 % | 0 | 0.123 |" in table
    assert "3 utterances, 0.50 h, 1,200 words" in table and "u1: 4 errors in 5 words" in table


def test_as_a_module_of_the_evaluate_library(tmp_path, monkeypatch):
    import evaluate as library

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = library.load(str(METRIC), cache_dir=str(tmp_path))
    scores = metric.compute(
        predictions=["the color 5", "mister green", ""], references=["THE COLOUR, FIVE", "Mr. Brown", "d"]
    )
    assert scores["wer"] == pytest.approx(2 / 6) and scores["deletions"] == 1


def test_the_librarys_evaluator_runs_our_pipeline(speech, monkeypatch):
    import evaluate as library
    import transformers
    from datasets import Dataset

    # evaluate 0.4.6 asks transformers for a class that version 5 has no more, whatever the pipeline.
    monkeypatch.setattr(transformers, "TFPreTrainedModel", transformers.PreTrainedModel, raising=False)
    toy = tiny.model(llm="qwen3")
    data = Dataset.from_dict({"path": [str(speech / f"{n}.wav") for n in range(3)], "sentence": ["the quick fox"] * 3})
    scores = library.evaluator("automatic-speech-recognition").compute(
        model_or_pipeline=toy.transcription_pipeline(),
        data=data,
        metric=library.load(str(METRIC)),
        label_column="sentence",
    )
    texts = [toy.transcribe(str(speech / f"{n}.wav")).text for n in range(3)]
    assert scores["wer"] == score_texts(["the quick fox"] * 3, texts)["wer"]
