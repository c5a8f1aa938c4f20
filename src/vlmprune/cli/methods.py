"""`vlmprune methods`: what methods there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import AsJson, Texts
from vlmprune.cli.printing import console, plain_grid, print_json, progress, ruled_table

if TYPE_CHECKING:
    from rich.table import Table

HINT = "Give settings as in --method vispruner:keep=64,important_ratio=0.75; chain methods by +."


def methods(
    names: Annotated[
        Texts, typer.Argument(metavar="NAME", help="Methods to be told about; by default all.")
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="One line a method.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods: stage, needs, settings, paper, and where ours deviates.

    A result is reusable where what is kept of an image serves all questions about it.
    """
    with progress("Starting…"):
        from vlmprune import catalog

        found = catalog.methods(names or ())
    if as_json:
        print_json(found)
        return
    if brief or not names:
        console().print(overview(found))
        console().print()
    for one in () if brief else found["methods"]:
        console().print(method_table(one))
    console().print(HINT, style="dim", markup=False)


def overview(found: dict[str, Any]) -> Table:
    """One line a method of `methods()`."""
    table = ruled_table()
    for title in ("method", "stage", "needs", "reusable", "paper"):
        table.add_column(title, style="bold" if title == "method" else "")
    for one in found["methods"]:
        reusable = "yes" if one["reusable_across_questions"] else "no"
        paper = one["paper"].removeprefix("arXiv ")
        table.add_row(one["name"], one["stage"], one["needs"], reusable, paper)
    return table


def method_table(method: dict[str, Any]) -> Table:
    """One method of `methods()`."""
    from vlmprune import embedded

    weights = ", ".join(method["weights"])
    if method["training"] != "none" and not embedded.installed():
        weights = embedded.MISSING
    settings = ", ".join(
        f"{name} (required)" if about["required"] else f"{name}={about['default']!r}"
        for name, about in method["settings"].items()
    )
    if method["reads_files"]:
        settings += ", or from=FILE and what to change of it"
    reusable = (
        "the question is not looked at: what is kept serves all questions about an image"
        if method["reusable_across_questions"]
        else "chosen anew for each question"
    )
    table = plain_grid(f"{method['name']}  ({method['class']})")
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for title, text in (
        ("what", method["summary"]),
        ("stage", method["stage"]),
        ("needs", method["needs"]),
        ("question", reusable),
        ("training", method["training"].replace("none", "")),
        ("settings", settings),
        ("weights", weights),
        ("paper", method["paper"]),
        ("deviations", method["deviations"]),
    ):
        if text:
            table.add_row(title, text)
    return table
