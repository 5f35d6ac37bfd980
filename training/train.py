"""
Train a model by a recipe: `voxlm-train RECIPE.yaml [key.subkey=value ...]`.

Killed and started again, it goes on: finished stages are read from the output folder, the one under way resumes from its last
checkpoint. `training/README.md` has a tutorial, `training/recipes` the recipes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from voxlm_hf import VoxLMForSpeechSeq2Seq

from .augment import Augmentation
from .collator import VoxLMCollator
from .data import SpeechDataset, read_rows
from .features import FeatureCache, encode_missing
from .reader import train_reader
from .trainer import VoxLMTrainer, trained_share
from .warm_start import warm_start


def read_recipe(path: Path, overrides: list[str]) -> dict:
    """
    A recipe from YAML, with values replaced by `key.subkey=value`; numbers index lists, values are YAML.

    Raises:
        ValueError: for an override without "=" or of a place that the recipe does not have.
    """
    recipe = yaml.safe_load(Path(path).read_text())
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"An override has the form key.subkey=value, got {override!r}")
        *parents, last = [int(part) if part.isdigit() else part for part in name.split(".")]
        place = recipe
        try:
            for part in parents:
                place = place[part]
            place[last] = yaml.safe_load(value)
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"The recipe has no place {name!r} to set") from None
    unknown = set(recipe) - {"model", "output", "seed", "data", "stages"}
    if unknown:
        raise ValueError(f"Unknown keys in the recipe: {', '.join(sorted(unknown))}")
    return recipe


def make_model(source: str | dict) -> VoxLMForSpeechSeq2Seq:
    """A model to train: a checkpoint by Hub id or folder, or the arguments of `from_base_models`."""
    if isinstance(source, dict):
        return VoxLMForSpeechSeq2Seq.from_base_models(**source)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(source)
    model.get_processor()
    return model


def make_dataset(
    model,
    sources: list[dict],
    augment: bool = False,
    copies: int = 1,
    cache: str | None = None,
    misheard: float = 0.0,
    seed: int = 0,
    **filters,
) -> SpeechDataset:
    """
    The rows of `sources` as a dataset; prints what was left out.

    Args:
        augment (`bool`): change each recording by chance, `copies` times in as many ways.
        cache (`str`, *optional*): folder in which to keep encoder states.
        misheard (`float`): see [`SpeechDataset`].
        **filters: of `training.data.read_rows`.
    """
    rows, report = read_rows(sources, **filters)
    # By the row's place, so that leaving some out changes nothing for the others (and nothing is encoded anew).
    seeds = [[seed + row.place[0], row.place[1]] + ([copy] if copy else []) for copy in range(copies) for row in rows]
    rows = rows * copies
    changes = [
        Augmentation.draw(np.random.default_rng(numbers), row.words) if augment else Augmentation()
        for numbers, row in zip(seeds, rows)
    ]
    store, keys = None, None
    if cache is not None:
        store = FeatureCache(cache)
        keys = encode_missing(model, model.processor, rows, changes, store, report)
        kept = [number for number, key in enumerate(keys) if key is not None]
        rows, changes, keys = ([items[number] for number in kept] for items in (rows, changes, keys))
        report.kept = len(rows)
    print(report)
    if not rows:
        raise ValueError("No recording is left to use; see the report above")
    return SpeechDataset(rows, model.processor, changes, store, keys, misheard)


def trained_state(model) -> dict[str, torch.Tensor]:
    """All of the model that training may change: projector, alignment head, LoRA, the reader but for its decoder."""
    return {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(("projector.", "alignment.", "reader."))
        and not name.startswith("reader.decoder.")
        or ".lora_" in name
    }


def run_warm_start(model, train: SpeechDataset, dev: SpeechDataset | None, folder: Path, seed: int, **options):
    """The stage of kind "warm_start"; its options are those of `training.warm_start.warm_start`."""
    for parameter in model.projector.parameters():
        parameter.requires_grad_(True)
    dev_rows = [dev[index] for index in range(min(100, len(dev)))] if dev else []
    warm_start(model, model.processor, train, dev_rows, **options)


def run_reader(
    model, train: SpeechDataset, dev: SpeechDataset | None, folder: Path, seed: int, recordings=300, **options
):
    """The stage of kind "reader", on so many of the recordings; its options are those of `training.reader.train_reader`."""
    longest_s = model.config.audio_window_s - model.processor.frame_s * len(model.reader.end)
    rows = [row for row in train.rows if row.duration is None or row.duration <= longest_s]
    drawn = np.random.default_rng(seed).permutation(len(rows))[:recordings]
    losses = train_reader(
        model, [model.processor.load_audio(rows[number].audio) for number in drawn], seed=seed, **options
    )
    print(f"reader: loss {np.mean(losses[:20]):.3f} at first, {np.mean(losses[-20:]):.3f} at last")


def run_trainer(model, train: SpeechDataset, dev: SpeechDataset | None, folder: Path, seed: int, **options):
    """
    A stage of kind "transcription" or "alignment".

    Args:
        options: "parts" (of "projector", "lora", "alignment": what is trained), those of [`VoxLMTrainer`] and, all others,
            of [`TrainingArguments`].
    """
    parts = options.pop("parts")
    prefixes = {"projector": "projector.", "alignment": "alignment.", "lora": ".lora_"}
    unknown = set(parts) - set(prefixes)
    if unknown:
        raise ValueError(f"Unknown parts {sorted(unknown)}; known are {sorted(prefixes)}")
    if "alignment" in parts and not any(row.words for row in train.rows):
        raise ValueError(
            "This stage trains the alignment head, but no recording has word times; add them with training/label_words.py"
        )
    if train.misheard and set(parts) != {"alignment"}:
        raise ValueError(
            f"`data.misheard` puts wrong words into the texts, which only the alignment head may learn from; got parts {parts}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(prefixes[part] in name for part in parts))
    own = {
        name: options.pop(name) for name in ("seconds_per_batch", "state_noise", "max_new_tokens") if name in options
    }
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.0,
        "logging_steps": 20,
        "save_steps": 200,
        "save_total_limit": 2,
        "eval_strategy": "steps" if dev else "no",
        "eval_steps": 200,
        "per_device_eval_batch_size": 8,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": ["tensorboard"],
        "use_cpu": not torch.cuda.is_available(),
    }
    arguments = TrainingArguments(
        output_dir=str(folder), remove_unused_columns=False, seed=seed, **{**defaults, **options}
    )
    trainer = VoxLMTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=dev,
        data_collator=VoxLMCollator(model.processor),
        processor=model.processor,
        **own,
    )
    if trainer.is_world_process_zero():
        state = trainer.accelerator.state
        print(trained_share(model), f"{state.num_processes} process(es), {state.distributed_type}", sep="\n")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


STAGES: dict[str, Callable] = {
    "warm_start": run_warm_start,
    "transcription": run_trainer,
    "alignment": run_trainer,
    "reader": run_reader,
}


def run(recipe: dict) -> Path:
    """
    Run all stages of a recipe that are not finished yet.

    Returns:
        the folder of the trained model, OUTPUT/final.

    Raises:
        ValueError: for an unknown stage, or no usable recording.
    """
    unknown = [stage.get("kind") for stage in recipe["stages"] if stage.get("kind") not in STAGES]
    if unknown:
        raise ValueError(f"Unknown kind of stage {unknown[0]!r}; known are {', '.join(STAGES)}")
    output, seed = Path(recipe["output"]), recipe.get("seed", 0)
    set_seed(seed)
    model = make_model(recipe["model"])
    data = dict(recipe["data"])
    train_sources, dev_sources = data.pop("train"), data.pop("dev", None)
    train = make_dataset(model, train_sources, seed=seed, **data)
    dev = None
    if dev_sources:
        dev = make_dataset(model, dev_sources, **{**data, "augment": False, "copies": 1, "misheard": 0.0})
    for number, stage in enumerate(recipe["stages"], 1):
        options = dict(stage)
        kind = options.pop("kind")
        if kind == "reader":
            base, settings = options.pop("base"), options.pop("settings", {})
            if model.reader is None:
                model.add_reader(base, **settings)
        folder = output / f"{number}-{kind}"
        result = folder / "trained.safetensors"
        if result.exists():
            print(f"stage {number}, {kind}: finished before")
            state = load_file(result)
            if "projector.token_ids" in state:
                model.set_projector_vocabulary(state["projector.token_ids"].tolist())
            model.load_state_dict(state, strict=False)
            continue
        print(f"stage {number}, {kind}")
        folder.mkdir(parents=True, exist_ok=True)
        set_seed(seed)
        STAGES[kind](model, train, dev, folder, seed, **options)
        save_file(trained_state(model), result)
    model.save_pretrained(output / "final")
    model.processor.save_pretrained(output / "final")
    return output / "final"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.subkey=value, read as YAML")
    arguments = parser.parse_args()
    print("the trained model:", run(read_recipe(arguments.recipe, arguments.overrides)))


if __name__ == "__main__":
    main()
