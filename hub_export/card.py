"""
Fill model_card.md with measured results: `python -m voxlm_hub_export.card RESULTS.json FOLDER` writes FOLDER/README.md.
"""

import argparse
import json
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard


TEMPLATE = Path(__file__).resolve().parents[1] / "model_card.md"


def table(rows: list[dict]) -> str:
    """A Markdown table of rows that have the same keys."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows])


def fill(template: str, results: dict) -> str:
    """
    The card's text; huggingface_hub checks and completes its metadata.

    Args:
        results: for every `$field` of the template a text, or a list of rows, which becomes a table; and "evaluations",
            a list of `{"dataset", "type", "split", "metric", "value"}`, each measured in a run, for the model index.

    Raises:
        KeyError: naming a field that `results` lacks.
    """
    values = {name: table(value) if isinstance(value, list) else value for name, value in results.items()}
    card = ModelCard(Template(template).substitute(values))
    card.data.model_name = results["name"]
    card.data.eval_results = [
        EvalResult(
            task_type="automatic-speech-recognition",
            dataset_name=item["dataset"],
            dataset_type=item["type"],
            dataset_split=item["split"],
            metric_type=item["metric"],
            metric_value=item["value"],
        )
        for item in results["evaluations"]
    ]
    return str(card)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    text = fill(TEMPLATE.read_text(), json.loads(arguments.results.read_text()))
    (arguments.folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()
