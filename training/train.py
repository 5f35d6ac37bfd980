"""
Train a model from a recipe: `voxlm-train RECIPE.yaml [key.subkey=value ...]`.

An interrupted run resumes: started again, it loads the result of each finished stage from the output folder and
continues the current stage from its last checkpoint. `training/README.md` has a tutorial, `training/recipes` the
recipes.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from voxlm_hf import VoxLMForSpeechSeq2Seq

from .augment import Augmentation
from .data import SpeechDataset, read_rows
from .features import FeatureCache, encode_missing
from .reader import train_reader
from .trainer import VoxLMTrainer, trained_share
from .warm_start import warm_start


# Rows of the dev set that a warm start reports its error rate on, so that an evaluation is quick. Chosen by hand,
# not tuned.
WARM_START_DEV_ROWS = 100
# Steps at each end of a reader's training whose mean loss is printed. Chosen by hand, not tuned.
REPORTED_STEPS = 20
# Parts of the model that a stage can train, and what tells their parameters' names from all others.
PARTS = {"projector": "projector.", "alignment": "alignment.", "lora": ".lora_"}
# Options of `VoxLMTrainer` that a stage may set; all others are for `TrainingArguments`.
TRAINER_OPTIONS = ("seconds_per_batch", "state_noise", "max_new_tokens")


@dataclass
class Recipe:
    """
    The top level of a recipe.

    Args:
        model (`str` or `dict`): the model to train: folder or Hub id of a checkpoint, or the arguments of
            [`VoxLMForSpeechSeq2Seq.from_base_models`].
        output (`str`): folder for the results of the stages and the trained model.
        data (`dict`): "train" and, optionally, "dev", each a list of sources (see `voxlm_training.data.read_rows`); all
            other keys are arguments of `make_dataset`.
        stages (`list[dict]`): what to run, in order; each has a "kind" (a key of `STAGES`) and the options of that
            kind.
        seed (`int`): of everything random.
    """

    model: Any = MISSING
    output: str = MISSING
    data: dict[str, Any] = MISSING
    stages: list[dict[str, Any]] = MISSING
    seed: int = 0


def read_recipe(path: Path, overrides: list[str]) -> dict:
    """
    A recipe from YAML, with values replaced by `key.subkey=value`, as in OmegaConf: numbers index lists, values are
    YAML. Interpolations such as `${oc.env:HOME}` stay text, so a recipe reads nothing of the machine.

    Returns:
        the fields of [`Recipe`] as plain dicts and lists.

    Raises:
        ValueError: for an override without "=" or whose parent is not in the recipe, for an unknown or missing key at
            the top level, and for a value of the wrong type.
    """
    recipe = OmegaConf.load(path)
    for override in overrides:
        apply_override(recipe, override)
    known = [field.name for field in fields(Recipe)]
    unknown = sorted(set(recipe) - set(known))
    if unknown:
        raise ValueError(f"Unknown keys in the recipe: {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        recipe = OmegaConf.merge(OmegaConf.structured(Recipe), recipe)
        return OmegaConf.to_container(recipe, resolve=False, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{path} is not a valid recipe: {error}") from error


def apply_override(recipe: DictConfig, override: str):
    """Replace one value of `recipe` in place by `key.subkey=value`; see `read_recipe` for the errors."""
    name, equals, _ = override.partition("=")
    if not equals:
        raise ValueError(f"An override has the form key.subkey=value, got {override!r}")
    parent = name.rpartition(".")[0]
    try:
        parsed = OmegaConf.from_dotlist(["value=" + override.removeprefix(name + "=")])
        value = OmegaConf.to_container(parsed, resolve=False)["value"]
        # OmegaConf would make a missing parent, and a misspelt one would then do nothing.
        if parent and not OmegaConf.is_config(OmegaConf.select(recipe, parent)):
            raise KeyError(parent)
        OmegaConf.update(recipe, name, value, merge=False)
    except (KeyError, ValueError, IndexError, OmegaConfBaseException):
        raise ValueError(f"The recipe has no place {name!r} to set") from None


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
    The rows of `sources` as a dataset; prints which rows it leaves out and why.

    Args:
        augment (`bool`): augment each recording at random, in `copies` different ways.
        cache (`str`, *optional*): folder in which to keep encoder states.
        misheard (`float`): see [`SpeechDataset`].
        seed (`int`): of the augmentations.
        **filters: of `voxlm_training.data.read_rows`.

    Raises:
        ValueError: when no row is left.
    """
    rows, report = read_rows(sources, **filters)
    # By the row's place in its source, so that leaving some rows out does not change the others, nor encodes them
    # again.
    seeds = [[seed + row.place[0], row.place[1]] + ([copy] if copy else []) for copy in range(copies) for row in rows]
    rows = rows * copies
    augmentations = [
        Augmentation.draw(np.random.default_rng(numbers), row.words) if augment else Augmentation()
        for numbers, row in zip(seeds, rows)
    ]
    store, keys = None, None
    if cache is not None:
        store = FeatureCache(cache)
        keys = encode_missing(model, model.processor, rows, augmentations, store, report)
        kept = [number for number, key in enumerate(keys) if key is not None]
        rows, augmentations, keys = ([items[number] for number in kept] for items in (rows, augmentations, keys))
        report.kept = len(rows)
    print(report)
    if not rows:
        raise ValueError("No recording is left to use; see the report above")
    return SpeechDataset(rows, model.processor, augmentations, store, keys, misheard)


