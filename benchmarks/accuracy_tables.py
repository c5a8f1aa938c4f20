"""The tables of docs/results.md, worked out from what `accuracy.py` stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmprune.study.evals.results import Evaluation
from vlmprune.study.stats import Mean
from vlmprune.study.tasks.answered import Answered

BUDGETS = (0.5, 0.33, 0.22, 0.11, 0.05)
CONTROLS = ("random", "uniform grid", "average pooling", "downsampling")
KINDS = ("presence", "count", "position", "relation", "reading", "listing")
CLOSE = (0.33, 0.22, 0.11)
"""Budgets that get a table by kind of question."""
CELLS = "listed cells"


def page(text: str, found: Mapping[str, Any], not_here: Mapping[str, str]) -> str:
    """The page with its marked parts made anew.

    Args:
        text: the page; each part stands between `<!-- name -->` and `<!-- end name -->`.
        found: the stored rows.
        not_here: methods without rows, and why.
    """
    table = Table(found)
    parts: dict[str, Callable[[], str]] = {
        "setup": table.setup,
        "accuracy": table.accuracy,
        "gains": table.gains,
        "cost": table.cost,
        "own": table.own,
        "kinds": table.kinds,
        "left out": lambda: "\n".join(f"- {why}." for why in not_here.values()),
    }
    for name, make in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        made = make()
        text = re.sub(
            pattern, lambda at, made=made: f"{at[1]}{made}\n{at[2]}", text, flags=re.DOTALL
        )
    return text


class Table:
    """Stored rows as evaluations, and tables of them."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.full = self.evaluation(found["unpruned"])
        self.rows = {(row["label"], row["budget"]): row for row in found["rows"]}
        self.made = {key: self.evaluation(row) for key, row in self.rows.items()}
        self.labels = list(dict.fromkeys(label for label, budget in self.rows if budget))
        known = {budget for _, budget in self.rows}
        self.budgets = [budget for budget in BUDGETS if budget in known]

    def evaluation(self, row: Mapping[str, Any]) -> Evaluation:
        """Scores by sample; what was spent is not by sample and left at nought."""
        results = tuple(
            Answered(one, group, kind, "", int(score) / row["repeats"], *[0.0] * 9)
            for (one, kind, group), score in zip(self.found["samples"], row["scores"], strict=True)
        )
        return Evaluation("scenes", row.get("label", "unpruned"), "", results)

    def cells(self, row: Mapping[str, Any]) -> Evaluation:
        """The share of each listing's cells that are right."""
        listings = [one for one in self.found["samples"] if one[1] == "listing"]
        results = tuple(
            Answered(one, group, CELLS, "", cells / 16 / row["repeats"], *[0.0] * 9)
            for (one, _, group), cells in zip(listings, row["cells"], strict=True)
        )
        return Evaluation("scenes", row.get("label", "unpruned"), "", results)

    def setup(self) -> str:
        """What was measured with what."""
        about = self.found["about"]
        groups = {group for _, _, group in self.found["samples"]}
        return (
            f"{len(self.found['samples'])} questions about {len(groups)} scenes, "
            f"{about['model']}; torch {about['torch']}, transformers {about['transformers']}, "
            f"{about['batch']} questions at once, one thread. Unpruned: "
            f"{percent(self.full.mean)} per cent."
        )

    def accuracy(self) -> str:
        """Methods by budgets, with a mark beside random."""
        lines = [header(["method", *(f"{budget:.0%}" for budget in self.budgets)])]
        for label in self.labels:
            cells = []
            for budget in self.budgets:
                made = self.made.get((label, budget))
                mark = self.mark(label, budget)
                cells.append("" if made is None else f"{percent(made.mean)}{mark}")
            lines.append(line([name(label), *cells]))
        return "\n".join(lines)

    def mark(self, label: str, budget: float) -> str:
        """How a row stands to random with as many KV bytes, by the paired interval."""
        gain = self.gain(label, budget)
        if gain is None:
            return ""
        if gain.high < 0:
            return " ▼"
        return " ≈" if gain.low <= 0 else ""

    def gain(self, label: str, budget: float | None) -> Mean | None:
        """How much more a row has than random with as many KV bytes; None for random itself."""
        row = self.rows.get((label, budget))
        if row is None or label == "random" or not self.random():
            return None
        return self.made[label, budget].minus(self.random_at(row["shares"]["kv_bytes"]))

    def random(self) -> dict[float, Evaluation]:
        """The random control by the share of KV bytes that it leaves."""
        return {
            row["shares"]["kv_bytes"]: self.made[key]
            for key, row in self.rows.items()
            if key[0] == "random"
        }

    def random_at(self, share: float) -> Evaluation:
        """What random has with that share of the KV bytes, on a straight line sample by sample.

        Without any visual token the model has nothing right, with all it is the unpruned one.
        """
        nothing = tuple(replace(one, score=0.0) for one in self.full.results)
        known = {0.0: replace(self.full, results=nothing), **self.random(), 1.0: self.full}
        low = max(at for at in known if at <= share)
        high = min(at for at in known if at >= share)
        part = (share - low) / (high - low) if high > low else 0.0
        pairs = zip(known[low].results, known[high].results, strict=True)
        between = tuple(
            replace(a, score=(1 - part) * (a.score or 0.0) + part * (b.score or 0.0))
            for a, b in pairs
        )
        return replace(self.full, results=between)

    def gains(self) -> str:
        """Points above random with as many KV bytes."""
        lines = [header(["method", *(f"{budget:.0%}" for budget in self.budgets)])]
        for label in self.labels:
            if label != "random":
                gains = [self.gain(label, budget) for budget in self.budgets]
                cells = ["" if one is None else percent(one, signed=True) for one in gains]
                lines.append(line([name(label), *cells]))
        return "\n".join(lines)

    def cost(self) -> str:
        """What is left of tokens, decoder FLOPs and KV bytes."""
        lines = [header(["method", *(f"{budget:.0%}" for budget in self.budgets)])]
        for label in self.labels:
            rows = [self.rows.get((label, budget)) for budget in self.budgets]
            lines.append(line([name(label), *("" if one is None else shares(one) for one in rows)]))
        return "\n".join(lines)

    def own(self) -> str:
        """Methods that decide themselves how much they keep."""
        columns = ["method", "tokens · FLOPs · KV", "accuracy", "minus unpruned", "minus random"]
        lines = [header(columns)]
        for (label, budget), row in self.rows.items():
            if budget is None:
                made = self.made[label, budget]
                means = made.minus(self.full), self.gain(label, None)
                losses = [percent(one, signed=True) for one in means]
                lines.append(line([label, shares(row), percent(made.mean), *losses]))
        return "\n".join(lines)

    def kinds(self) -> str:
        """For some budgets, methods by kinds."""
        parts = []
        for budget in CLOSE:
            if budget not in self.budgets:
                continue
            full = self.cells(self.found["unpruned"])
            lines = [f"**{budget:.0%}**", "", header(["method", *KINDS, CELLS])]
            rows = [("unpruned", self.full, full)]
            for label in self.labels:
                if (label, budget) in self.made:
                    row = self.rows[label, budget]
                    rows.append((name(label), self.made[label, budget], self.cells(row)))
            for label, made, cells in rows:
                means = [*(made.by_kind[kind] for kind in KINDS), cells.mean]
                lines.append(line([label, *(percent(mean) for mean in means)]))
            parts.append("\n".join(lines))
        return "\n\n".join(parts)


def name(label: str) -> str:
    """Controls stand in italics."""
    return f"*{label}*" if label in CONTROLS else label


def shares(row: Mapping[str, Any]) -> str:
    """What is left of tokens, decoder FLOPs and KV bytes."""
    names = ("visual_tokens", "decoder_flops", "kv_bytes")
    return " · ".join(f"{100 * row['shares'][one]:.0f}" for one in names)


def percent(mean: Mean | None, signed: bool = False) -> str:
    """A mean and half its interval's width."""
    assert mean is not None
    value = f"{100 * mean.value:{'+' if signed else ''}.1f}"
    return f"{value} ± {50 * (mean.high - mean.low):.1f}"


def header(cells: Sequence[str]) -> str:
    """A table's first two lines."""
    return line(cells) + "\n" + "|---" * len(cells) + "|"


def line(cells: Sequence[str]) -> str:
    """A table's line."""
    return "| " + " | ".join(cells) + " |"
