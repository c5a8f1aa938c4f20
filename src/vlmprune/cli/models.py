"""`vlmprune models`: what models are supported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmprune.cli.options import AsJson
from vlmprune.cli.printing import console, plain_grid, print_json, progress

if TYPE_CHECKING:
    from rich.table import Table


def models(as_json: AsJson = False) -> None:
    """List the supported models."""
    with progress("Starting…"):
        from vlmprune import catalog

        found = catalog.models()
    if as_json:
        print_json(found)
    else:
        console().print(models_table(found))


def models_table(found: dict[str, Any]) -> Table:
    """`models()` as one table of three parts."""
    from vlmprune.embedded import MISSING

    own = found["embedded"]
    if own is None:
        last = {"name": "embedded model", "class": "", "positions": "", "note": MISSING}
    else:
        last = own | {"note": f"{own['bytes'] / 1e6:.0f} MB; {own['note']}"}
    rows = [*found["families"], last]
    table = plain_grid("Supported models")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_row("[dim not bold]family[/]", "[dim]class[/]", "[dim]positions[/]")
    for one in rows:
        table.add_row(one["name"], one["class"], one["positions"])
        refused = [f"transformers {at}, where {why}" for at, why in one.get("refused", {}).items()]
        parts = {name: one.get(name) for name in ("score", "note", "proved")}
        parts["not on"] = "; ".join(refused)
        for part, words in parts.items():
            if words:
                table.add_row(f"[dim not bold]  {part}[/]", f"[dim]{words}[/]")
    table.add_row()
    table.add_row("proved on each", found["proved"]["each"])
    for number, words in enumerate(found["proved"]["methods"].values()):
        table.add_row("" if number else "kinds of methods", words)
    table.add_row(
        "any other", "[dim]…ForConditionalGeneration is checked when a pruner attaches[/]"
    )
    table.add_row()
    table.add_row("[dim not bold]vision tower[/]", "[dim]scored by[/]")
    for tower in found["towers"]:
        table.add_row(tower["model_type"], tower["score"])
    return table
