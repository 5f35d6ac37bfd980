"""Recipes: reading them from YAML with overrides."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


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
