"""Transcripts with capitals, punctuation and figures from a reader that agrees with them."""

import json
from types import SimpleNamespace

import pytest

from voxlm_training import cased_text
from voxlm_training.cased_text import restore_case, write_cased


@pytest.mark.parametrize(
    "transcript, reading, cased, agreement",
    [
        ("MISTER SMITH IS TWENTY FIVE", "Mr. Smith is 25.", "Mr. Smith is 25.", 1.0),
        ("THE WELL KNOWN MAN", "The well-known man,", "The well-known man,", 1.0),
        # What was said is what the transcript says.
        ("the man of kent went", "The man of Kant, went.", "The man of Kent, went.", 0.8),
        ("AND I'M GOING", "Banned, I'm going home.", "And, I'm going", 2 / 3),
        ("we are in no hurry", "We're in no hurry!", "We are in no hurry!", 0.6),
        ("i said i would", "", "I said I would", 0.0),
        ("P I T T", "Pit.", "P I T T.", 0.0),
        ("RUB R U B", "Rub, R-U-B.", "Rub, R-U-B.", 1.0),
        # A spelling that stands for two words, of which only one was said.
        ("THE KNOWN MAN", "The well-known man", "The known man", 2 / 3),
        ("", "Thank you.", "", 0.0),
    ],
)
def test_words_take_the_readers_spelling_where_both_agree(transcript, reading, cased, agreement):
    text, share = restore_case(transcript, reading)
    assert (text, share) == (cased, pytest.approx(agreement))


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """A manifest of three lengths, a model that is not needed, and a list of what it is asked to read."""
    rows = [("a", "GOOD DAY", 3.0), ("b", "Cased already.", 2.0), ("c", "SO LONG", 1.0)]
    lines = [json.dumps({"id": i, "audio": f"{i}.wav", "text": text, "duration": s}) for i, text, s in rows]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    seen = []

    def reader_texts(model, audio):
        seen.extend(audio)
        return [{"a": "Good day!", "c": "So long."}[path.rpartition("/")[2][0]] for path in audio]

    monkeypatch.setattr(cased_text, "reader_texts", reader_texts)
    model = SimpleNamespace(get_processor=lambda: SimpleNamespace(audio_window_s=30.0))
    return tmp_path / "manifest.jsonl", model, seen


def test_a_manifest_keeps_its_order_and_what_was_spoken(manifest, tmp_path):
    path, model, seen = manifest
    (tmp_path / "out").mkdir()
    report = write_cased(model, path, tmp_path / "out" / "cased.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out" / "cased.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c"] and report.kept == 3 and len(seen) == 2
    assert rows[0] == {
        "id": "a",
        "audio": "../a.wav",
        "text": "Good day!",
        "duration": 3.0,
        "spoken": "GOOD DAY",
        "agreement": 1.0,
    }
    assert rows[1]["text"] == "Cased already." and "spoken" not in rows[1]


def test_an_interrupted_run_skips_what_it_has_finished(manifest, tmp_path):
    path, model, seen = manifest
    done = {"id": "a", "audio": "a.wav", "text": "Good day?", "spoken": "GOOD DAY"}
    (tmp_path / "cased.jsonl.unfinished").write_text(json.dumps(done) + "\n" + json.dumps(done)[:20])
    write_cased(model, path, tmp_path / "cased.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "cased.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["Good day?", "Cased already.", "So long."]
    assert [path.rpartition("/")[2] for path in seen] == ["c.wav"]
    assert not (tmp_path / "cased.jsonl.unfinished").exists()


def test_a_recording_that_cannot_be_read_is_left_out_alone(manifest, tmp_path, monkeypatch):
    path, model, _ = manifest
    texts = cased_text.reader_texts

    def failing(model, audio):
        if any(item.endswith("a.wav") for item in audio):
            raise ValueError("damaged")
        return texts(model, audio)

    monkeypatch.setattr(cased_text, "reader_texts", failing)
    report = write_cased(model, path, tmp_path / "cased.jsonl")
    assert report.kept == 2 and dict(report.left_out) == {"unreadable audio": 1}