def trained_state(model) -> dict[str, torch.Tensor]:
    """Every weight that training may change: projector, alignment head, LoRA, and the reader without its decoder."""
    return {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(("projector.", "alignment.", "reader."))
        and not name.startswith("reader.decoder.")
        or ".lora_" in name
    }


def run_warm_start(model, train: SpeechDataset, dev: SpeechDataset | None, folder: Path, seed: int, **options):
    """A stage of kind "warm_start"; its options are those of `voxlm_training.warm_start.warm_start`."""
    for parameter in model.projector.parameters():
        parameter.requires_grad_(True)
    dev_rows = [dev[index] for index in range(min(WARM_START_DEV_ROWS, len(dev)))] if dev else []
    warm_start(model, model.processor, train, dev_rows, **options)


def run_reader(
    model, train: SpeechDataset, dev: SpeechDataset | None, folder: Path, seed: int, recordings=300, **options
):
    """
    A stage of kind "reader".

    Args:
        recordings (`int`): how many recordings to draw from those that leave room in the window for the end that the
            reader learns.
        options: of `voxlm_training.reader.train_reader`.
    """
    longest_s = model.config.audio_window_s - model.processor.frame_s * len(model.reader.end)
    rows = [row for row in train.rows if row.duration is None or row.duration <= longest_s]
    drawn = np.random.default_rng(seed).permutation(len(rows))[:recordings]
    waveforms = [model.processor.load_audio(rows[number].audio) for number in drawn]
    losses = train_reader(model, waveforms, seed=seed, **options)
    first, last = np.mean(losses[:REPORTED_STEPS]), np.mean(losses[-REPORTED_STEPS:])
    print(f"reader: mean loss {first:.3f} over the first {REPORTED_STEPS} steps, {last:.3f} over the last")


