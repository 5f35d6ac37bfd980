"""A reader through training and export: what it learns, recipes, and where its weights go."""

import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hub_export.export import export
from voxlm_training.data import Row, SpeechDataset
from voxlm_training.reader import make_examples
from voxlm_training.train import mark_trained, reader_trainer, run


@pytest.fixture
def bases(tmp_path):
    """The folders of a tiny Whisper and a tiny LLM."""
    tiny.save_whisper(tmp_path)
    return str(tmp_path / "audio"), str(tmp_path / "text")


@pytest.fixture
def model(bases):
    return VoxLMForSpeechSeq2Seq.from_base_models(*bases).add_reader(bases[0], end_frames=4)


QUIET = {"report_to": [], "disable_tqdm": True, "logging_steps": 1}


def test_training_teaches_the_end_and_nothing_else(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [Row(str(n), tiny.noise(seconds, n), "") for n, seconds in enumerate((0.5, 0.8, 1.0))]
    data = SpeechDataset(rows, model.processor)
    made = reader_trainer(model, data, None, tmp_path, 0, max_steps=30, learning_rate=0.05, **QUIET)
    made.resume()
    losses = [log["loss"] for log in made.state.log_history if "loss" in log]
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["reader.end"]


def test_examples_are_those_of_the_recordings_whatever_their_order(model, bases, tmp_path):
    """The folder of an earlier run holds for the same recordings, the same audio model and as many end frames alone."""
    rows = [Row(str(n), tiny.noise(seconds, n), "") for n, seconds in enumerate((0.5, 0.8, 1.0, 1.3))]
    lengths = make_examples(model, rows[:3], tmp_path).lengths
    assert len(set(lengths)) == 3
    shards = set(tmp_path.iterdir())
    assert make_examples(model, rows[2::-1], tmp_path).lengths == lengths[::-1]
    assert set(tmp_path.iterdir()) == shards, "nothing is decoded again"
    again = make_examples(model, rows[1:], tmp_path)
    assert again.lengths[:2] == lengths[1:] and len(again) == 3
    other = VoxLMForSpeechSeq2Seq.from_base_models(*bases).add_reader(bases[0], end_frames=6)
    assert make_examples(other, rows[:3], tmp_path).mean_silence(6).shape[0] == 6


def test_an_end_that_has_learned_goes_on_from_there(model, tmp_path):
    data = SpeechDataset([Row("0", tiny.noise(0.5, 0), "")], model.processor)
    with torch.no_grad():
        model.reader.end.fill_(0.25)
    mark_trained(model, {"reader"})
    made = reader_trainer(model, data, None, tmp_path, 0, max_steps=1, **QUIET)
    assert torch.all(made.model.reader.end == 0.25)


def test_a_recipe_adds_and_trains_a_reader_and_resumes_after_it(tmp_path, bases):
    rows = []
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", tiny.noise(0.6, number), tiny.RATE)
        rows.append(json.dumps({"audio": f"{number}.wav", "text": "the lazy dog"}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows))
    stage = {"kind": "reader", "base": bases[0], "settings": {"end_frames": 4}, "steps": 2, "recordings": 2}
    recipe = {
        "model": {"audio": bases[0], "text": bases[1]},
        "output": str(tmp_path / "runs"),
        "data": {"train": [{"manifest": str(tmp_path / "manifest.jsonl")}]},
        "stages": [stage],
    }
    first = VoxLMForSpeechSeq2Seq.from_pretrained(run(recipe))
    assert first.reader.end.any() and first.config.reader_config["in_window"] is False
    again = VoxLMForSpeechSeq2Seq.from_pretrained(run(recipe))  # the finished stage is loaded
    for name in ("end", "spelling", "spelling_offsets"):
        torch.testing.assert_close(getattr(first.reader, name), getattr(again.reader, name))


@pytest.mark.parametrize("mode, has_decoder", [("lora", True), ("delta", False)])
def test_exports_hold_the_decoder_apart_and_a_delta_takes_it_from_its_base(tmp_path, bases, model, mode, has_decoder):
    clip = tiny.noise(1.0, 3)
    export(model, tmp_path / "out", mode, **({"bases": bases} if mode == "delta" else {}))
    assert (tmp_path / "out" / "decoder.safetensors").exists() == has_decoder
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    assert loaded.transcribe(clip).text == model.transcribe(clip).text


def test_a_decoder_stored_in_8_bits_is_nearly_the_same(tmp_path, model):
    export(model, tmp_path / "int8", "lora", storage="int8")
    stored = load_file(tmp_path / "int8" / "decoder.safetensors")
    assert stored["reader.decoder.layers.0.fc1.weight"].dtype == torch.int8
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "int8").reader.decoder.state_dict()
    for name, tensor in model.reader.decoder.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, atol=0.02, rtol=0.02)
