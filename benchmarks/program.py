"""What the programs here share as commands: where they run, what they write, how they refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import typer

from vlmprune import VlmpruneError
from vlmprune.io import options, outputs
from vlmprune.study import measure

CPU, GPU = "seconds of a CPU: use the ratios only", "measured on a GPU"


def command(main: Callable[..., None]) -> typer.Typer:
    """A program of one command, in which what the library refuses is told in a sentence."""
    app = typer.Typer(add_completion=False)

    @app.command()
    @functools.wraps(main)
    def told(*given: Any, **named: Any) -> None:
        try:
            main(*given, **named)
        except VlmpruneError as error:
            raise typer.BadParameter(str(error)) from error

    return app


def refuse(problems: Mapping[str, bool]) -> None:
    """Refuse the first of some problems that there is.

    Args:
        problems: by the sentence that tells it, whether it is so.

    Raises:
        VlmpruneError: one is.
    """
    for problem, is_so in problems.items():
        if is_so:
            raise VlmpruneError(problem)


def place(
    device: str | None, dtype: str | None = None, threads: int | None = None
) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in what; sets the number of threads.

    Args:
        device: as torch names it; by default the GPU where there is one.
        dtype: by default bfloat16 on a GPU, else float32.
        threads: by default torch's own number.

    Raises:
        VlmpruneError: there is no such device or type.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = options.choose_device(device)
    kind = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    return where, options.choose_dtype(kind, where)


def content(device: torch.device, setting: Mapping[str, Any], **found: Any) -> dict[str, Any]:
    """What a program writes: its setting with versions and device, and what it found."""
    note = CPU if device.type == "cpu" else GPU
    return {"setting": {**measure.facts(device), **setting}, "seconds_are": note, **found}


def about(setting: Mapping[str, Any], *more: str) -> str:
    """A setting in words, and what else the figures depend on."""
    versions = (f"{name} {value}" for name, value in setting["versions"].items())
    threads = f"{setting['threads']} thread(s)"
    return ", ".join([setting["device_name"], threads, *more, *versions])


def save(path: Path | None, found: Any) -> None:
    """Write figures as JSON, where somebody wants them."""
    if path is not None:
        outputs.write(path, outputs.json_text(found))
