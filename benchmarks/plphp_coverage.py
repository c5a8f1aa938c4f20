"""PLPHP with coverage beside PLPHP as it is and random tokens, on scenes of a seed of their own.

    cd training/embedded
    python held_out.py --assets ASSETS --folder SCENES --seed 20
    cd ../..
    python benchmarks/plphp_coverage.py SCENES

Rows are kept and made anew as `accuracy.py` does it; `render.py` writes the tables of
docs/plphp.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuracy import Row, measure, rates
from accuracy_tables import Table
from page_parts import RESULTS, table
from program import command
from retention import RandomHeads
from vlmprune import METHODS
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.stats import Mean
from vlmprune.study.tasks import Sample, Scenes
from vlmprune.study.tasks.folder import Folder
from vlmprune.study.tasks.scorers import words

FILE = RESULTS / "plphp_coverage.json"
RATES = (0.4, 0.2, 0.1)
CHOSEN = 0.75
"""The share, chosen on other scenes."""
WHICH = {"cells": "cells of `describe`", "long": "more than one word", "short": "one word"}
"""What is told of each row."""
LAST = {"alpha": 0.958, "beta": 0.317}
EIGHT = {"alpha": 0.951, "beta": 0.754, "window": 8}
"""Thresholds calibrated on validation scenes, see `accuracy.py`."""
RANDOM = {"*random tokens*": LAST, "*random tokens, rates of window=8*": EIGHT}
PLAIN = {"PLPHP": LAST, "window=8": EIGHT}
COVERED = {
    f"coverage={CHOSEN}": LAST | {"coverage": CHOSEN},
    f"window=8, coverage={CHOSEN}": EIGHT | {"coverage": CHOSEN},
}
LISTING, SEVERAL, ONE = "listing", "several words", "one word"


@dataclass(frozen=True)
class ByLength(Folder):
    """A folder's questions by the length of their answers, with the limits of the task `scenes`."""

    def samples(self, limit: int | None = None) -> list[Sample]:
        """The folder's; their groups are names of files, wherever the folder is."""
        return [
            replace(one, group=Path(str(one.images[0])).name, kind=kind(one))
            for one in super().samples(limit)
        ]

    def max_new_tokens(self, sample: Sample) -> int:
        """Enough for the longest answer of the kind."""
        return Scenes().max_new_tokens(sample)


def kind(sample: Sample) -> str:
    """Whether an answer is a listing, has several words, or one."""
    if sample.kind == "describe":
        return LISTING
    return SEVERAL if len(words(sample.answers[0])) > 1 else ONE


def planned() -> list[Row]:
    """All rows."""
    rows = []
    for r in RATES:
        for method, ways in (("random_heads", RANDOM), ("plphp", PLAIN | COVERED)):
            rows += [Row(method, one, r, (rates(**more)(r) or {},)) for one, more in ways.items()]
    return rows


class Lengths(Table):
    """Stored rows by the length of their answers."""

    def scores(self, label: str | None, r: float | None, which: str) -> Evaluation:
        """Of one row; None for the full model.

        Args:
            label: of the row.
            r: its rate.
            which: "cells" of listings; "long" answers, of more than one word, listings among them;
                or "short" ones.
        """
        if which == "cells":
            return self.cells(self.found["unpruned"] if label is None else self.rows[label, r])
        made = self.full if label is None else self.made[label, r]
        found = (one for one in made.results if (one.kind == ONE) == (which == "short"))
        return replace(made, results=tuple(found))

    def grid(self, which: str, labels: Sequence[str]) -> str:
        """Rates by ways."""
        rows = []
        for r in RATES:
            share = self.rows[labels[0], r]["shares"]["kv_bytes"]
            cells = (told(self.scores(label, r, which).mean) for label in labels)
            rows.append([f"{r:g}", f"{100 * share:.0f} %", *cells])
        return table(["r", "visual KV", *labels], rows)

    def gains(self) -> str:
        """What coverage adds, in points, to each of the other ways, paired by scenes."""
        alone, eight = COVERED
        rows = []
        for label, other in [(eight, one) for one in (*RANDOM, *PLAIN)] + [
            (alone, next(iter(RANDOM)))
        ]:
            for r in RATES:
                gains = (
                    self.scores(label, r, which).minus(self.scores(other, r, which))
                    for which in WHICH
                )
                rows.append([f"{r:g}", label, other, *(told(one, "+") for one in gains)])
        return table(["r", "way", "minus", *WHICH.values()], rows)

    def asked(self) -> str:
        """What was asked, with what, and what the full model has."""
        kinds = [one for _, one, _ in self.found["samples"]]
        full = {which: told(self.scores(None, None, which).mean) for which in WHICH}
        return (
            f"{len(kinds)} questions about {len({group for *_, group in self.found['samples']})} "
            f"scenes, {kinds.count(LISTING)} listings and {kinds.count(SEVERAL)} other answers of "
            f"more than one word among them; {self.about()}. The full model has {full['cells']} "
            f"per cent of the cells, {full['long']} of the answers of more than one word and "
            f"{full['short']} of those of one word."
        )

    def about(self) -> str:
        """Versions."""
        about = self.found["about"]
        return f"float32, torch {about['torch']}, transformers {about['transformers']}"


def told(mean: Mean | None, sign: str = "") -> str:
    """A mean in per cent with its interval."""
    assert mean is not None and mean.low is not None and mean.high is not None
    value, low, high = (100 * one for one in (mean.value, mean.low, mean.high))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def parts(found: Mapping[str, Any]) -> dict[str, str]:
    """The parts of docs/plphp.md."""
    shown = Lengths(found)
    labels = [*RANDOM, *PLAIN, *COVERED]
    grids = [f"**{name}**\n\n{shown.grid(which, labels)}" for which, name in WHICH.items()]
    return {"coverage": "\n\n".join([shown.asked(), *grids]), "coverage gains": shown.gains()}


def main(
    folder: Annotated[Path, typer.Argument(help="Scenes that held_out.py wrote.")],
    again: Annotated[bool, typer.Option(help="Make rows anew that are known.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file, read and written.")] = FILE,
) -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)
    METHODS.update(random_heads=RandomHeads)
    measure(results, planned(), again=again, task=ByLength(folder), pictures=folder)


if __name__ == "__main__":
    command(main)()
