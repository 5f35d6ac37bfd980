"""Loading and saving: LoRA, missing weights, base models, and what a saved folder needs to work where the package is not."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import voxlm_hf
from tests import HANGS_AFTER_S, tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq, loading_voxlm
from voxlm_hf.configuration_voxlm import WRONG_TRANSFORMERS
from voxlm_hf.loading_voxlm import (
    AUTO_MAP,
    base_folder,
    base_reference,
    base_state,
    check_missing,
    merge_lora,
    read_tensors,
    warn_if_untested,
    weights_digest,
    with_bases,
)
from voxlm_hub_export.export import export


MODULES = {path.name for path in Path(voxlm_hf.__file__).parent.glob("*_voxlm.py")}


@torch.no_grad()
def logits(model):
    processor = model.processor or tiny.model().processor
    return model(**processor.apply_transcription_request([tiny.noise(1.0, 0), tiny.noise(0.6, 1)])).logits


# LoRA

TARGETS = ["all-linear", ["q_proj"], ["q_proj", "down_proj"]]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_lora_survives_saving_and_loading(targets, tmp_path):
    model = tiny.randomise_lora(tiny.model(lora_config={"r": 2, "target_modules": targets}))
    model.save_pretrained(tmp_path)
    loaded, info = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_saved_twice_it_is_still_the_same(targets, tmp_path):
    model = tiny.randomise_lora(tiny.model(lora_config={"r": 2, "target_modules": targets}))
    model.save_pretrained(tmp_path / "once")
    VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "twice").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


# Values of the fields of peft's LoraConfig that a model keeps, each more than once where it matters; in the tiny LLM LoRA then
# has the number of layers that peft documents.
KEPT_LORA = {
    "r": [({"r": 3}, 14)],
    "lora_alpha": [({"lora_alpha": 2.5}, 14)],
    "lora_dropout": [({"lora_dropout": 0.5}, 14)],
    "target_modules": [
        ({"target_modules": r".*\.layers\.1\.self_attn\.[qk]_proj"}, 2),
        ({"target_modules": ["layers.0.mlp.up_proj", "v_proj"]}, 3),
        ({"target_modules": {"q_proj", "o_proj"}}, 4),
    ],
    "exclude_modules": [
        ({"exclude_modules": ["q_proj", "up_proj"]}, 10),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": "model.layers.1.self_attn.k_proj"}, 3),
    ],
    "use_rslora": [({"use_rslora": True}, 14)],
    "use_dora": [
        ({"use_dora": True}, 14),
        ({"use_dora": True, "target_modules": ".*0.*q_proj", "use_rslora": True}, 1),
    ],
    "layers_to_transform": [({"layers_to_transform": 1, "target_modules": ["q_proj", "down_proj"]}, 2)],
    "layers_pattern": [({"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["q_proj"]}, 1)],
    "rank_pattern": [({"rank_pattern": {"q_proj": 4, "layers.0.mlp.up_proj": 1}}, 14)],
    "alpha_pattern": [({"alpha_pattern": {".*_proj": 9}}, 14)],
    "init_lora_weights": [({"init_lora_weights": "gaussian"}, 14)],
}
# What describes an adapter and changes no weight.
DESCRIPTIVE_LORA = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
LORA_CASES = [case for cases in KEPT_LORA.values() for case in cases]


@pytest.fixture(scope="module")
def plain_bases(tmp_path_factory):
    """Two base models, and a model of them without LoRA."""
    folder = tmp_path_factory.mktemp("plain_bases")
    tiny.save_bases(folder, "qwen2")
    bases = str(folder / "audio"), str(folder / "text")
    return bases, VoxLMForSpeechSeq2Seq.from_base_models(*bases, lora_config=None)


# Numbered, since the order of a set differs between processes.
@pytest.mark.parametrize("fields, layers", LORA_CASES, ids=range(len(LORA_CASES)))
def test_all_that_lora_keeps_gives_equal_logits_however_it_is_stored(fields, layers, plain_bases, tmp_path):
    bases, plain = plain_bases
    model = VoxLMForSpeechSeq2Seq.from_base_models(*bases, lora_config={"r": 2, **fields})
    plain.load_state_dict({k.replace(".base_layer.", "."): v for k, v in model.state_dict().items()}, strict=False)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)  # new LoRA is the identity
    adapted = {name.split(".lora_A")[0] for name in model.state_dict() if ".lora_A." in name}
    assert len(adapted) == layers
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = logits(model)
    assert not torch.allclose(expected, logits(plain), atol=1e-3)

    model.save_pretrained(tmp_path / "once")
    VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    export(model, tmp_path / "delta", "delta", bases=bases)
    export(model, tmp_path / "merged")
    for name, tolerance in {"once": 0, "twice": 0, "delta": 0, "merged": 1e-4}.items():
        loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / name)
        loaded.processor = model.processor
        torch.testing.assert_close(logits(loaded), expected, atol=tolerance, rtol=0)
    export(model, tmp_path / "int8", "lora", "int8")
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "int8").state_dict()
    for name, tensor in model.state_dict().items():  # to the rounding of 8 bits and of bfloat16
        torch.testing.assert_close(loaded[name], tensor, atol=1e-2, rtol=1e-2)
    merge_lora(model.language_model)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LoraConfig)])
def test_every_field_of_pefts_lora_is_kept_or_refused_when_the_config_is_made(name):
    """A field that a newer peft adds is refused, until a case above shows that it is kept."""
    if name in DESCRIPTIVE_LORA:
        assert name not in tiny.config(lora_config={name: "something"}).lora_config
        return
    if name in KEPT_LORA:
        assert KEPT_LORA[name][0][0].items() <= tiny.config(lora_config=KEPT_LORA[name][0][0]).lora_config.items()
        return
    for value in ("all", True, ["q_proj"], {"a": 1}, 3):
        with pytest.raises(ValueError, match=f"`lora_config` cannot have {name}="):
            tiny.config(lora_config={name: value})


def test_what_peft_writes_of_a_lora_config_is_one():
    config = tiny.config(lora_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict())
    assert config.lora_config["r"] == 4 and config.lora_config["target_modules"] == ["q_proj"]
    assert not {"peft_type", "bias", "runtime_config", "megatron_core"} & set(config.lora_config)
    with pytest.raises(ValueError, match="peft_type"):
        tiny.config(lora_config=IA3Config(target_modules=["q_proj"], feedforward_modules=[]).to_dict())


@pytest.mark.parametrize("targets", [".*", ".*layers.*", "model", ["layers"], ["no_such_layer"], "x"], ids=str)
def test_targets_that_peft_cannot_adapt_are_named_in_one_line(targets):
    with pytest.raises(ValueError, match="LoRA cannot be where .* says") as error:
        tiny.model(lora_config={"target_modules": targets})
    assert repr(targets) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head", ".*(q_proj|lm_head)"])
def test_lora_outside_the_linear_layers_of_the_llm_is_refused(targets):
    with pytest.raises(ValueError, match="LoRA can be in linear layers inside the LLM"):
        tiny.model(lora_config={"target_modules": targets if "(" in targets else [targets]})


def test_dora_on_plain_base_weights_starts_as_the_identity(tmp_path):
    plain = tiny.model()
    plain.save_pretrained(tmp_path)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, lora_config={"r": 2, "use_dora": True})
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_plain_base_weights_load_into_a_lora_model(llm, targets, tmp_path):
    plain = tiny.model(llm=llm)
    plain.save_pretrained(tmp_path)
    config = tiny.model(llm=llm, lora_config={"r": 2, "target_modules": targets}).config
    model, info = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert info["missing_keys"] and all(".lora_" in key for key in info["missing_keys"])
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-6, rtol=0)


def test_lora_can_be_asked_for_when_loading(tmp_path):
    plain = tiny.model()
    plain.save_pretrained(tmp_path)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, lora_config={"r": 2})
    assert model.config.lora_config["r"] == 2 and any(".lora_A." in name for name in model.state_dict())
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-6, rtol=0)


def test_saved_base_weights_have_the_names_of_the_base(tmp_path):
    tiny.model(lora_config={"r": 2}).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    plain = set(tiny.model().state_dict()) - {"language_model.lm_head.weight"}  # tied to the embeddings
    assert plain <= names and all(".lora_" in name for name in names - plain)


def test_targets_are_saved_by_name(tmp_path):
    tiny.model(lora_config={}).save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "config.json").read_text())["lora_config"]["target_modules"]
    assert targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_under_lora_the_llm_itself_stays_untrained(tmp_path):
    tiny.model(lora_config={"r": 2}).save_pretrained(tmp_path)
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.startswith("language_model")} == {
        name for name in loaded.state_dict() if ".lora_" in name
    }
    assert not any(name.startswith("encoder") for name in trained)


def test_peft_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(loading_voxlm, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="pip install peft"):
        tiny.model(lora_config={})


@torch.no_grad()
def test_merging_is_the_low_rank_sum_of_the_paper():
    """W + alpha / r * B A (Hu et al. 2021)."""
    model = tiny.randomise_lora(tiny.model(lora_config={"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}))
    layer = model.language_model.model.layers[0].self_attn.q_proj
    parts = layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight
    base, up, down = (part.clone() for part in parts)
    expected = logits(model)
    merge_lora(model.language_model)
    merged = model.language_model.model.layers[0].self_attn.q_proj
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged.weight, base + 6 / 2 * up @ down)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


# Weights of the caller's, and the processor that belongs to them


def test_a_caller_gives_the_weights_himself():
    """As in the library's `test_from_pretrained_no_checkpoint` and `test_can_init_all_missing_weights`."""
    model = tiny.model(projector_readout="token_mixture", frame_gate_threshold=0.3, projector_vocab_size=20)
    state = model.state_dict()
    again = VoxLMForSpeechSeq2Seq.from_pretrained(None, config=model.config, state_dict=state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    for made in (model, tiny.model(projector_kind="conv"), tiny.with_reader()):
        new = VoxLMForSpeechSeq2Seq.from_pretrained(None, config=made.config, state_dict={}).state_dict()
        assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in new.values())
        assert torch.equal(new.get("projector.token_ids", torch.arange(20)), torch.arange(20))
        assert new.get("projector.start", torch.ones(1)).any() and new.get("projector.end", torch.ones(1)).any()
        assert (
            not new.get("projector.log_scale", torch.zeros(1)).any() and not new.get("reader.end", torch.zeros(1)).any()
        )
        assert not new.get("reader.spelling", torch.zeros(1)).any()


