"""
Train a model from a recipe: `voxlm-train RECIPE.yaml [key.subkey=value ...]`.

An interrupted run resumes: started again, it loads the result of each finished stage from the output folder and
continues the current stage from its last checkpoint. `training/README.md` has a tutorial, `training/recipes` the
recipes.
"""

import argparse
import difflib
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Subset
from transformers import TrainingArguments, set_seed
from yaml import YAMLError

from voxlm_hf import VoxLMConfig, VoxLMForSpeechSeq2Seq
from voxlm_hf.app.files import UNFINISHED, move_into_place, tidy, unfinished_folder, write_atomically

from . import reader, rescoring, warm_start
from .augment import Augmentation
from .checkpoints import WriteError, check_shapes, naming_unwritten_files, written_whole
from .data import Limits, SpeechDataset, error_line, kind_of, read_rows
from .features import FeatureCache, encode_missing, weights_key
from .streaming import BUFFER, SpeechStream
from .trainer import StageTrainer, VoxLMTrainer, trained_share
from .values import check_report_to, check_value


# Rows of the dev set that a warm start reports its error rate on, so that an evaluation is quick. Chosen by hand,
# not tuned.
WARM_START_DEV_ROWS = 100
# Parts of the model that a stage can train, and what tells their parameters' names from all others.
PARTS = {"projector": "projector.", "alignment": "alignment.", "lora": ".lora_"}
# Options of `VoxLMTrainer` that a stage may set; all others are for `TrainingArguments`.
TRAINER_OPTIONS = ("seconds_per_batch", "state_noise", "max_new_tokens")
# Kinds of sources whose place is a file or a folder.
ON_DISK = ("manifest", "folder", "librispeech")


