"""Checks of a recipe, before anything runs."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainingArguments

from voxlm_hf import VoxLMConfig

from .corpus import is_streamed, make_dataset
from .data import Limits, kind_of
from .stages import HEADS, PARTS, STAGES, TRAINER_OPTIONS, WITHOUT_TRAINER
from .values import check_report_to, check_value


# Kinds of sources whose place is a file or a folder.
ON_DISK = ("manifest", "folder", "librispeech")
# Keys of `data` in a recipe and in its stages.
DATA_KEYS = {"train", "dev", "buffer", *signature(make_dataset).parameters, *signature(Limits).parameters}
DATA_KEYS -= {"model", "sources", "seed", "limits"}


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
    check_data("data", recipe["data"])
    for number, stage in enumerate(recipe["stages"]):
        data = recipe["data"]
        if isinstance(stage, dict) and "data" in stage:
            check_keys(f"stages.{number}.data", stage["data"], DATA_KEYS)
            data = {**data, **stage["data"]}
            check_data(f"stages.{number}.data", data)
        check_stage(f"stages.{number}", stage, is_streamed(data))


def check_data(place: str, data: dict):
    """
    Raises:
        ValueError, OSError: for unknown keys, values of the wrong type, and sources that cannot be read.
    """
    check_keys(place, data, DATA_KEYS)
    kinds = {"buffer": int, **get_type_hints(make_dataset), **get_type_hints(Limits)}
    for name in ("train", "dev"):
        sources = data.get(name)
        if not isinstance(sources, list) and not (sources is None and name == "dev") or not sources and name == "train":
            raise ValueError(f"{place}.{name} must be a list of sources, got {sources!r}")
        for number, source in enumerate(sources or []):
            check_source(f"{place}.{name}.{number}", source)
    for name in data.keys() - {"train", "dev"}:
        check_value(f"{place}.{name}", data[name], kinds[name])


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
    trains = kind not in WITHOUT_TRAINER
    arguments = {field.name: arguments[field.name] for field in fields(TrainingArguments) if trains}
    taken = {"output_dir", "remove_unused_columns", "seed"}
    own = options_of(STAGES[kind]) - {"model", "train", "dev", "folder", "seed", "options"}
    extra = {
        "reader": {"base", "settings", "steps"},
        "reader_tuning": {"settings", "steps"},
        "warm_start": {"steps"},
        "alignment": {"head", *TRAINER_OPTIONS},
        "transcription": set(TRAINER_OPTIONS),
    }.get(kind, set())
    check_keys(place, stage, {"kind", "data", *own, *extra, *arguments} - taken)
    needed = {"reader": ["base"], "reader_tuning": ["base"]}
    needed |= dict.fromkeys(("transcription", "alignment"), ["parts", "seconds_per_batch"])
    needed = needed.get(kind, [])
    for name in needed:
        if name not in stage:
            raise ValueError(f"{place}: a stage of kind {kind} needs `{name}`")
    parts = stage.get("parts", [])
    known = isinstance(parts, list) and all(isinstance(part, str) and part in PARTS for part in parts)
    if not known or "parts" in stage and not parts:
        raise ValueError(f"{place}.parts: unknown parts {parts!r}; a list of some of {', '.join(PARTS)} is needed")
    kinds = {"base": str, "steps": int, "seconds_per_batch": float, "state_noise": float, "max_new_tokens": int}
    kinds = {
        **arguments,
        "head": str,
        **{name: type(value) for name, value in defaults_of(STAGES[kind]).items()},
        **kinds,
    }
    for name, value in stage.items():
        check_value(f"{place}.{name}", value, kinds.get(name))
    if stage.get("head", HEADS[0]) not in HEADS:
        raise ValueError(f"{place}.head: unknown alignment head {stage['head']!r}; known are {', '.join(HEADS)}")
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
    return set(signature(function).parameters)


def defaults_of(function: Callable) -> dict[str, Any]:
    """The defaults of a function's arguments."""
    return {name: parameter.default for name, parameter in signature(function).parameters.items()}