def test_the_processor_comes_from_where_the_weights_came_from(monkeypatch, tmp_path):
    """All options that say where on the Hub that is; but a download is not forced a second time."""
    tiny.model().save_pretrained(tmp_path / "sub")
    options = {
        "cache_dir": str(tmp_path / "cache"),
        "token": "t",
        "local_files_only": True,
        "proxies": {},
        "subfolder": "sub",
    }
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, revision="v1", force_download=True, **options)
    asked = []
    monkeypatch.setattr(
        loading_voxlm.VoxLMProcessor,
        "from_pretrained",
        lambda source, **kwargs: asked.append((source, kwargs)) or types.SimpleNamespace(),
    )
    model.get_processor()
    assert asked == [(str(tmp_path), {**options, "revision": "v1", "trust_remote_code": False})]
    model.processor, model.config._commit_hash = None, "c0ffee"
    model.get_processor()
    assert asked[1][1]["revision"] == "c0ffee"
    model.save_pretrained(tmp_path / "again")
    assert '"t"' not in (tmp_path / "again" / "config.json").read_text()


# Missing weights and versions


def test_missing_weights_are_an_error(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["projector.linear_in.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="projector.linear_in.weight"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)


def test_five_missing_weights_are_named_and_lora_may_be_missing():
    lora, others = ["a.lora_A.weight"], [f"w{number}" for number in range(7)]
    check_missing("here", lora + others, lora)
    with pytest.raises(ValueError, match="here lacks 7 weights of this model: w0, w1, w2, w3, w4 and 2 more"):
        check_missing("here", lora + others, lora + others)


LORA_A = "language_model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
# What is done to a checkpoint, and what must be named.
PARTIAL_LORA = {
    "one A": (lambda name: None if name == LORA_A else name, LORA_A),
    "no B": (lambda name: None if ".lora_B." in name else name, "lora_B.default.weight"),
    "only one A": (lambda name: None if ".lora_" in name and name != LORA_A else name, "lora_B.default.weight"),
    "renamed": (lambda name: name.replace(".default.", ".other."), "down_proj.lora_A.other.weight"),
    "one renamed": (lambda name: name.replace("1.self_attn.q_proj.lora_A", "1.x.lora_A"), "layers.1.x.lora_A"),
    "dora": (lambda name: None if "magnitude" in name else name, "lora_magnitude_vector"),
    "fresh": (lambda name: None if ".lora_" in name else name, None),
}


@pytest.mark.parametrize("kind", PARTIAL_LORA)
def test_lora_that_is_there_in_part_is_refused_and_named(kind, tmp_path):
    change, named = PARTIAL_LORA[kind]
    tiny.model(lora_config={"r": 2, "use_dora": kind == "dora"}).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items() if change(name)}
    save_file(tensors, file, metadata={"format": "pt"})
    if named is None:
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
        return
    with pytest.raises(ValueError, match="lacks .* weights of this model: ") as error:
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("version, warned", [("5.23.0", False), ("5.24.1", False), ("5.25.0", True), ("6.1", True)])
def test_an_untested_transformers_is_named(monkeypatch, version, warned):
    said = []
    monkeypatch.setattr(loading_voxlm, "transformers_version", version)
    monkeypatch.setattr(loading_voxlm.logger, "warning_once", said.append)
    warn_if_untested()
    assert said == ([WRONG_TRANSFORMERS] if warned else [])


@pytest.mark.parametrize("options", [{"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": "float32"}], ids=str)
def test_dtype_can_be_given_as_text_too(options, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    assert VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, **options).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16", torch.float64, "half", None], ids=str)
def test_a_new_model_takes_floating_dtypes_by_name(dtype, plain_bases):
    expected = {"bfloat16": torch.bfloat16, None: torch.float32, torch.float64: torch.float64}.get(dtype, torch.float16)
    assert VoxLMForSpeechSeq2Seq.from_base_models(*plain_bases[0], dtype=dtype).dtype == expected


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", torch.int64, "auto", "nn", "", 32, ["float32"]], ids=str)
def test_a_new_model_has_no_other_dtypes(dtype):
    with pytest.raises(ValueError, match="`dtype` must be one of float64, float32, float16, bfloat16, got") as error:
        VoxLMForSpeechSeq2Seq.from_base_models("a", "b", dtype=dtype)
    assert repr(dtype) in str(error.value)


def test_a_model_that_was_never_saved_says_where_its_processor_should_come_from():
    model = tiny.model()
    model.processor, model.config._name_or_path = None, ""
    with pytest.raises(ValueError, match="model.processor"):
        model.get_processor()


# Base models


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of an audio model and an LLM, the LLM itself, and a model composed of both."""
    folder = tmp_path_factory.mktemp("bases")
    llm = tiny.save_bases(folder, "llama")
    audio, text = str(folder / "audio"), str(folder / "text")
    return audio, text, llm, VoxLMForSpeechSeq2Seq.from_base_models(audio, text, prompt="Write down what you hear:")


def test_a_composed_model_has_the_weights_of_its_bases(bases):
    _, _, llm, model = bases
    weights = {name.replace(".base_layer.", "."): value for name, value in model.language_model.state_dict().items()}
    for name, value in llm.state_dict().items():
        assert torch.equal(weights[name][: len(value)], value), name


def test_a_composed_model_has_a_pad_token_and_a_placeholder_of_its_own(bases):
    _, text, _, model = bases
    tokenizer = model.processor.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert model.config.audio_token_id == tokenizer.convert_tokens_to_ids("<|audio|>")
    assert "<|audio|>" not in AutoTokenizer.from_pretrained(text).get_vocab()
    assert model.get_input_embeddings().num_embeddings == max(300, len(tokenizer))


def test_a_composed_model_takes_config_fields(bases):
    assert "Write down what you hear:" in bases[3].processor.render_prompt()
    assert bases[3].config.lora_config["r"] == 16


def test_a_composed_model_loads_as_it_was_saved(bases, tmp_path):
    model = bases[3]
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    expected = model.transcribe(tiny.noise(1.0), max_new_tokens=3)
    assert again.transcribe(tiny.noise(1.0), max_new_tokens=3) == expected


def test_both_bases_are_needed():
    with pytest.raises(ValueError, match="Both base models"):
        VoxLMForSpeechSeq2Seq.from_base_models(audio="x")


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="voxlm-2b"):
        VoxLMForSpeechSeq2Seq.from_base_models(preset="voxlm-3b")


def test_a_digest_covers_all_safetensors_in_the_order_of_their_names(tmp_path):
    for name, content in (("b.safetensors", b"two"), ("a.safetensors", b"one"), ("model.bin", b"ignored")):
        (tmp_path / name).write_bytes(content)
    assert weights_digest(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()


def test_a_base_without_safetensors_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="no safetensors weights"):
        weights_digest(tmp_path)


def test_a_folder_is_referenced_by_name_and_digest(bases):
    audio = bases[0]
    (file,) = Path(audio).glob("*.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert base_reference(audio) == {"name": audio, "revision": None, "sha256": digest}


def test_a_base_on_the_hub_is_pinned_to_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / ("c0ffee" * 7)[:40]
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    asked = []
    monkeypatch.setattr(
        loading_voxlm,
        "snapshot_download",
        lambda name, revision, **_: asked.append((name, revision)) or str(snapshot),
    )
    assert base_reference("some/llm@v2")["revision"] == snapshot.name
    assert asked == [("some/llm", "v2")]


def test_a_base_that_cannot_be_had_says_why(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(loading_voxlm, "snapshot_download", offline)
    with pytest.raises(ValueError, match="some/llm at revision c0ffee.*no route to host"):
        base_folder("some/llm", "c0ffee")


@pytest.fixture
def referenced(bases):
    """A config that references its bases, as that of a delta."""
    audio, text, _, model = bases
    config = tiny.config()
    config.base_models = {"audio": base_reference(audio), "text": base_reference(text)}
    return config, model


def test_the_weights_of_bases_have_the_names_of_the_model(referenced):
    config, model = referenced
    state, own = base_state(config), model.state_dict()
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in own.items()}
    assert {name.split(".")[0] for name in state} == {"encoder", "language_model"}
    for name, tensor in state.items():
        assert torch.equal(own[name][: len(tensor)], tensor), name


def test_other_weights_than_those_of_the_training_are_refused(referenced):
    config, _ = referenced
    config.base_models["text"]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="not those that this checkpoint was trained on.*expected 0000"):
        base_state(config)


def test_rows_that_a_delta_adds_come_after_those_of_the_base(referenced):
    config, _ = referenced
    name = "language_model.model.embed_tokens.weight"
    added = torch.full((2, 32), 7.0)
    state = with_bases({f"added.{name}": added, "projector.x": torch.ones(1)}, config)
    assert torch.equal(state[name][-2:], added) and torch.equal(state[name][:-2], base_state(config)[name])
    assert torch.equal(state["projector.x"], torch.ones(1))


def test_tensors_of_all_shards_are_read(tmp_path):
    for number in range(2):
        save_file({f"t{number}": torch.full((1,), float(number))}, tmp_path / f"{number}.safetensors")
    assert read_tensors(tmp_path) == {"t0": torch.zeros(1), "t1": torch.ones(1)}


# What a saved folder holds, and what it does where this package is not


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder written by `save_pretrained` of model and processor, not by an export; the bases come from folders too."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.save_bases(folder, "qwen2")
    model = VoxLMForSpeechSeq2Seq.from_base_models(folder / "audio", folder / "text", lora_config={"r": 2})
    tiny.randomise_lora(model).save_pretrained(folder / "model")
    model.processor.save_pretrained(folder / "model")
    return folder / "model", model


def test_a_saved_folder_holds_the_code(saved):
    assert {path.name for path in saved[0].glob("*.py")} == MODULES


def test_a_saved_config_says_where_the_code_is(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    modules = {name.split(".")[0] + ".py" for name in AUTO_MAP.values()}
    (task,) = config["custom_pipelines"].values()
    assert modules | {task["impl"].split(".")[0] + ".py"} <= MODULES


def test_a_saved_folder_names_no_folder_of_this_machine(saved):
    folder, _ = saved
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja")]
    assert {"config.json", "processor_config.json", "tokenizer_config.json"} <= {path.name for path in files}
    assert not [path.name for path in files if str(folder.parent) in path.read_text()]


STRANGER = """
import json, sys
import numpy as np, torch
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments, pipeline
folder, out = sys.argv[1:]
assert "voxlm_hf" not in sys.modules
audio = np.load(out + "/audio.npy")

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(**processor.apply_transcription_request(audio)).logits, out + "/logits.pt")
result = {"text": model.transcribe(audio, max_new_tokens=6).text}

