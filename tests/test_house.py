"""The rules of the house: sizes, imports, and one package that is the remote code as well."""

import ast
from pathlib import Path

import pytest

import voxlm_hf


PACKAGE = Path(voxlm_hf.__file__).parent
CHECKPOINT = PACKAGE.parent / "hub_export" / "voxlm-135m"
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*_voxlm.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
# What the package works without; peft and rapidfuzz are tried at the top of a module.
OPTIONAL = {"silero_vad"}


def siblings(tree: ast.Module) -> set[str]:
    """The flat modules that a module imports from."""
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_there_are_modules_to_check():
    assert {"configuration_voxlm", "modeling_voxlm", "processing_voxlm", "pipeline_voxlm"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_at_most_700_lines(name):
    assert len(MODULES[name].read_text().splitlines()) <= 700


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_its_subject_in_its_first_line(name):
    assert ast.get_docstring(TREES[name]).splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_at_the_top_but_for_optional_packages(name):
    inside = [
        node
        for function in ast.walk(TREES[name])
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in inside}
    assert imported <= OPTIONAL


@pytest.mark.parametrize("name", MODULES)
def test_relative_imports_name_a_module_and_what_they_take_from_it(name):
    """transformers copies the files that such imports name, and understands no others."""
    relative = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module in MODULES for node in relative)
    absolute = {
        alias.name.split(".")[0]
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    absolute |= {
        node.module.split(".")[0]
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert not absolute & {"voxlm_hf", "voxlm_training", "voxlm_hub_export"}


def test_no_module_imports_itself_by_way_of_others():
    below = {name: siblings(tree) for name, tree in TREES.items()}
    while below:
        lowest = {name for name, imported in below.items() if not imported & set(below)}
        assert lowest, f"a cycle among {sorted(below)}"
        below = {name: imported for name, imported in below.items() if name not in lowest}


def test_no_module_imports_the_network():
    assert [name for name, tree in TREES.items() if "modeling_voxlm" in siblings(tree)] == []


def test_the_app_and_the_package_alone_know_the_network():
    """`voxlm_hf/__init__.py` imports it, `app/` takes it from there."""
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "modeling_voxlm"
        in {
            (node.module or "").split(".")[-1]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
    ]
    assert "__init__.py" in users and all(user == "__init__.py" or user.startswith("app/") for user in users)


def test_the_shipped_checkpoint_holds_the_modules_of_the_package():
    assert {path.stem for path in CHECKPOINT.glob("*.py")} == set(MODULES)
    for name, path in MODULES.items():
        assert (CHECKPOINT / path.name).read_bytes() == path.read_bytes(), (
            f"{name} differs; run `python -m voxlm_hub_export.export --code hub_export/voxlm-135m`"
        )
