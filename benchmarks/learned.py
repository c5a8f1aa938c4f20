"""Accuracy of the methods that learn beside those that do not, at equal numbers of visual tokens.

    python benchmarks/learned.py            # what is missing or stale, then the page
    python benchmarks/learned.py --render   # the page alone, from the JSON

The embedded model's held-out scenes, with the weights that travel with the package. Rows are kept
and made anew as `accuracy.py` does it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuracy import PAGE, RESULTS, SEEDS, Row, measure, read
from accuracy_tables import KINDS, Table, header, line, name, percent
from vlmprune import METHODS
from vlmprune.files import write
from vlmprune.methods.bases.learned import shipped
from vlmprune.study.evals.run import BATCH

LEARNED = RESULTS.with_name("learned.json")
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


def tables(found: Mapping[str, Any]) -> str:
    """One table a number of tokens: all kinds, each kind, and the difference from random."""
    table = Table(found)
    parts = []
    for tokens in sorted({row["budget"] for row in found["rows"]}, reverse=True):
        word = "token" if tokens == 1 else "tokens"
        lines = [f"**{tokens:g} visual {word}**", ""]
        lines.append(header(["method", "all", "minus random", *KINDS]))
        for label, budget in table.rows:
            if budget != tokens:
                continue
            made = table.made[label, budget]
            gain = made.minus(table.made["random", tokens])
            apart = "" if label == "random" else percent(gain, signed=True)
            kinds = (percent(made.by_kind[kind]) for kind in KINDS)
            lines.append(line([name(label), percent(made.mean), apart, *kinds]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def rendered(page: str, found: Mapping[str, Any]) -> str:
    """The page with the part between its markers made anew."""
    before, begin, rest = page.partition("<!-- learned -->\n")
    _, end, after = rest.partition("<!-- end learned -->")
    assert begin and end
    return before + begin + tables(found) + "\n" + end + after


def main(
    render: Annotated[bool, typer.Option(help="Make no row, only the page.")] = False,
    again: Annotated[bool, typer.Option(help="Make rows anew that are known.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file, read and written.")] = LEARNED,
    target: Annotated[Path, typer.Option(help="Page with the markers.")] = PAGE,
) -> None:
    """Measure what is missing, and write the tables."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    rows = planned()
    found = read(results) if render else measure(results, rows, BATCH, again)
    known = {(row["label"], row["budget"]): row for row in found["rows"]}
    found = found | {"rows": [known[row.key] for row in rows if row.key in known]}
    write(target, rendered(target.read_text(), found))


if __name__ == "__main__":
    typer.run(main)
