"""Tuning the weights of rescoring: the search, and the stage of a recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_training import rescoring
from voxlm_training.recipe import RecipeError
from voxlm_training.rescoring import ScoredList, search
from voxlm_training.train import run


SETTINGS = {"llm_weight": 0.3, "ctc_weight": 0.0, "word_bonus": 1.0}


def scored(right: tuple, wrong: tuple) -> ScoredList:
    """A list of two texts of as many words, with the reader's, the LLM's and the frames' log-probability of each."""
    return ScoredList(np.array([0, 1]), np.array([[*text, 3, 0] for text in (right, wrong)], dtype=float))


def test_the_search_finds_what_settles_all_lists():
    """The LLM knows better by 10 nats where the reader errs by 1, and errs by as much where the reader is sure by 3."""
    lists = [scored((-2, -10, 0), (-1, -20, 0)), scored((-1, -20, 0), (-4, -10, 0))]
    found, report = search(lists, 6, SETTINGS, with_ctc=False)
    assert 0.1 < found["llm_weight"] < 0.3 and found["ctc_weight"] == 0
    (line,) = [line for line in report.splitlines() if line.startswith("| all")]
    assert line.endswith("| 0 | 0.00 % |")
    assert "| reader | 0.0 | 0.0 |" in report and "2 recordings, 6 words." in report


@pytest.mark.parametrize("with_ctc", [True, False])
def test_frames_count_where_they_can_score_texts(with_ctc):
    found, _ = search([scored((-2, -1, -10), (-1, -1, -30))], 3, SETTINGS, with_ctc)
    assert (found["ctc_weight"] > 0) == with_ctc


def test_an_impossible_text_is_never_chosen():
    lists = [ScoredList(np.array([3, 0]), np.array([[-9.0, -9, -9, 3, 0], [-np.inf, 0, 0, 0, 0]]))]
    _, report = search(lists, 3, SETTINGS, with_ctc=True)
    assert all(" 3 | 100.00 % |" in line for line in report.splitlines()[2:7])


def test_errors_are_counted_after_whispers_normaliser():
    evidence = np.zeros((3, 5))
    (found,), words = rescoring.with_errors([("MISTER FOX", ["Mr. Fox!", "Mr. Box", ""], evidence)])
    assert found.errors.tolist() == [0, 1, 2] and words == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that listens to its reader alone, and recordings with the texts that a bonus for words would choose."""
    folder = tmp_path_factory.mktemp("rescoring")
    model = tiny.with_reader(llm_weight=0.0, word_bonus=2.0)
    embeddings = model.reader.decoder.embed_tokens.weight.data
    embeddings *= 8  # sure of some tokens
    embeddings[tiny.READER_END] = 0
    clips = [tiny.noise(0.5 + 0.2 * number, number) for number in range(4)]
    texts = [result.text for result in model.transcribe(clips)]
    model.config.reader_config["word_bonus"] = 0.0
    assert texts != [result.text for result in model.transcribe(clips)]
    model.save_pretrained(folder / "model")
    model.processor.save_pretrained(folder / "model")
    for number, clip in enumerate(clips):
        soundfile.write(folder / f"{number}.wav", clip, tiny.RATE, subtype="FLOAT")
    rows = [json.dumps({"audio": f"{number}.wav", "text": text}) for number, text in enumerate(texts)]
    (folder / "manifest.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def recipe(folder, tmp_path):
    source = [{"manifest": str(folder / "manifest.jsonl")}]
    return {
        "model": str(folder / "model"),
        "output": str(tmp_path / "runs"),
        "data": {"train": source, "dev": source, "max_characters_per_s": 1000},
        "stages": [{"kind": "rescoring"}],
    }


def errors_of(model, folder) -> int:
    """Word errors of a model on the recordings, counted from its transcriptions."""
    model = VoxLMForSpeechSeq2Seq.from_pretrained(model)
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    texts = [model.transcribe(folder / row["audio"]).text for row in rows]
    counted, _ = rescoring.with_errors([(row["text"], [text], np.zeros((1, 5))) for row, text in zip(rows, texts)])
    return int(sum(item.errors.sum() for item in counted))


def test_a_stage_sets_the_weights_with_the_fewest_errors(recipe, folder):
    final = run(recipe)
    settings = VoxLMForSpeechSeq2Seq.from_pretrained(final).config.reader_config
    assert all(settings[name] in values for name, values in rescoring.GRID.items())
    report = (final.parent / "1-rescoring" / "rescoring.md").read_text()
    errors = {line.split(" | ")[0]: int(line.split(" | ")[4]) for line in report.splitlines()[2:] if "%" in line}
    assert errors["| all"] < errors["| as it was"] == errors_of(folder / "model", folder)
    assert errors["| all"] == errors_of(final, folder) >= errors["| the best text of each list"]


def test_an_interrupted_stage_goes_on_and_a_finished_one_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(rescoring, "RECORDINGS_AT_ONCE", 1)
    seen, score_rows = [], rescoring.score_rows

    def interrupted(model, rows):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(row.audio for row in rows)
        return score_rows(model, rows)

    monkeypatch.setattr(rescoring, "score_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    (file,) = (path for path in (Path(recipe["output"]) / "1-rescoring").glob("*.jsonl"))
    file.write_text(file.read_text() + '\n{"key": "cut o')
    again = []
    monkeypatch.setattr(rescoring, "score_rows", lambda model, rows: (again.extend(rows), score_rows(model, rows))[1])
    first = VoxLMForSpeechSeq2Seq.from_pretrained(run(recipe)).config.reader_config
    assert len(again) == 2 and not {row.audio for row in again} & set(seen)
    monkeypatch.setattr(rescoring, "score_rows", None)
    assert VoxLMForSpeechSeq2Seq.from_pretrained(run(recipe)).config.reader_config == first


def test_settings_that_need_no_training_may_be_changed_before(recipe):
    recipe["stages"] = [{"kind": "rescoring", "recordings": 1, "settings": {"llm_prompt": "none", "num_beams": 2}}]
    model = VoxLMForSpeechSeq2Seq.from_pretrained(run(recipe))
    assert (model.config.reader_config["llm_prompt"], model.reader.num_beams) == ("none", 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"settings": {"prompt_ids": [4]}}, "settings: prompt_ids is part of the trained reader"),
        ({"settings": {"num_beams": 0}}, "num_beams"),
        ({"settings": {"beams": 3}}, "beams"),
        ({"learning_rate": 1.0}, "stages.0 has no option 'learning_rate'"),
        ({"recordings": 0}, "stages.0.recordings must be above 0"),
    ],
)
def test_a_stage_that_means_nothing_is_refused(recipe, change, message):
    recipe["stages"][0].update(change)
    with pytest.raises(RecipeError, match=message):
        run(recipe)


def test_without_speech_kept_out_of_training_there_is_nothing_to_tune_on(recipe):
    del recipe["data"]["dev"]
    with pytest.raises(RecipeError, match="stage 1, rescoring: the weights are tuned on `data.dev`"):
        run(recipe)
