"""The small study of layers against visual tokens, as the tables of docs/results.md.

The figures are made by `training/embedded/study.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from page_parts import table

KINDS = ("all", "reading", "the rest")


def percent(mean: Mapping[str, float]) -> str:
    """A share and half its interval's width."""
    return f"{100 * mean['right']:.1f} ± {50 * (mean['high'] - mean['low']):.1f}"


def every(found: Mapping[str, Any]) -> str:
    """All pairs: layers by tokens."""
    rows = {(row["layers"], row["tokens"]): row for row in found["rows"]}
    depths = sorted({layers for layers, _ in rows})
    tokens = sorted({n for _, n in rows}, reverse=True)
    heads = ["visual tokens", *(f"{depth} layers" for depth in depths)]
    return table(
        heads, ([str(n), *(percent(rows[depth, n]["all"]) for depth in depths)] for n in tokens)
    )


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
        lines = []
        for budget in sorted(budgets, reverse=True):
            cells = [f"{budget:.0f}"]
            for depth in depths:
                row = affordable(found, depth, budget)
                cells.append("" if row is None else f"{row['tokens']}: {percent(row[kind])}")
            lines.append(cells)
        heads = ["MFLOPs", *(f"{depth} layers" for depth in depths)]
        parts.append(f"**{kind}**\n\n" + table(heads, lines))
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
