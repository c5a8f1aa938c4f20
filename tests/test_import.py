"""Importing the package is light, and leaves other libraries as they are."""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import vlmprune
from repository import ROOT

PATCHING = (
    "from transformers import LlavaForConditionalGeneration as L\n"
    "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A\n"
    "before = (L.generate, L.forward, dict(A))\n"
    "import vlmprune.pruner.base, vlmprune.methods, vlmprune.runtime.attention.taps\n"
    "assert before == (L.generate, L.forward, dict(A))"
)


@cache
def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running some code."""
    code += "\nimport sys; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_the_command_lines_help_needs_no_torch() -> None:
    light = loaded_after("import vlmprune.cli")
    assert "typer" in light and not {"torch", "transformers"} & light
    # What needs them is seen to have them.
    assert {"torch", "transformers"} <= loaded_after(PATCHING)


def test_importing_patches_nothing() -> None:
    assert "vlmprune" in loaded_after(PATCHING)


def test_all_names_are_there() -> None:
    for name in vlmprune.__all__:
        assert getattr(vlmprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'VisPrune'"):
        vlmprune.VisPrune  # noqa: B018


@pytest.mark.parametrize(
    ("former", "home"),
    [
        ("budget", "select.budget"),
        ("retention", "select.retention"),
        ("rowrules", "select.row_rules"),
        ("calibrate", "study.calibrate.run"),
        ("loading", "io.models"),
        ("learned", "methods"),
    ],
)
def test_former_names_give_the_same_objects(former: str, home: str) -> None:
    old, new = (importlib.import_module(f"vlmprune.{name}") for name in (former, home))
    shared = [name for name in old.__all__ if hasattr(new, name)]
    assert shared and all(getattr(old, name) is getattr(new, name) for name in shared)
    assert all(hasattr(old, name) for name in old.__all__)


def test_every_former_name_is_told_as_public() -> None:
    folder = Path(vlmprune.__file__).parent / "former"
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert len(names) == 6
    assert all(f"`vlmprune.{name}`" in page for name in names)


def test_a_method_of_ones_own_leaves_the_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vlmprune.METHODS, "mine", type("Mine", (vlmprune.VisPruner,), {}))
    vars(vlmprune).pop("__all__", None)
    assert "Mine" not in vlmprune.__all__ and "VisPruner" in vlmprune.__all__
    assert vlmprune.rowrules is importlib.import_module("vlmprune.rowrules")
