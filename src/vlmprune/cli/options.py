"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vlmprune.costs.units import number
from vlmprune.errors import VlmpruneError

# Typer reads these at run time, and its releases before 0.12.4 know no `str | None`.
Text = Optional[str]  # noqa: UP045
Texts = Optional[list[str]]  # noqa: UP045
Number = Optional[int]  # noqa: UP045
Numbers = Optional[list[int]]  # noqa: UP045
Fraction = Optional[float]  # noqa: UP045

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Batch = Annotated[int, typer.Option(help="Questions at once.")]
Budget = Annotated[
    Text, typer.Option(help='What --keep counts for: "crop" (each one) or "image" (all its crops).')
]
Device = Annotated[Text, typer.Option(help="cpu, cuda, …; by default the GPU where there is one.")]
Dtype = Annotated[
    Text, typer.Option(help="float32, float16 or bfloat16; by default float32 on a CPU.")
]
Keep = Annotated[
    Text,
    typer.Option(
        help="Visual tokens to keep, or a share, as 0.25 or 25%; 64 where a method must know."
    ),
]
Limit = Annotated[
    Number, typer.Option(help="Questions of the task, from its first; by default all.")
]
Markdown = Annotated[
    Text, typer.Option(metavar="FILE.md", help="Write the figures as a table, too.")
]
Newlines = Annotated[
    Text,
    typer.Option(
        help='"keep" or "drop" the newline tokens of any-resolution models; the published budgets '
        "count none. Kept by default.",
    ),
]
Model = Annotated[
    Text, typer.Option(help="A model folder or an id of the Hub; by default the embedded model.")
]
Question = Annotated[
    Texts, typer.Option(help="Asked about each picture; may be given several times.")
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
    keep = number(text)
    if keep is None:
        raise VlmpruneError(
            f"--keep {text} is not a number; use an integer of at least 1, or a fraction in (0, 1]."
        )
    return keep