pipe = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
result["pipeline"] = pipe(audio, return_timestamps="word", generate_kwargs={"max_new_tokens": 6})

words = [{"word": "he", "start": 0.1, "end": 0.3}, {"word": "hoped", "start": 0.3, "end": 0.8}]
rows = [{"audio": audio, "text": "he hoped", "words": words}, {"audio": audio[:9000], "text": "the lazy dog"}]
arguments = TrainingArguments(
    out + "/runs", max_steps=1, per_device_train_batch_size=2, remove_unused_columns=False, report_to=[], use_cpu=True,
    save_strategy="no", learning_rate=0.01,
)
before = {name: tensor.clone() for name, tensor in model.named_parameters()}
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=processor.collate)
result["loss"] = trainer.train().training_loss
result["changed"] = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
result["package"] = "voxlm_hf" in sys.modules
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def stranger(saved, tmp_path_factory):
    """What a process finds out that has transformers and the saved folder, and never imports this package."""
    out = tmp_path_factory.mktemp("stranger")
    audio = tiny.noise(1.2, 3)
    np.save(out / "audio.npy", audio)
    environment = {**os.environ, "HF_HOME": str(out / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, str(saved[0]), str(out)],
        env=environment,
        cwd=out,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "audio": audio, "logits": torch.load(out / "logits.pt", weights_only=True)}


