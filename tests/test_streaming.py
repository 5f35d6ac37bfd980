"""Rows that are read as training needs them."""

import json
import re
from itertools import islice

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset
from transformers import TrainingArguments

from tests import tiny
from voxlm_training import data
from voxlm_training.recipe import RecipeError
from voxlm_training.streaming import SpeechStream
from voxlm_training.train import run
from voxlm_training.trainer import VoxLMTrainer


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "he", "hoped", "stew", "dinner"]


@pytest.fixture(scope="module")
def model():
    return tiny.model(lora_config={"r": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve recordings with another word each, as a manifest, and as three files of Parquet."""
    folder = tmp_path_factory.mktemp("streamed")
    lines = []
    for number, word in enumerate(WORDS):
        soundfile.write(folder / f"{number}.wav", tiny.noise(0.4 + 0.05 * number, number), tiny.RATE)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": word}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    for shard in range(3):
        files = [str(folder / f"{number}.wav") for number in range(4 * shard, 4 * shard + 4)]
        rows = {"audio": files, "text": WORDS[4 * shard : 4 * shard + 4]}
        Dataset.from_dict(rows).cast_column("audio", Audio(decode=False)).to_parquet(folder / f"{shard}.parquet")
    return folder


def sources(folder, kind):
    if kind == "manifest":
        return [{"manifest": str(folder / "manifest.jsonl"), "streaming": True}]
    files = [str(folder / f"{shard}.parquet") for shard in range(3)]
    options = {"data_files": files, "streaming": True, "cache_dir": str(folder / "cache")}
    return [{"dataset": "parquet", **options, **({"first": 0} if kind == "sliced" else {})}]


@pytest.mark.parametrize("kind", ["manifest", "parquet", "sliced"])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_the_rows_none_twice_and_none_lost(model, folder, kind, processes):
    """Also where there are more processes than shards."""
    stream = SpeechStream(sources(folder, kind), model.processor)
    shares = [[row.text for row in stream.one_pass((index, processes))] for index in range(processes)]
    assert sorted(word for share in shares for word in share) == sorted(WORDS)
    assert all(shares)
    if kind == "parquet" and processes == 3:
        assert shares == [WORDS[:4], WORDS[4:8], WORDS[8:]]


def test_a_source_is_read_ahead_by_no_more_than_a_buffer(model, monkeypatch):
    buffer, taken = 10, 0

    def endless(place, report):
        number = 0
        while True:
            assert number < taken + buffer, f"row {number} is read, but only {taken} are used"
            yield {"id": str(number), "audio": tiny.noise(0.3, number), "text": "fox", "duration": 0.3}
            number += 1

    monkeypatch.setitem(data.READERS, "endless", endless)
    stream = SpeechStream([{"endless": "", "streaming": True}], model.processor, buffer=buffer)
    for batch in islice(stream.batches(limit=45, seed=0, share=(0, 1)), 20):
        assert 1 <= len(batch) <= 3 and len(stream[batch[0]]["audio"]) == 4800
        taken += len(batch)
    assert taken > 3 * buffer


def test_every_pass_has_another_order_and_other_augmentations(model, folder):
    stream = SpeechStream(sources(folder, "manifest"), model.processor, augment=True, buffer=5)
    rows = [one for batch in islice(stream.batches(1, 0, (0, 1)), 24) for one in batch]
    first, second = ([one.row.text for one in part] for part in (rows[:12], rows[12:]))
    assert sorted(first) == sorted(second) == sorted(WORDS) and first != second
    assert len({one.augmentation.key for one in rows}) == 24
    again = [one for batch in islice(stream.batches(1, 0, (0, 1)), 24) for one in batch]
    assert [one.row.text for one in again] == [one.row.text for one in rows]


def test_what_cannot_be_decoded_is_skipped_with_a_line(model, folder, tmp_path, capsys):
    (tmp_path / "broken.wav").write_text("no audio")
    lines = [{"audio": "broken.wav", "text": "a", "duration": 1.0}, {"audio": str(folder / "0.wav"), "text": "b"}]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stream = SpeechStream([{"manifest": str(tmp_path / "manifest.jsonl")}], model.processor)
    batches = islice(stream.batches(1, 0, (0, 1)), 2)
    assert [stream[one]["text"] for batch in batches for one in batch] == ["b", "b"]
    assert f"skipped {tmp_path}/manifest.jsonl:1: " in capsys.readouterr().err
    none = SpeechStream([{"manifest": str(tmp_path / "manifest.jsonl"), "count": 0}], model.processor)
    with pytest.raises(ValueError, match="no recording to use"):
        next(iter(none.batches(1, 0, (0, 1))))


@pytest.fixture
def damaged(folder, tmp_path):
    """A manifest of the twelve recordings, in which those of some numbers cannot be decoded."""

    def make(numbers):
        (tmp_path / "broken.wav").write_text("no audio")
        files = ["broken.wav" if n in numbers else str(folder / f"{n}.wav") for n in range(12)]
        lines = [json.dumps({"audio": file, "text": word, "duration": 0.5}) for file, word in zip(files, WORDS)]
        (tmp_path / "damaged.jsonl").write_text("\n".join(lines))
        return [{"manifest": str(tmp_path / "damaged.jsonl"), "streaming": True}]

    return make


@pytest.mark.parametrize("numbers", [range(3, 5), range(2, 9), range(10), range(11, 12), range(8, 12), range(0, 12, 2)])
@pytest.mark.parametrize("limit", [1, 100, 1000])
@pytest.mark.parametrize("buffer", [512, 11])
def test_rows_that_lie_together_and_cannot_be_read_are_left_out(model, damaged, numbers, limit, buffer):
    stream = SpeechStream(damaged(numbers), model.processor, buffer=buffer)
    readable, seen, skipped = {word for n, word in enumerate(WORDS) if n not in numbers}, set(), 0
    for batch in stream.batches(limit, 0, (0, 1)):
        found = [item["text"] for item in stream.__getitems__(batch)]
        expected = [one.row.text for one in batch if one.row.text in readable]
        assert found == expected if expected else len(found) == 1 and found[0] in readable
        seen.update(one.row.text for one in batch)
        skipped += len(batch) - len(expected)
        if len(seen) == 12:
            break
    assert stream.skipped.take() >= skipped == len(numbers)


def test_the_report_is_of_one_pass_and_of_one_share(model, folder, capsys):
    stream = SpeechStream(sources(folder, "manifest"), model.processor)
    assert len(stream.draw(100, 0, 30.0)) == 12
    list(islice(stream.batches(1, 0, (0, 1)), 30))
    assert capsys.readouterr().out == "12 recordings kept, 0 left out\n"
    list(islice(stream.batches(1, 0, (1, 3)), 10))
    assert capsys.readouterr().out == "share 2 of 3 of the data: 4 recordings kept, 0 left out\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stage_says_how_many_rows_it_left_out_or_that_none_is_left(model, damaged, tmp_path, capfd, workers):
    data = {"train": damaged(range(2, 9)), "buffer": 64}
    model.save_pretrained(tmp_path / "base")
    model.processor.save_pretrained(tmp_path / "base")
    stage = {"kind": "transcription", "parts": ["lora"], "seconds_per_batch": 0.5, "max_steps": 12, "report_to": []}
    stage.update(save_strategy="no", dataloader_num_workers=workers)
    recipe = {"model": str(tmp_path / "base"), "output": str(tmp_path / "out"), "data": data, "stages": [stage]}
    run(recipe)
    (count,) = re.findall(r"stage 1, transcription: left out (\d+) times a recording", capfd.readouterr().out)
    assert int(count) >= 7
    damaged(range(12))
    with pytest.raises(RecipeError, match="^stage 1, transcription: None of 12 recordings can be read, such as /"):
        run({**recipe, "output": str(tmp_path / "none")})


def test_training_resumes_exactly_in_the_middle_of_a_pass(folder, tmp_path):
    state = tiny.model(lora_config={"r": 2}).state_dict()
    found = []
    for name, stops in (("whole", [6]), ("killed", [3, 6])):
        for stop in stops:
            toy = tiny.model(lora_config={"r": 2})
            toy.load_state_dict(state)
            arguments = TrainingArguments(
                output_dir=str(tmp_path / name), remove_unused_columns=False, use_cpu=True, disable_tqdm=True, seed=3,
                max_steps=6, learning_rate=1e-2, logging_steps=1, save_steps=2, report_to=[],
            )  # fmt: skip
            stream = SpeechStream(sources(folder, "manifest"), toy.processor, augment=True, seed=3, buffer=7)
            made = VoxLMTrainer(model=toy, args=arguments, train_dataset=stream, data_collator=toy.processor.collate,
                                processor=toy.processor, seconds_per_batch=1.5, state_noise=0.5)  # fmt: skip
            if stop < 6:
                made.add_callback(type("Kill", (type(made.callback_handler.callbacks[0]),), {"on_step_end": _kill})())
                with pytest.raises(KeyboardInterrupt):
                    made.resume()
            else:
                made.resume()
        found.append([log["loss"] for log in made.state.log_history if "loss" in log])
    assert found[0] == found[1] and len(found[0]) == 6


def _kill(self, arguments, state, control, **kwargs):
    if state.global_step == 3:
        raise KeyboardInterrupt


def test_streamed_recipes(folder, tmp_path):
    """What needs all rows, or their number, is refused before anything runs."""
    stage = {"kind": "transcription", "parts": ["lora"], "seconds_per_batch": 2.0, "max_steps": 1, "report_to": []}
    toy = tiny.model(lora_config={"r": 2})
    toy.save_pretrained(tmp_path / "base")
    toy.processor.save_pretrained(tmp_path / "base")
    recipe = {
        "model": str(tmp_path / "base"),
        "output": str(tmp_path / "out"),
        "data": {"buffer": 4, "train": sources(folder, "parquet"), "dev": sources(folder, "sliced")},
        "stages": [{**stage, "eval_steps": 1, "max_new_tokens": 2}],
    }
    assert np.isfinite(json.loads((run(recipe).parent / "1-transcription" / "log.json").read_text())[0]["eval_loss"])
    for change, message in (
        ({"stages": [{key: value for key, value in stage.items() if key != "max_steps"}]}, "needs `max_steps`"),
        ({"data": {**recipe["data"], "cache": str(tmp_path / "cache")}}, "no `cache`"),
        ({"data": {**recipe["data"], "buffer": 0}}, "`buffer` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run({**recipe, **change})
