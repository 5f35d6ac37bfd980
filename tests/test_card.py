"""The model card: filled, never with a figure that nobody measured, and what the Hub reads of it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from voxlm_hub_export.card import TEMPLATE, fill, table


ROOT = Path(__file__).resolve().parents[1]
RESULTS = json.loads((ROOT / "hub_export" / "results" / "voxlm-135m.json").read_text())
CARD = ROOT / "hub_export" / "voxlm-135m" / "README.md"


def test_the_shipped_card_is_the_template_filled():
    assert CARD.read_text() == fill(TEMPLATE.read_text(), RESULTS)


def test_the_hub_reads_what_was_measured():
    data = ModelCard.load(CARD).data
    assert data.library_name == "transformers" and data.pipeline_tag == "automatic-speech-recognition"
    assert (
        data.base_model == ["openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct"] and "custom_code" in data.tags
    )
    measured = [(result.dataset_name, result.metric_type, result.metric_value) for result in data.eval_results]
    assert measured == [(item["dataset"], item["metric"], item["value"]) for item in RESULTS["evaluations"]]
    assert f"{RESULTS['evaluations'][0]['value']:.2f} %" in CARD.read_text().split("## Measured")[1]


def test_a_missing_figure_is_an_error():
    for name in ("results", "evaluations", "training"):
        with pytest.raises(KeyError, match=name):
            fill(TEMPLATE.read_text(), {key: value for key, value in RESULTS.items() if key != name})


def test_tables():
    assert table([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]) == "| a | b |\n|---|---|\n| 1 | x |\n| 2 | y |"
