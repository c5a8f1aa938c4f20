"""Every library that the package imports is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from repository import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Distributions whose modules have another name.
MODULES = {"pillow": "PIL"}
# Modules that bring our own along: a harness reads our entry point once it is installed, with what
# it brings; and the package of its own, without which we say what to install.
OTHERS = {
    "lmms_eval": "integrations/lmms_eval",
    "tqdm": "integrations/lmms_eval",
    "vlmprune_embedded": "embedded.py",
    "triton": ("runtime/attention/", "select/choice_"),
}


def modules(requirements: list[str]) -> set[str]:
    """The modules of some requirements."""
    names = [re.match(r"[\w-]+", one)[0] for one in requirements]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported(folder: Path) -> Iterator[tuple[str, Path]]:
    """(top-level module, file) of each import of a library, also inside functions."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {one.partition(".")[0] for one in names}:
                if name not in sys.stdlib_module_names and name != "vlmprune":
                    yield name, file.relative_to(folder)


def undeclared(folder: Path, own: set[str]) -> list[str]:
    return sorted(
        f"{file} imports {name}"
        for name, file in imported(folder)
        if name not in own and not (name in OTHERS and file.as_posix().startswith(OTHERS[name]))
    )


def test_all_that_is_imported_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    users = {name: extras[name] for name in extras if name not in ("test", "dev", "mutation")}
    own = modules([*PROJECT["dependencies"], *(one for some in users.values() for one in some)])
    assert undeclared(ROOT / "src" / "vlmprune", own) == []
    # Nothing is declared that nothing imports.
    found = {name for name, _ in imported(ROOT / "src" / "vlmprune")}
    assert modules(PROJECT["dependencies"]) <= found


def test_the_embedded_model_needs_nothing() -> None:
    folder = ROOT / "packages" / "vlmprune-embedded"
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == [] and "optional-dependencies" not in project
    assert list(imported(folder / "src")) == []


@pytest.mark.parametrize(
    "line", ["import yaml", "def f():\n    from yaml import load", "import tqdm"]
)
def test_one_that_is_not_would_be_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "one.py").write_text(f"import os\nimport torch\n{line}\n")
    (found,) = undeclared(tmp_path, {"torch"})
    assert found.startswith("one.py imports ")
