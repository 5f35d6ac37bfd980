"""Synthetic speech: everything but the engines themselves, which few machines have."""

import json
import subprocess
import sys

import soundfile

from tests import tiny
from voxlm_training import synthesise


def test_festivals_words():
    printed = "it\t0.1\t0.2\n25\t0.2\t0.5\n25\t0.5\t0.9\nfox\t0.9\t1.2\n's\t1.2\t1.2\n"
    assert synthesise.festival_words(printed, 2.0) == [
        {"word": "it", "start": 0.2, "end": 0.4},
        {"word": "25", "start": 0.4, "end": 1.8},
        {"word": "fox", "start": 1.8, "end": 2.4},
    ]


def test_an_interrupted_run_skips_finished_sentences(tmp_path, monkeypatch):
    (tmp_path / "sentences.txt").write_text("the fox\n\nthe dog\nhe hoped\nnever spoken\n")
    spoken = []

    def speak(text, rng, engines):
        spoken.append(text)
        if text == "the dog":
            raise subprocess.CalledProcessError(1, "flite")
        return tiny.noise(0.5), "flite/slt", [{"word": "fox", "start": 0.1, "end": 0.3}] if text == "the fox" else None

    def rows(count):
        arguments = [str(tmp_path / "sentences.txt"), str(tmp_path / "out"), "--count", str(count), "--workers", "1"]
        monkeypatch.setattr(sys, "argv", ["synthesise", *arguments])
        synthesise.main()
        return [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]

    monkeypatch.setattr(synthesise, "speak", speak)
    assert [row["id"] for row in rows(2)] == ["0-000000"] and spoken == ["the fox"]
    first, second = rows(4)
    assert spoken == ["the fox", "the dog", "he hoped"]
    assert first["words"] == [{"word": "fox", "start": 0.1, "end": 0.3}] and "words" not in second
    assert (second["id"], second["text"], second["speaker"], second["duration"]) == (
        "0-000003",
        "he hoped",
        "flite/slt",
        0.5,
    )
    assert soundfile.info(tmp_path / "out" / second["audio"]).frames == 8000
