"""Importing the package is light, and leaves other libraries as they are."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vlmprune


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running some code."""
    code += "\nimport sys; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_the_command_lines_help_needs_no_torch() -> None:
    assert "typer" in loaded_after("import vlmprune.cli")
    assert not {"torch", "transformers"} & loaded_after("import vlmprune.cli")
    assert "torch" in loaded_after("from vlmprune import VisPruner")


def test_importing_patches_nothing() -> None:
    check = (
        "from transformers import LlavaForConditionalGeneration as L\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A\n"
        "before = (L.generate, L.forward, dict(A))\n"
        "import vlmprune.pruner.base, vlmprune.methods, vlmprune.runtime.attention.taps\n"
        "assert before == (L.generate, L.forward, dict(A))"
    )
    assert "vlmprune" in loaded_after(check)


def test_all_names_are_there() -> None:
    for name in vlmprune.__all__:
        assert getattr(vlmprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'VisPrune'"):
        vlmprune.VisPrune  # noqa: B018
