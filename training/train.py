"""
Train a model from a recipe: `voxlm-train RECIPE.yaml [key.subkey=value ...]`.

An interrupted run resumes: started again, it loads the result of each finished stage from the output folder and
continues the current stage from its last checkpoint. `training/README.md` has a tutorial, `training/recipes` the
recipes.
"""

import argparse
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.app.files import move_into_place, tidy, unfinished_folder

from .checkpoints import WriteError, naming_unwritten_files
from .checks import check_recipe
from .corpus import make_datasets
from .data import error_line
from .recipe import RecipeError, read_recipe
from .stages import check_parts, run_stage, training_arguments


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
        datasets = make_datasets(model, recipe["data"], seed)
        for stage in recipe["stages"]:
            if "data" not in stage:
                check_parts(stage.get("parts", []), datasets[0])
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise RecipeError(error_line(error)) from error
    for number, stage in enumerate(recipe["stages"], 1):
        options = dict(stage)
        own = options.pop("data", None)
        try:
            train, dev = datasets if own is None else make_datasets(model, {**recipe["data"], **own}, seed)
        except (ValueError, OSError) as error:
            raise RecipeError(f"stage {number}, {stage['kind']}: {error_line(error)}") from error
        run_stage(model, train, dev, output / f"{number}-{stage['kind']}", seed, **options)
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
