"""The command line as tests call it."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from vlmprune import embedded
from vlmprune.cli import app

COFFEE = str(embedded.scenes() / "coffee.jpg")
QUESTION = "where is the cat?"


def call(*words: Any) -> Any:
    """The result of a command."""
    return CliRunner().invoke(app, [str(word) for word in words])


def sentence(*words: Any) -> str:
    """The sentence of a mistake; checks exit code and form."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("vlmprune: ") and result.stderr.count("\n") == 1
    return result.stderr


def config_of_embedded() -> Any:
    return json.loads((embedded.path() / "config.json").read_text())