def run_trainer(model, train: SpeechDataset, dev: SpeechDataset | None, folder: Path, seed: int, **options):
    """
    A stage of kind "transcription" or "alignment".

    Args:
        options: "parts" (a list of the `PARTS` to train), `TRAINER_OPTIONS` of [`VoxLMTrainer`], and, all others, of
            [`TrainingArguments`].

    Raises:
        ValueError: for parts that do not exist, or that the data cannot train.
    """
    parts = options.pop("parts")
    check_parts(parts, train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(PARTS[part] in name for part in parts))
    own = {name: options.pop(name) for name in TRAINER_OPTIONS if name in options}
    trainer = VoxLMTrainer(
        model=model,
        args=training_arguments(folder, seed, evaluates=bool(dev), **options),
        train_dataset=train,
        eval_dataset=dev,
        data_collator=model.processor.collate,
        processor=model.processor,
        **own,
    )
    if trainer.is_world_process_zero():
        state = trainer.accelerator.state
        print(trained_share(model), f"{state.num_processes} process(es), {state.distributed_type}", sep="\n")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def check_parts(parts: list[str], train: SpeechDataset):
    """
    Raises:
        ValueError: for parts that do not exist, or that the data cannot train.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"Unknown parts {sorted(unknown)}; known are {sorted(PARTS)}")
    if "alignment" in parts and not any(row.words for row in train.rows):
        raise ValueError(
            "This stage trains the alignment head, but no recording has word times; add them with "
            "python -m voxlm_training.label_words"
        )
    if train.misheard and set(parts) != {"alignment"}:
        raise ValueError(
            f"`data.misheard` puts wrong words into the texts, which only the alignment head may learn from; got parts "
            f"{parts}"
        )


def training_arguments(folder: Path, seed: int, evaluates: bool, **options) -> TrainingArguments:
    """[`TrainingArguments`] with the defaults of our recipes, chosen by hand and not tuned; `options` override them."""
    has_gpu = torch.cuda.is_available()
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.0,
        "logging_steps": 20,
        "save_steps": 200,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": 200,
        "per_device_eval_batch_size": 8,
        "dataloader_pin_memory": has_gpu,
        "report_to": ["tensorboard"],
        "use_cpu": not has_gpu,
    }
    return TrainingArguments(output_dir=str(folder), remove_unused_columns=False, seed=seed, **{**defaults, **options})


STAGES: dict[str, Callable] = {
    "warm_start": run_warm_start,
    "transcription": run_trainer,
    "alignment": run_trainer,
    "reader": run_reader,
}


def run(recipe: dict) -> Path:
    """
    Run all stages of a recipe that are not finished yet.

    Args:
        recipe: the fields of [`Recipe`].

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
    train, dev = make_datasets(model, recipe["data"], seed)
    for number, stage in enumerate(recipe["stages"], 1):
        run_stage(model, train, dev, output / f"{number}-{stage['kind']}", seed, **stage)
    model.save_pretrained(output / "final")
    model.processor.save_pretrained(output / "final")
    return output / "final"


def make_datasets(model, data: dict, seed: int) -> tuple[SpeechDataset, SpeechDataset | None]:
    """The datasets to train and to evaluate on; the latter is neither augmented nor given wrong words."""
    options = dict(data)
    train_sources, dev_sources = options.pop("train"), options.pop("dev", None)
    train = make_dataset(model, train_sources, seed=seed, **options)
    if not dev_sources:
        return train, None
    plain = {**options, "augment": False, "copies": 1, "misheard": 0.0}
    return train, make_dataset(model, dev_sources, **plain)


def run_stage(model, train: SpeechDataset, dev: SpeechDataset | None, folder: Path, seed: int, kind: str, **options):
    """
    Run one stage and save what it trained in `folder`; if it is there from an earlier run, load it instead.

    Args:
        kind (`str`): a key of `STAGES`; options: of that kind, and for "reader" those of `add_reader`, "base" and
            "settings".
    """
    number = folder.name.partition("-")[0]
    if kind == "reader":
        base, settings = options.pop("base"), options.pop("settings", {})
        if model.reader is None:
            model.add_reader(base, **settings)
    result = folder / "trained.safetensors"
    if result.exists():
        print(f"stage {number}, {kind}: finished before")
        load_trained(model, result)
        return
    print(f"stage {number}, {kind}")
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    STAGES[kind](model, train, dev, folder, seed, **options)
    save_file(trained_state(model), result)


def load_trained(model, path: Path):
    """Load what `trained_state` saved, with the projector's vocabulary of then."""
    state = load_file(path)
    if "projector.token_ids" in state:
        model.set_projector_vocabulary(state["projector.token_ids"].tolist())
    model.load_state_dict(state, strict=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.subkey=value, the value in YAML")
    arguments = parser.parse_args()
    print("the trained model:", run(read_recipe(arguments.recipe, arguments.overrides)))


if __name__ == "__main__":
    main()
