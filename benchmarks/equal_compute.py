"""The small study of layers against visual tokens, as tables of docs/results.md.

    python benchmarks/equal_compute.py   # the page, from results/equal_compute.json

The figures are made by `training/embedded/study.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from accuracy_tables import header, line
from vlmprune.files import write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "equal_compute.json"
PAGE = ROOT / "docs" / "results.md"
KINDS = ("all", "reading", "the rest")


def percent(mean: Mapping[str, float]) -> str:
    """A share and half its interval's width."""
    return f"{100 * mean['right']:.1f} ± {50 * (mean['high'] - mean['low']):.1f}"


def every(found: Mapping[str, Any]) -> str:
    """All pairs: layers by tokens."""
    rows = {(row["layers"], row["tokens"]): row for row in found["rows"]}
    depths = sorted({layers for layers, _ in rows})
    tokens = sorted({n for _, n in rows}, reverse=True)
    lines = [header(["visual tokens", *(f"{depth} layers" for depth in depths)])]
    for n in tokens:
        lines.append(line([str(n), *(percent(rows[depth, n]["all"]) for depth in depths)]))
    return "\n".join(lines)


def affordable(found: Mapping[str, Any], layers: int, mflops: float) -> dict[str, Any] | None:
    """Of the measured pairs of a depth the one with the most tokens within a budget."""
    rows = [r for r in found["rows"] if r["layers"] == layers and r["mflops"] <= mflops]
    return max(rows, key=lambda row: row["tokens"]) if rows else None


def equal(found: Mapping[str, Any]) -> str:
    """For each budget of the shallowest decoder, what every depth makes of it."""
    depths = sorted({row["layers"] for row in found["rows"]})
    budgets = [row["mflops"] for row in found["rows"] if row["layers"] == depths[0]]
    parts = []
    for kind in KINDS:
        lines = [f"**{kind}**", "", header(["MFLOPs", *(f"{depth} layers" for depth in depths)])]
        for budget in sorted(budgets, reverse=True):
            cells = [f"{budget:.0f}"]
            for depth in depths:
                row = affordable(found, depth, budget)
                cells.append("" if row is None else f"{row['tokens']}: {percent(row[kind])}")
            lines.append(line(cells))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def setup(found: Mapping[str, Any]) -> str:
    """What was trained and measured."""
    made = found["made"]
    loss = ", ".join(f"{layers} layers {value:.2f}" for layers, value in made["loss"].items())
    return (
        f"{made['steps']} steps of {made['batch']} scenes out of {made['training_scenes']}, seed "
        f"{made['seed']}; last training loss: {loss}. {found['rows'][0]['all']['asked']} questions "
        f"about {made['scenes']} test scenes, intervals of 95 % over scenes. FLOPs: decoder layers "
        f"at prefill, with {found['text']} text tokens."
    )


def rendered(page: str, found: Mapping[str, Any]) -> str:
    """The page with the parts between its markers made anew."""
    for name, made in (
        ("study setup", setup(found)),
        ("study equal", equal(found)),
        ("study every", every(found)),
    ):
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        assert begin and end, name
        page = before + begin + made + "\n" + end + after
    return page


def main(results: Path = RESULTS, target: Path = PAGE) -> None:
    """Write the tables."""
    write(target, rendered(target.read_text(), json.loads(results.read_text())))


if __name__ == "__main__":
    typer.run(main)
