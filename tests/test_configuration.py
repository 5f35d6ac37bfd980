"""VoxLMConfig: defaults, validation, round trip."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from tests import tiny
from voxlm_hf import PRESETS, VoxLMConfig
from voxlm_hf.configuration_voxlm import preset_bases


def test_round_trip(tmp_path):
    config = tiny.config("wav2vec2", "granite", lora_config={"r": 4}, frame_gate_threshold=0.3, prompt="Hm?")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is VoxLMConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.audio_config.model_type == "wav2vec2" and loaded.text_config.model_type == "granite"
    assert loaded.lora_config["r"] == 4 and loaded.lora_config["lora_alpha"] == 32


def test_defaults_are_whisper_and_qwen2():
    config = VoxLMConfig()
    assert (config.audio_config.model_type, config.text_config.model_type) == ("whisper", "qwen2")
    assert config.projector_hidden_size == config.text_config.hidden_size
    assert config.confidence_calibration == {"scale": 1.0, "entropy": 0.0, "bias": 0.0}


@pytest.mark.parametrize(
    "field, value",
    [
        ("projector_kind", "linear"),
        ("projector_stride", 0),
        ("projector_stride", "four"),
        ("projector_hidden_size", -3),
        ("projector_num_blocks", -1),
        ("audio_window_s", 0),
        ("frame_gate_threshold", 1.5),
        ("alignment_hidden_size", 0),
        ("alignment_num_blocks", -1),
        ("alignment_median_width", 7),  # of a head that has its own decoder
        ("audio_token_id", 10**6),
        ("prompt_template", "no place for audio"),
        ("prompt_template", "{audio}{audio}"),
        ("prompt", 3),
        ("lora_config", {"r": 0}),
        ("lora_config", "r=4"),
        ("confidence_calibration", {"scale": 1.0}),
        ("confidence_calibration", {"scale": -1.0, "entropy": 0.0, "bias": 0.0}),
        ("confidence_calibration", {"scale": 1.0, "entropy": -1.0, "bias": 0.0}),
    ],
)
def test_validation_names_the_field(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        tiny.config(**{field: value})


def test_presets():
    assert preset_bases("voxlm-2b")[:2] == ("openai/whisper-small", "Qwen/Qwen2-1.5B")
    assert preset_bases("voxlm-9b-global")[2]["lora_config"]["r"] == 32
    assert {
        "voxlm-135m",
        "voxlm-0.5b",
        "voxlm-4b-multilingual",
        "voxlm-llama-8b",
        "voxlm-phi-4",
        "voxlm-gemma-9b",
    } < set(PRESETS)
    with pytest.raises(ValueError, match="voxlm-135m"):
        VoxLMConfig.preset("voxlm-1b")


def test_a_preset_reads_its_base_configs(monkeypatch):
    bases = {"openai/whisper-small": tiny.config().audio_config, "Qwen/Qwen2-1.5B": tiny.config().text_config}
    monkeypatch.setattr("voxlm_hf.configuration_voxlm.AutoConfig.from_pretrained", bases.__getitem__)
    config = VoxLMConfig.preset("voxlm-2b", prompt="Hm?")
    assert config.audio_config.d_model == 16 and config.text_config.hidden_size == 32
    assert config.lora_config["r"] == 16 and config.prompt == "Hm?"