def test_a_stranger_does_without_this_package(stranger):
    assert not stranger["package"]


def test_a_stranger_gets_the_same_logits(stranger, saved):
    _, model = saved
    with torch.no_grad():
        expected = model(**model.processor.apply_transcription_request(stranger["audio"])).logits
    assert torch.equal(stranger["logits"], expected)


def test_a_stranger_transcribes_the_same(stranger, saved):
    expected = saved[1].transcribe(stranger["audio"], max_new_tokens=6)
    assert stranger["text"] == stranger["pipeline"]["text"] == expected.text
    chunks = [chunk["text"] for chunk in stranger["pipeline"]["chunks"]]
    assert chunks == [word["word"] for word in expected.words]


def test_a_stranger_trains_a_step_with_the_librarys_trainer(stranger):
    assert 0 < stranger["loss"] < float("inf")
    changed = {name.split(".")[0] for name in stranger["changed"]}
    assert changed == {"projector", "language_model", "alignment"}
    assert not [name for name in stranger["changed"] if ".base_layer." in name or "embed_tokens" in name]


def test_a_folders_own_code_does_not_run_unless_asked(tmp_path):
    """A tokenizer class of the folder's, in a process with the package and without `trust_remote_code`."""
    model = tiny.model()
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilTokenizer: pass\n")
    for file in ("tokenizer_config.json", "processor_config.json"):
        content = json.loads((tmp_path / file).read_text())
        content["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", None], "AutoProcessor": "evil.EvilTokenizer"}
        (tmp_path / file).write_text(json.dumps(content))
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert not loaded.is_remote_code()
    try:
        loaded.get_processor()
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    assert not (tmp_path / "ran").exists()


def test_other_processes_write_nothing(tmp_path):
    tiny.model().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_what_is_pushed_holds_the_code(tmp_path, monkeypatch):
    """The library uploads the files that a save has changed."""
    model, uploaded = tiny.model(), []

    def upload(self, folder, repo_id, before, **kwargs):
        uploaded.extend(path.name for path in Path(folder).iterdir() if before.get(path.name) is None)

    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    monkeypatch.setattr(
        "transformers.modeling_utils.hf_api",
        lambda: types.SimpleNamespace(create_repo=lambda repo_id, **kwargs: types.SimpleNamespace(repo_id=repo_id)),
        raising=False,
    )
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
    assert {"modeling_voxlm.py", "config.json"} <= set(uploaded)
