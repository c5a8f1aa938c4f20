"""The command `vlmprune`, one file a command, named as the command: it parses and prints.

Beside the commands stand what they share: `app`, `options`, `printing`.
May import every room; nothing heavy at a module's top, so that help needs no torch.
"""

from __future__ import annotations

from vlmprune.cli import bench, calibrate, compare, methods, models, plan, run, search, train
from vlmprune.cli import eval as evaluate
from vlmprune.cli.app import Command, app, main

for command in (
    run.run,
    bench.bench,
    compare.compare,
    evaluate.evaluate,
    search.search,
    calibrate.calibrate,
    train.train,
    plan.plan,
    methods.methods,
    models.models,
):
    # The name `eval` is one of Python's own.
    app.command("eval" if command is evaluate.evaluate else None, cls=Command)(command)

__all__ = ["app", "main"]
