"""Checkpoints that are broken or made to do harm: what is wrong is named, and nothing of it is used."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq, VoxLMProcessor
from voxlm_hub_export.export import export


def saved_with(folder: Path, change, **fields):
    """A tiny checkpoint whose tensors `change` has altered."""
    tiny.model(lora_config={"r": 2}, **fields).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def one_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


NAN, INF = float("nan"), float("inf")
BROKEN_TENSORS = [
    (one_value(NAN), "has values that are not finite"),
    (one_value(-INF), "has values that are not finite"),
    (lambda tensor: torch.full_like(tensor, NAN), "has values that are not finite"),
    (lambda tensor: tensor.half().fill_(INF), "has values that are not finite"),
    (lambda tensor: tensor.int(), "is torch.int32, where the model has torch.float32"),
    (lambda tensor: tensor.to(torch.int8), "is torch.int8, where the model has torch.float32"),
    (lambda tensor: tensor.bool(), "is torch.bool, where the model has torch.float32"),
    (lambda tensor: tensor.to(torch.complex64), "is torch.complex64, where the model has torch.float32"),
    (lambda tensor: tensor.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, where the model has torch.float32"),
    (lambda tensor: tensor[:-1], "the config asks for"),
    (lambda tensor: tensor.unsqueeze(0), "the config asks for"),
]
TENSORS = [
    "encoder.layers.1.fc1.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.layers.1.self_attn.q_proj.lora_B.default.weight",
    "language_model.model.norm.weight",
]


@pytest.mark.parametrize("change, message", BROKEN_TENSORS)
@pytest.mark.parametrize("name", TENSORS)
def test_one_broken_tensor_is_named(name, change, message, tmp_path):
    saved_with(tmp_path, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(ValueError, match=f"model.safetensors: {re.escape(name)} .*{message}"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", [name for name in TENSORS if "lora" not in name and "bias" not in name and "norm" not in name]
)
def test_a_matrix_of_zeros_is_named(name, tmp_path):
    saved_with(tmp_path, lambda tensors: tensors.update({name: torch.zeros_like(tensors[name])}))
    with pytest.raises(ValueError, match=f"{name} is all zeros"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)


def test_a_file_of_zeros_is_refused_and_large_values_are_not(tmp_path):
    saved_with(tmp_path, lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match="is all zeros"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    saved_with(tmp_path, lambda tensors: {name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()})
    VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)  # finite, though their sum is not


def test_broken_tensors_of_8_bits_are_named(tmp_path):
    for number, (name, value) in enumerate({"weight": 0, "weight_scale": NAN}.items()):
        folder = tmp_path / str(number)
        export(tiny.model(), folder, storage="int8")
        file, name = folder / "language-model-1.safetensors", f"language_model.model.layers.0.mlp.up_proj.{name}"
        tensors = load_file(file)
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{name} (is all zeros|has values that are not finite)"):
            VoxLMForSpeechSeq2Seq.from_pretrained(folder)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.weight is torch.int8, where the model has torch.float32"):
        VoxLMForSpeechSeq2Seq.from_pretrained(folder)


def test_tokens_that_the_llm_does_not_have_are_named(tmp_path):
    mixing = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.5, "projector_vocab_size": 40}
    for token in (320, -1):
        saved_with(tmp_path, lambda tensors, token=token: tensors["projector.token_ids"].fill_(token), **mixing)
        with pytest.raises(ValueError, match="projector.token_ids names tokens .* the LLM has 320"):
            VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("cut", [0, 5, 2000, -1])
def test_a_truncated_shard_is_named(cut, tmp_path):
    export(tiny.model(), tmp_path / "model")
    file = tmp_path / "model" / "encoder.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="encoder.safetensors is truncated or no safetensors file"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    file.unlink()
    with pytest.raises(ValueError, match="lacks encoder.safetensors, which model.safetensors.index.json names"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "fields",
    [
        {"projector_hidden_size": 2**20},
        {"alignment_hidden_size": 2**20},
        {"alignment_num_blocks": 300},
        {"lora_config": {"r": 2**20}},
        {"projector_kind": "convnext", "projector_num_blocks": 10**9},
    ],
    ids=str,
)
def test_sizes_that_the_file_does_not_hold_are_refused_before_memory_is_taken(fields, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(
        ValueError, match="the config asks for|The config asks for|lacks .* weights|must be at (least|most)"
    ):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "{}/outside.safetensors", "link.safetensors", "deep/up.safetensors"]
)
@pytest.mark.parametrize("kind", ["whole", "delta"])
def test_weights_outside_the_folder_are_not_loaded(place, kind, tmp_path):
    folder, bases = tmp_path / "model", (str(tmp_path / "audio"), str(tmp_path / "text"))
    if kind == "delta":
        tiny.save_bases(tmp_path, "qwen2")
        export(VoxLMForSpeechSeq2Seq.from_base_models(*bases), folder, "delta", bases=bases)
    else:
        export(tiny.model(), folder)
    (folder / "trained.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "deep").symlink_to(tmp_path)
    (tmp_path / "up.safetensors").symlink_to("outside.safetensors")
    index = json.loads((folder / INDEX).read_text())
    for name, file in index["weight_map"].items():
        if file == "trained.safetensors":
            index["weight_map"][name] = place.format(tmp_path)
    (folder / INDEX).write_text(json.dumps(index))
    if place != "link.safetensors":
        (folder / "link.safetensors").unlink()
    with pytest.raises(ValueError, match="outside the checkpoint's folder"):
        VoxLMForSpeechSeq2Seq.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight_map": 3},
        {"weight_map": {"a": 3}, "metadata": {}},
        {"weight_map": {}},
        {"weight_map": {}, "metadata": {}},
    ],
)
def test_a_malformed_index_is_named(content, tmp_path):
    export(tiny.model(), tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=INDEX):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    export(tiny.model(), folder)
    return folder


# How many bytes stay, or what a file holds instead.
DAMAGE = [0, 1, 0.5, -3, b"null", b"[]", b"5", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
@pytest.mark.parametrize(
    "name", ["generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_a_damaged_file_beside_the_weights_is_named_in_one_line(name, damage, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    content = (folder / name).read_bytes()
    kept = int(len(content) * damage) if isinstance(damage, float) else damage
    (folder / name).write_bytes(damage if isinstance(damage, bytes) else content[:kept])
    for part in (VoxLMForSpeechSeq2Seq, VoxLMProcessor):
        with pytest.raises(ValueError, match=re.escape(str(folder / name))) as error:
            part.from_pretrained(folder)
        assert "\n" not in str(error.value)


def test_a_tokenizer_cut_at_the_end_of_an_object_is_named(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    file = folder / "tokenizer.json"
    content = file.read_text()
    file.write_text(content[: content.index("}") + 1])
    with pytest.raises(ValueError, match="tokenizer.json is not JSON"):
        VoxLMProcessor.from_pretrained(folder)


@pytest.mark.parametrize("value", [0, -1, "160", [160]], ids=str)
@pytest.mark.parametrize("field", ["hop_length", "n_fft", "sampling_rate"])
def test_an_analysis_of_audio_that_divides_by_nothing_is_named(field, value, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    content = json.loads((folder / "processor_config.json").read_text())
    content["feature_extractor"][field] = value
    (folder / "processor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"processor_config.json: {field} must be a number above 0, got"):
        VoxLMProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    "options", [{}, {"use_safetensors": False}, {"use_safetensors": None, "weights_only": False}], ids=str
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.distcp", None])
def test_only_safetensors_are_loaded(name, options, tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if name:
        torch.save(model.state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match="Only safetensors are loaded") as error:
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, **options)
    assert (name or "no model.safetensors") in str(error.value)
    assert "weights_only" not in str(error.value) and "use_safetensors" not in str(error.value)


def test_an_index_that_names_pickles_is_refused(tmp_path):
    export(tiny.model(), tmp_path / "model")
    torch.save({}, tmp_path / "model" / "evil.bin")
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "evil.bin")
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names 'evil.bin'. Only safetensors are loaded"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")


def test_what_is_no_checkpoint_says_just_that(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, so it is not a checkpoint"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc"}))
    with pytest.raises(ValueError, match="holds a peft adapter"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)


def test_base_models_are_safetensors_too(tmp_path):
    tiny.save_bases(tmp_path, "qwen2")
    file = tmp_path / "text" / "model.safetensors"
    torch.save(load_file(file), tmp_path / "text" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match="pickles: pytorch_model.bin"):
        VoxLMForSpeechSeq2Seq.from_base_models(tmp_path / "audio", tmp_path / "text")
