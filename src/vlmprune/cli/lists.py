"""`plan`, `methods` and `models`: what there is and what it costs, with no weights."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vlmprune.cli.options import AsJson, Budget, keep_of
from vlmprune.cli.printing import console, print_json


def plan(
    model: Annotated[str, typer.Argument(help="An architecture, or a folder with a config.json.")],
    keep: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Visual tokens to keep, or a fraction; by default all."),
    ] = None,
    budget: Budget = "crop",
    crops: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Crops of the image; by default 1, or 5 for LLaVA-NeXT."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a budget costs on an architecture, without its weights."""
    from vlmprune import plan as planning

    kept = None if keep is None else keep_of(keep)
    costs = planning.plan(model, kept, budget or "crop", crops)  # type: ignore[arg-type]
    if as_json:
        print_json(costs.as_dict())
    else:
        console().print(planning.table([costs]))


def methods(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="NAME", help="Methods to be told about; by default all."),
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="One line a method.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods: stage, needs, settings, paper, and where ours deviates.

    A result is reusable where what is kept of an image serves all questions about it.
    """
    from vlmprune import listing

    found = listing.methods(names or ())
    if as_json:
        print_json(found)
        return
    if brief or not names:
        console().print(listing.overview(found))
        console().print()
    for one in () if brief else found["methods"]:
        console().print(listing.method_table(one))
    console().print(listing.HINT, style="dim", markup=False)


def models(as_json: AsJson = False) -> None:
    """List the supported models."""
    from vlmprune import listing

    found = listing.models()
    if as_json:
        print_json(found)
    else:
        console().print(listing.models_table(found))
