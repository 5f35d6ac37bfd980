"""The command-line programs `voxlm-train` and `voxlm-eval`, which say in one line what has to be installed for them."""

import sys
from importlib import import_module
from importlib.util import find_spec


# What transformers imports only when it is needed, which is after minutes of work.
LATE = ("tensorboard",)


def train():
    """`voxlm-train`, see `voxlm_training.train`."""
    run("voxlm-train", "train")


def evaluate():
    """`voxlm-eval`, see `voxlm_training.evaluate`."""
    run("voxlm-eval", "evaluate")


def run(program: str, module: str):
    """Run the `main` of a module of this package, or end with one line when a package that it imports is missing."""
    missing = next((name for name in LATE if find_spec(name) is None), None)
    if missing is None:
        try:
            program_main = import_module(f".{module}", __package__).main
        except ModuleNotFoundError as error:
            missing = error.name
        else:
            return program_main()
    sys.exit(f'{program} needs the package {missing}: pip install "voxlm-hf[train]"')
