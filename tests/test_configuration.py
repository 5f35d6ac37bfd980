"""VoxLMConfig: defaults, validation, round trip."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from tests import tiny
from voxlm_hf import PRESETS, VoxLMConfig, VoxLMForSpeechSeq2Seq, configuration_voxlm
from voxlm_hf.configuration_voxlm import TESTED_TRANSFORMERS, preset_bases


def test_round_trip(tmp_path):
    config = tiny.config("wav2vec2", "granite", lora_config={"r": 4}, frame_gate_threshold=0.3, prompt="Hm?")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is VoxLMConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.audio_config.model_type == "wav2vec2" and loaded.text_config.model_type == "granite"
    assert loaded.lora_config["r"] == 4 and loaded.lora_config["lora_alpha"] == 32


def test_a_config_saved_alone_has_its_code(tmp_path):
    for config in (tiny.config(), VoxLMConfig()):
        config.save_pretrained(tmp_path)
        module = AutoConfig.from_pretrained(tmp_path).auto_map["AutoConfig"].split(".")[0]
        assert (tmp_path / f"{module}.py").is_file()


def test_defaults_are_whisper_and_qwen2():
    config = VoxLMConfig()
    assert (config.audio_config.model_type, config.text_config.model_type) == ("whisper", "qwen2")
    assert config.projector_hidden_size == config.text_config.hidden_size
    assert config.confidence_calibration == {"scale": 1.0, "entropy": 0.0, "bias": 0.0}


NAN, INF = float("nan"), float("inf")
BOTH = {"scale": 1.0, "entropy": 0.0, "bias": 0.0}
READER = {"prompt_ids": [1]}
BASE = {"name": "a", "revision": None, "sha256": "0" * 64}
# Values that no field takes: of other types, not finite, and beyond all limits.
COUNTS = ["4", 4.0, True, NAN, INF, [4], {}, -1, 10**9]
NUMBERS = ["4", True, NAN, INF, -INF, [4], {}, -1]
BAD_VALUES = {
    "projector_kind": ["linear", None, 3],
    "projector_stride": [*COUNTS, 0, None],
    "projector_hidden_size": [*COUNTS, 0],
    "projector_num_blocks": [*COUNTS, None],
    "projector_readout": ["mixture", None],
    "projector_vocab_size": [*COUNTS, 0, 321],
    "frame_gate_threshold": [*NUMBERS, 1.5, 1],
    "ctc_weight": [*NUMBERS, None],
    "alignment_kind": ["none", None],
    "alignment_hidden_size": [*COUNTS, 0, None],
    "alignment_num_blocks": [*COUNTS, None],
    "alignment_num_heads": [*COUNTS, 0, None],
    "alignment_median_width": [*COUNTS, 7],  # of a head that has its own decoder
    "audio_window_s": [*NUMBERS, 0, None, 10**6],
    "chunk_length_s": [*NUMBERS, 0, 31],
    "pad_audio_to_window": ["yes", 1, None],
    "freeze_audio_encoder": ["no", 0, None],
    "initializer_range": [*NUMBERS, None],
    "audio_token_id": [*COUNTS, 320],
    "prompt": [None, 3, ["a"]],
    "prompt_template": ["no place for audio", "{audio}{audio}", "{audio}{prompt}{prompt}", None, 3],
    "audio_config": [[1], "whisper", 3, True, {"model_type": "nope"}, {"model_type": 3}],
    "text_config": [[1], "qwen2", 3, True, {"model_type": "nope"}, {"model_type": ["qwen2"]}],
    "base_models": [
        [BASE],
        "x",
        {},
        {"audio": BASE},
        {"audio": BASE, "text": "x"},
        {"audio": BASE, "text": {"name": "a"}},
    ]
    + [{"audio": BASE, "text": {**BASE, name: value}} for name in BASE for value in (3, "", ["x"])],
    "fallback_temperatures": [0.2, "0.2", [True], ["a"], [0.0], [-1.0], [NAN], [INF], [None]],
    "quality_gates": [[1], "x", 3, {"unknown": 1.0}, {3: 1.0}]
    + [{"mean_logprob": value} for value in ("x", None, NAN, INF, True, [1])],
    "confidence_calibration": [
        [1],
        {"scale": 1.0},
        {**BOTH, "more": 1.0},
        {**BOTH, "scale": -1.0},
        {**BOTH, "reader": -1},
        {**BOTH, "posterior": "x"},
    ]
    + [{**BOTH, name: value} for name in BOTH for value in ("x", None, NAN, INF, True)],
    "reader_config": [
        [],
        3,
        {},
        {**READER, "unknown": 1},
        *({"prompt_ids": value} for value in (3, [], ["a"], [-1], [NAN])),
    ]
    + [{**READER, name: value} for name in ("num_beams", "end_frames", "spelling_size") for value in (*COUNTS, None)]
    + [
        {**READER, name: value}
        for name in ("llm_weight", "ctc_weight", "word_bonus")
        for value in ("x", None, NAN, True)
    ]
    + [{**READER, "language": value} for value in (3, None, "", ["en"])]
    + [{**READER, "previous_id": value} for value in ("1", -1, NAN, True)]
    + [{**READER, "languages": value} for value in (["en"], None, {"de": 1}, {"en": 2}, {"en": "1"}, {3: 1})]
    + [{**READER, "languages": {"en": 1, "de": 2}, "llm_weights": value} for value in ({"fr": 1.0}, {"de": NAN}, 1.0)]
    + [{**READER, name: value} for name in ("llm_prompt", "distinct_words") for value in ("text", None, 3, 0)],
    "lora_config": [
        "r=4",
        [4],
        3,
        *({"r": value} for value in (*COUNTS, 0, None)),
        *({"lora_alpha": v} for v in NUMBERS),
    ]
    + [{"lora_dropout": value} for value in (*NUMBERS, 1, None)]
    + [{"target_modules": value} for value in (None, [], "", 3, [3], {"q_proj": 1}, [""])]
    + [{n: v} for n in ("target_modules", "exclude_modules") for v in ("(", "*", "a[", "(?P<", "a{2,1}")]
    + [{"layers_to_transform": [0], "target_modules": ["q_proj"], "layers_pattern": v} for v in ("(", ["a", "("])]
    + [{name: {"(": 2}} for name in ("rank_pattern", "alpha_pattern")]
    + [{name: value} for name in ("use_dora", "use_rslora", "init_lora_weights") for value in ("yes", 3, None, "pissa")]
    + [{"layers_to_transform": value, "target_modules": ["q_proj"]} for value in ("0", [0.5], [-1], True, [2], 2)]
    + [{"layers_to_transform": [0], "target_modules": "all-linear"}, {"layers_pattern": "layers"}]
    + [{name: value} for name in ("rank_pattern", "alpha_pattern") for value in ([1], {"q_proj": 0}, {"q_proj": "x"})],
}


@pytest.mark.parametrize(
    "field, value", [(field, value) for field, values in BAD_VALUES.items() for value in values], ids=str
)
def test_validation_names_the_field_in_one_line(field, value):
    parts = {"audio_config": tiny.config().audio_config, "text_config": tiny.config().text_config}
    with pytest.raises(StrictDataclassError, match=field) as error:
        VoxLMConfig(**{**parts, field: value})
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value) and len(str(error.value)) < 600


BASE_SIZES = [("audio_config", name) for name in ("d_model", "encoder_layers", "encoder_attention_heads", "vocab_size")]
BASE_SIZES += [("text_config", n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")]


@pytest.mark.parametrize("part, name", BASE_SIZES)
@pytest.mark.parametrize("value", [10**9, -1, "4", None, NAN])
def test_sizes_of_the_bases_are_bounded_before_anything_is_made(part, name, value):
    fields = {**getattr(tiny.config(), part).to_dict(), name: value}
    with pytest.raises(StrictDataclassError, match=name):
        VoxLMConfig(**{part: fields})


def test_a_field_set_later_is_validated_too():
    config = tiny.config()
    config.alignment_hidden_size = 0
    with pytest.raises(ValueError, match="alignment_hidden_size"):
        config.validate()


@pytest.mark.parametrize("content", ["[1, 2]", '"voxlm"', "3", "null", "{", "", b"\xff\xfe{"])
def test_a_file_that_is_no_config_says_so(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="config.json (must hold a JSON object|is not JSON)"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("found", ["5.22.2", "4.57.1"])
def test_a_transformers_that_is_too_old_is_one_line(found):
    """In a process of its own, where the first file of a checkpoint's code is imported."""
    code = f"import transformers; transformers.__version__ = {found!r}; import configuration_voxlm"
    folder = Path(configuration_voxlm.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    wanted = f"ImportError: VoxLM needs transformers from 5.23 and before 5.25; this is {found}."
    assert run.returncode != 0 and run.stderr.splitlines()[-1].startswith(wanted)


def test_the_range_of_transformers_is_stated_once():
    """In pyproject.toml, the code and the README, and the pinned version lies in it."""
    root = Path(__file__).resolve().parents[1]
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "transformers>={},<{}".format(*TESTED_TRANSFORMERS) in dependencies
    readme, pinned = (root / "README.md").read_text(), (root / "constraints.txt").read_text()
    assert "`transformers` (5.23 or 5.24)" in readme and re.search(r"^transformers==5\.2[34]\.", pinned, re.MULTILINE)


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