class RecipeError(ValueError):
    """What a recipe asks for cannot be done; its message is all that the user needs."""


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
        OSError, ValueError: for a file that cannot be read or is no YAML, for an override without "=" or whose parent is
            not in the recipe, for an unknown or missing key at the top level, and for a value of the wrong type.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe may never end
        raise ValueError(f"{path} is no regular file")
    try:
        recipe = OmegaConf.load(path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{path} is not a recipe: {error}") from error  # of OmegaConf, for a bare number
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, DictConfig):
        raise ValueError(f"{path} is not a recipe: it holds no keys and values")
    for override in overrides:
        apply_override(recipe, override)
    known = [field.name for field in fields(Recipe)]
    unknown = sorted(map(str, set(recipe) - set(known)))
    if unknown:
        raise ValueError(f"Unknown keys in the recipe: {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        recipe = OmegaConf.merge(OmegaConf.structured(Recipe), recipe)
        return OmegaConf.to_container(recipe, resolve=False, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
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
    """
    A model to train: a checkpoint by Hub id or folder, or the arguments of `from_base_models`.

    Raises:
        ValueError: naming the model, when it cannot be loaded.
    """
    if isinstance(source, dict):
        return VoxLMForSpeechSeq2Seq.from_base_models(**source)
    try:
        model = VoxLMForSpeechSeq2Seq.from_pretrained(source)
        model.get_processor()
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {source} cannot be loaded: {error}") from error
    return model


def make_dataset(
    model,
    sources: list[dict],
    augment: bool = False,
    copies: int = 1,
    cache: str | None = None,
    misheard: float = 0.0,
    seed: int = 0,
    **limits,
) -> SpeechDataset:
    """
    The rows of `sources` as a dataset; prints which rows are left out and why.

    Args:
        augment (`bool`): augment each recording at random, in `copies` different ways.
        cache (`str`, *optional*): folder in which to keep encoder states.
        misheard (`float`): see [`SpeechDataset`].
        seed (`int`): of the augmentations.
        **limits: of [`Limits`].

    Raises:
        ValueError: when no row is left.
    """
    rows, report = read_rows(sources, **limits)
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
        store = FeatureCache(cache, weights_key(model.encoder), model.config.audio_hidden_size)
        keys = encode_missing(model, model.processor, rows, augmentations, store, report)
        kept = [number for number, key in enumerate(keys) if key is not None]
        rows, augmentations, keys = ([items[number] for number in kept] for items in (rows, augmentations, keys))
        report.kept = len(rows)
    if PartialState().is_main_process:
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


def warm_start_trainer(
    model, train, dev, folder: Path, seed: int, merges=800, noise=1.0, frames_per_batch=8000, **options
):
    """
    The trainer of a stage of kind "warm_start".

    Args:
        merges, noise, frames_per_batch: of [`WarmStartTrainer`]; the defaults were chosen by hand, not tuned.
        options: of [`TrainingArguments`].
    """
    arguments = training_arguments(folder, seed, bool(dev), **{**warm_start.ARGUMENTS, **options})
    return warm_start.WarmStartTrainer(
        voxlm=model.to(arguments.device),
        args=arguments,
        merges=merges,
        noise=noise,
        frames_per_batch=frames_per_batch,
        train_dataset=train,
        eval_dataset=Subset(dev, range(min(WARM_START_DEV_ROWS, len(dev)))) if dev else None,
    )


def reader_trainer(model, train, dev, folder: Path, seed: int, recordings=300, frames_per_batch=6000, **options):
    """
    The trainer of a stage of kind "reader".

    Args:
        recordings (`int`): how many recordings to draw from those that leave room in the window for the end that the
            reader learns.
        frames_per_batch: of [`ReaderTrainer`]; the default was chosen by hand, not tuned.
        options: of [`TrainingArguments`].
    """
    options = {**reader.ARGUMENTS, **options}
    decay = {"lr_end": reader.FINAL_SHARE * options["learning_rate"], "power": 1.0}
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": decay}
    arguments = training_arguments(folder, seed, False, **{**schedule, **options})
    longest_s = model.config.audio_window_s - model.processor.frame_s * len(model.reader.end)
    rows = train.draw(recordings, seed, longest_s)
    examples = reader.make_examples(model.to(arguments.device), rows, folder / "examples")
    return reader.ReaderTrainer(
        reader=model.reader,
        fresh=model.config.reader_config["in_window"],
        args=arguments,
        frames_per_batch=frames_per_batch,
        train_dataset=examples,
    )


def transcription_trainer(model, train, dev, folder: Path, seed: int, parts: list[str], **options):
    """
    The trainer of a stage of kind "transcription" or "alignment".

    Args:
        parts: of the `PARTS`, those to train; options: `TRAINER_OPTIONS` of [`VoxLMTrainer`] and, all others, of
            [`TrainingArguments`].

    Raises:
        ValueError: for parts that do not exist, or that the data cannot train.
    """
    check_parts(parts, train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(PARTS[part] in name for part in parts))
    own = {name: options.pop(name) for name in TRAINER_OPTIONS if name in options}
    return VoxLMTrainer(
        model=model,
        args=training_arguments(folder, seed, bool(dev), **options),
        train_dataset=train,
        eval_dataset=dev,
        data_collator=model.processor.collate,
        processor=model.processor,
        **own,
    )


def check_parts(parts: list[str], train: SpeechDataset | SpeechStream):
    """
    Raises:
        ValueError: for parts that do not exist, or that the data cannot train.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"Unknown parts {sorted(unknown)}; known are {sorted(PARTS)}")
    # What a stream holds is not known beforehand.
    if "alignment" in parts and train.rows is not None and not any(row.words for row in train.rows):
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
    has_accelerator = torch.accelerator.is_available()
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
        "dataloader_pin_memory": has_accelerator,
        "report_to": ["tensorboard"],
        "use_cpu": not has_accelerator,
        # Every parameter that a stage trains has a gradient in every step.
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(output_dir=str(folder), remove_unused_columns=False, seed=seed, **{**defaults, **options})


# What makes the trainer of each kind of stage; "rescoring" has none.
STAGES: dict[str, Callable[..., StageTrainer | None]] = {
    "warm_start": warm_start_trainer,
    "transcription": transcription_trainer,
    "alignment": transcription_trainer,
    "reader": reader_trainer,
    "rescoring": rescoring.tune_stage,
}


def run(recipe: dict) -> Path:
    """
    Run all stages of a recipe that are not finished yet.

    Args:
        recipe: the fields of [`Recipe`].

    Returns:
        the folder of the trained model, OUTPUT/final.

    Raises:
        RecipeError: for a recipe with unknown keys, stages or paths, without a usable recording, or changed since an
            earlier run in the same folder; and for a stage that cannot go on.
    """
    output, seed = Path(recipe["output"]), recipe.get("seed", 0)
    try:
        check_recipe(recipe)
        set_seed(seed)
        model = make_model(recipe["model"])
        on_cpu = bool(recipe["stages"]) and all(stage.get("use_cpu") for stage in recipe["stages"])
        model.encoder.to(training_arguments(output, seed, False, **({"use_cpu": True} if on_cpu else {})).device)
        train, dev = make_datasets(model, recipe["data"], seed)
        for stage in recipe["stages"]:
            check_parts(stage.get("parts", []), train)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise RecipeError(error_line(error)) from error
    for number, stage in enumerate(recipe["stages"], 1):
        run_stage(model, train, dev, output / f"{number}-{stage['kind']}", seed, **stage)
    if PartialState().is_main_process:
        save_model(model, output / "final")
    PartialState().wait_for_everyone()
    return output / "final"


def save_model(model, folder: Path):
    """Save a model and its processor in a folder that is never half a model: the one before stays until it is whole."""
    folder = folder.resolve()  # what a link stands for is replaced, not the link
    tidy(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        model.processor.save_pretrained(unfinished)
        move_into_place(unfinished, folder)


def make_datasets(model, data: dict, seed: int) -> tuple[SpeechDataset | SpeechStream, SpeechDataset | None]:
    """
    The datasets to train and to evaluate on; the latter is neither augmented nor given wrong words, and always in memory.

    Raises:
        ValueError: when no row is left, and for streamed data with a cache or copies.
    """
    options = dict(data)
    train_sources, dev_sources = options.pop("train"), options.pop("dev", None)
    buffer = options.pop("buffer", BUFFER)
    if is_streamed(data):
        if options.pop("cache", None) is not None or options.pop("copies", 1) != 1:
            raise ValueError(
                "data: streamed data has no `cache` and no `copies`, which need all rows beforehand; every pass over it has "
                "other augmentations"
            )
        train = SpeechStream(train_sources, model.processor, seed=seed, buffer=buffer, **options)
    else:
        train = make_dataset(model, train_sources, seed=seed, **options)
    if not dev_sources:
        return train, None
    plain = {**options, "augment": False, "copies": 1, "misheard": 0.0}
    return train, make_dataset(model, dev_sources, **plain)


def is_streamed(data: dict) -> bool:
    """Whether a source of the training data has `streaming`; then all of it is streamed."""
    return any(isinstance(source, dict) and source.get("streaming") for source in data.get("train") or [])


def run_stage(model, train, dev, folder: Path, seed: int, kind: str, **options):
    """
    Run one stage and save what it trained in `folder`; if it is there from an earlier run, load it instead.

    Args:
        kind (`str`): a key of `STAGES`; options: of that kind, and for "reader" those of `add_reader`, "base" and
            "settings". A stage of kind "rescoring" trains nothing and returns at once what it found.

    Raises:
        RecipeError: when the stage cannot begin or go on.
    """
    number, processes, result = folder.name.partition("-")[0], PartialState(), folder / "trained.safetensors"
    if "steps" in options:
        options["max_steps"] = options.pop("steps")
    try:
        if kind == "rescoring":
            return rescoring.tune_stage(model, dev, folder, seed, **options)
        if kind == "reader":
            base, settings = options.pop("base"), options.pop("settings", {})
            if model.reader is None:
                model.add_reader(base, **settings)
        finished = load_trained(model, result)
        processes.wait_for_everyone()  # nobody may see a result that this run is about to write
        if processes.is_main_process:
            print(f"stage {number}, {kind}" + (": finished before" if finished else ""))
        parts = {"warm_start": {"projector"}, "reader": {"reader"}}.get(kind) or set(options.get("parts", []))
        if finished:
            mark_trained(model, parts)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if processes.is_main_process:
            for path in folder.glob(f".*{UNFINISHED}"):
                path.unlink()  # of a run that was killed while it wrote
        set_seed(seed)
        trainer = STAGES[kind](model.eval(), train, dev, folder, seed, **options)
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"stage {number}, {kind}: {error_line(error)}") from error
    if processes.is_main_process:
        state = trainer.accelerator.state
        print(trained_share(trainer.model), f"{state.num_processes} process(es), {state.distributed_type}", sep="\n")
    try:
        trainer.resume()
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: memory or a disk that is full
        raise RecipeError(f"stage {number}, {kind}: {error_line(error)}") from error
    mark_trained(model, parts)
    skipped = sum(gather_object([train.skipped.take()]))
    if processes.is_main_process:
        if skipped:
            print(
                f"stage {number}, {kind}: left out {skipped} times a recording that could not be read; see the lines above"
            )
        write_atomically(folder / "log.json", json.dumps(trainer.state.log_history, indent=1).encode())
        with written_whole(result) as unfinished:
            save_file(trained_state(model), unfinished)
    model.eval()
    processes.wait_for_everyone()


def mark_trained(model, parts: set[str]):
    """Note in a model's config which parts that composing made anew, or the reader's end frames, have been trained."""
    for part in parts & {"projector", "alignment"}:
        setattr(model.config, f"{part}_trained", True)
    if "reader" in parts:
        model.config.reader_config["in_window"] = False


def load_trained(model, path: Path) -> bool:
    """
    Load what `trained_state` saved, with the projector's vocabulary of then. Whether it is there and whole; a line says
    when it is damaged.

    Raises:
        ValueError: where the model trains other weights, as after a change of the recipe.
    """
    if not path.exists():
        return False
    try:
        state = load_file(path)
    except SafetensorError as error:
        print(f"{path} is damaged, the stage runs again: {error_line(error)}")
        return False
    if "projector.token_ids" in state and model.config.projector_readout == "token_mixture":
        model.set_projector_vocabulary(state["projector.token_ids"].tolist())
    shapes = (
        {name: tuple(tensor.shape) for name, tensor in weights.items()} for weights in (state, trained_state(model))
    )
    check_shapes(path, *shapes)
    model.load_state_dict(state, strict=False)
    return True


def check_recipe(recipe: dict):
    """
    Raises:
        ValueError, OSError: for unknown keys, unknown kinds, values of the wrong type, and files that are not there, each
            with its place in the recipe.
    """
    if isinstance(recipe["model"], dict):
        parameters = [field.name for field in fields(VoxLMConfig)]
        check_keys("model", recipe["model"], {"audio", "text", "preset", "dtype", *parameters})
        for name in ("audio", "text"):
            if name in recipe["model"]:
                check_value(f"model.{name}", recipe["model"][name], str)
    else:
        check_value("model", recipe["model"], str)
    data = recipe["data"]
    known = {*options_of(make_dataset), *options_of(Limits), "train", "dev", "buffer"}
    check_keys("data", data, known - {"model", "sources", "seed", "limits"})
    kinds = {"buffer": int, **get_type_hints(make_dataset), **get_type_hints(Limits)}
    for name in ("train", "dev"):
        sources = data.get(name)
        if not isinstance(sources, list) and not (sources is None and name == "dev") or not sources and name == "train":
            raise ValueError(f"data.{name} must be a list of sources, got {sources!r}")
        for number, source in enumerate(sources or []):
            check_source(f"data.{name}.{number}", source)
    for name in data.keys() - {"train", "dev"}:
        check_value(f"data.{name}", data[name], kinds[name])
    streamed = is_streamed(data)
    for number, stage in enumerate(recipe["stages"]):
        check_stage(f"stages.{number}", stage, streamed)


def check_source(place: str, source: dict):
    """
    Raises:
        ValueError, OSError: for a source of no kind, with unknown options, or whose file or folder is not there.
    """
    try:
        kind = kind_of(source)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if kind in ON_DISK and not Path(str(source[kind])).exists():
        raise FileNotFoundError(f"{place}.{kind}: there is no {source[kind]}")


def check_stage(place: str, stage: dict, streamed: bool):
    """
    Raises:
        ValueError: for a stage of an unknown kind, with unknown or missing options or values of the wrong type, or
            without `max_steps` on streamed data.
    """
    kind = stage.get("kind")
    if not isinstance(kind, str) or kind not in STAGES:
        raise ValueError(f"{place}: unknown kind of stage {kind!r}; known are {', '.join(STAGES)}")
    arguments = get_type_hints(TrainingArguments)
    arguments = {field.name: arguments[field.name] for field in fields(TrainingArguments) if kind != "rescoring"}
    taken = {"output_dir", "remove_unused_columns", "seed"}
    own = options_of(STAGES[kind]) - {"model", "train", "dev", "folder", "seed", "options"}
    extra = {"reader": {"base", "settings", "steps"}, "warm_start": {"steps"}, "rescoring": set()}
    extra = extra.get(kind, set(TRAINER_OPTIONS))
    check_keys(place, stage, {"kind", *own, *extra, *arguments} - taken)
    needed = {"reader": ["base"], "warm_start": [], "rescoring": []}.get(kind, ["parts", "seconds_per_batch"])
    for name in needed:
        if name not in stage:
            raise ValueError(f"{place}: a stage of kind {kind} needs `{name}`")
    parts = stage.get("parts", [])
    known = isinstance(parts, list) and all(isinstance(part, str) and part in PARTS for part in parts)
    if not known or "parts" in stage and not parts:
        raise ValueError(f"{place}.parts: unknown parts {parts!r}; a list of some of {', '.join(PARTS)} is needed")
    kinds = {"base": str, "steps": int, "seconds_per_batch": float, "state_noise": float, "max_new_tokens": int}
    kinds = {**arguments, **{name: type(value) for name, value in defaults_of(STAGES[kind]).items()}, **kinds}
    for name, value in stage.items():
        check_value(f"{place}.{name}", value, kinds.get(name))
    if "report_to" in stage:
        check_report_to(f"{place}.report_to", stage["report_to"])
    if streamed and kind in ("transcription", "alignment") and stage.get("max_steps", 0) < 1:
        raise ValueError(f"{place}: streamed data has no end, so the stage needs `max_steps`")


def check_keys(place: str, given: dict, known: Iterable[str]):
    """Raise a `ValueError` that names the first key of `given` that is not known, and the likeliest one that is."""
    if not isinstance(given, dict):
        raise ValueError(f"{place} must have keys and values, got {given!r}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"{place} has no option {key!r}; {hint}")


def options_of(function: Callable) -> set[str]:
    """The names of the arguments that a function takes."""
    return set(inspect.signature(function).parameters)


def defaults_of(function: Callable) -> dict[str, Any]:
    """The defaults of a function's arguments."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.subkey=value, the value in YAML")
    arguments = parser.parse_args()
    try:
        recipe = read_recipe(arguments.recipe, arguments.overrides)
    except (ValueError, OSError) as error:
        sys.exit(refusal(error))
    cache = recipe["data"].get("cache") if isinstance(recipe["data"], dict) else None
    written = [Path(folder) for folder in (recipe["output"], cache) if isinstance(folder, str)]
    try:
        with naming_unwritten_files(written):
            final = run(recipe)
    except RecipeError as error:
        sys.exit(refusal(error))
    except WriteError as error:
        print(file=sys.stderr)  # ends the line of the progress bar
        sys.exit(refusal(error))
    except KeyboardInterrupt:
        print("voxlm-train: interrupted; run it again to resume", file=sys.stderr)
        sys.exit(130)
    if PartialState().is_main_process:
        print("the trained model:", final)


def refusal(error: Exception) -> int:
    """Say on one line of stderr why nothing is trained; returns the exit code."""
    print(f"voxlm-train: {error_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
