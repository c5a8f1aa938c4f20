"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vlmprune.errors import VlmpruneError

# Typer reads these at run time, on Python 3.10 too, hence Optional.
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Budget = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help='What --keep counts for: "crop" (each one) or "image" (all its crops).'),
]
Model = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="A model folder or an id of the Hub; by default the embedded model."),
]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="cpu, cuda, …; by default the GPU where there is one."),
]
Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="float32, float16 or bfloat16; by default float32 on a CPU."),
]

Force = Annotated[
    bool,
    typer.Option("--force", help="Overwrite files of these names that this command did not write."),
]


def keep_of(text: str) -> int | float:
    """What `--keep` says: an integer or a fraction.

    Raises:
        VlmpruneError: it is no number.
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise VlmpruneError(
        f"--keep {text} is not a number; use an integer of at least 1, or a fraction in (0, 1]."
    )
