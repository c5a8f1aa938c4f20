"""The command `vlmprune`: parses, and prints what other modules work out.

Nothing heavy is imported here before a command needs it.
"""

from __future__ import annotations

import sys

from vlmprune.cli import (
    benching,
    calibrating,
    comparing,
    evaluating,
    lists,
    running,
    searching,
    training,
)
from vlmprune.cli.app import app

for command in (
    running.run,
    benching.bench,
    comparing.compare,
    evaluating.evaluate,
    searching.search,
    calibrating.calibrate,
    training.train,
    lists.plan,
    lists.methods,
    lists.models,
):
    # The name `eval` is one of Python's own.
    app.command("eval" if command is evaluating.evaluate else None)(command)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["app", "main"]
