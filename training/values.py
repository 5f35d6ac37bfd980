"""Checks of the values of a recipe, each of which names the place of a wrong one."""

import math
import os
from types import UnionType
from typing import Any, Union, get_args, get_origin

from transformers.integrations import get_reporting_integration_callbacks


# Numbers that nothing can be done with unless they are above 0; all others must be at least 0.
POSITIVE = {
    *("seconds_per_batch", "frames_per_batch", "max_new_tokens", "recordings", "steps", "num_train_epochs"),
    *("logging_steps", "save_steps", "save_total_limit", "eval_steps", "gradient_accumulation_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    *("copies", "max_s", "max_characters", "max_characters_per_s"),
}
# Numbers that mean something when negative.
ANY_NUMBER = {"max_steps", "local_rank"}


def check_value(place: str, value, kind: Any):
    """
    Args:
        place (`str`): of the value in the recipe; its last part is the option's name.
        kind: the type of the option, such as `float` or `int | None`. Only `bool`, `int`, `float`, `str` and unions of one
            of them with `None` are checked.

    Raises:
        ValueError: for a value of another type, for a number that is not finite, and for one that is too small.
    """
    kinds = set(get_args(kind)) if get_origin(kind) in (Union, UnionType) else {kind}
    if value is None and type(None) in kinds:
        return
    kinds -= {type(None)}
    if len(kinds) != 1:
        return
    (kind,) = kinds
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{place} must be true or false, got {value!r}")
    if kind is str and not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{place} must be text, got {value!r}")
    if kind in (int, float):
        check_number(place, value, kind)


def check_number(place: str, value, kind: type):
    """Raise a `ValueError` for what is no finite number, for a fraction where `kind` is `int`, and for too small a one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{place} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{place} must be a finite number, got {value!r}")
    if kind is int and not isinstance(value, int):
        raise ValueError(f"{place} must be a whole number, got {value!r}")
    name = place.rpartition(".")[2]
    if name in POSITIVE and value <= 0:
        raise ValueError(f"{place} must be above 0, got {value!r}")
    if name not in ANY_NUMBER and value < 0:
        raise ValueError(f"{place} must be at least 0, got {value!r}")


def check_report_to(place: str, value):
    """Raise a `ValueError` for programs that the Trainer cannot report to, before anything is trained."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place} must be a name or a list of names, got {value!r}")
    try:
        get_reporting_integration_callbacks([name for name in names if name not in ("all", "none")])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
