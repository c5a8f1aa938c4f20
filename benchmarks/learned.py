"""Accuracy of the methods that learn beside those that do not, at equal numbers of visual tokens.

    python benchmarks/learned.py   # what is missing or stale

The embedded model's held-out scenes, with the weights that travel with the package. Rows are kept
and made anew as `accuracy.py` does it; `render.py` writes the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuracy import SEEDS, Row, measure
from page_parts import RESULTS
from program import command
from vlmprune import METHODS
from vlmprune.methods.bases.learned import shipped

FILE = RESULTS / "learned.json"
TRAINED = ("quecc", "vistog")
"""Methods whose weights are for pictures; VideoLLM-MoD's are for clips."""
BESIDE = {
    "random": "random",
    "uniform": "uniform grid",
    "average_pooling": "average pooling",
    "vispruner": "VisPruner",
}


def planned() -> list[Row]:
    """The learned methods, and the others at each of their numbers of tokens."""
    learned = []
    for method in TRAINED:
        for weights in shipped(method):
            pruner: Any = METHODS[method](weights=weights)
            settings = ({"weights": weights},)
            learned.append(
                Row(method, f"{METHODS[method].__name__}, {weights}", pruner.keep, settings)
            )
    rows = []
    for tokens in sorted({int(row.budget or 0) for row in learned}, reverse=True):
        for method, label in BESIDE.items():
            one = {"keep": tokens}
            several = [one | {"seed": seed} for seed in SEEDS] if method == "random" else [one]
            rows.append(Row(method, label, tokens, tuple(several)))
        rows += [row for row in learned if row.budget == tokens]
    return rows


def main(
    again: Annotated[bool, typer.Option(help="Make rows anew that are known.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file, read and written.")] = FILE,
) -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)
    measure(results, planned(), again=again)


if __name__ == "__main__":
    command(main)()
