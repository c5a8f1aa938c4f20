"""The command `vlmprune`: parses, and prints what other modules work out.

Nothing heavy is imported here before a command needs it.
"""

from __future__ import annotations

import sys

from vlmprune.cli import bench, calibrate, compare, lists, search, train
from vlmprune.cli import eval as evaluating
from vlmprune.cli import run as running
from vlmprune.cli.app import app

for command in (
    running.run,
    bench.bench,
    compare.compare,
    evaluating.evaluate,
    search.search,
    calibrate.calibrate,
    train.train,
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
