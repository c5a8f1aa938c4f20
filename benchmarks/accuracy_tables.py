"""What `accuracy.py` and `learned.py` stored, as the tables of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from page_parts import table
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.stats import Mean
from vlmprune.study.tasks.answered import Answered

BUDGETS = (0.5, 0.33, 0.22, 0.11, 0.05)
CONTROLS = ("random", "uniform grid", "average pooling", "downsampling")
KINDS = ("presence", "count", "position", "relation", "reading", "listing")
CLOSE = (0.33, 0.22, 0.11)
"""Budgets that get a table by kind of question."""
CELLS, AGAIN = "listed cells", "kept again"


class Table:
    """Stored rows as evaluations, and tables of them.

    Args:
        found: what `accuracy.py` stored.
        again: by label and budget, the share of tokens kept again (`kept_again.py`); None leaves
            its columns out.
    """

    def __init__(
        self,
        found: Mapping[str, Any],
        again: Mapping[tuple[str, float | None], float] | None = None,
    ) -> None:
        self.found = found
        self.again = again
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
        torch, transformers = self.releases("torch"), self.releases("transformers")
        return (
            f"{len(self.found['samples'])} questions about {len(groups)} scenes, "
            f"{about['model']}; torch {torch}, transformers {transformers}, "
            f"{about['batch']} questions at once, one thread. Unpruned: "
            f"{percent(self.full.mean)} per cent."
        )

    def releases(self, library: str) -> str:
        """The versions of a library that rows were made with."""
        rows = (row.get("versions", self.found["about"]) for row in self.rows.values())
        made = {self.found["about"][library], *(versions[library] for versions in rows)}
        return " and ".join(sorted(made))

    def accuracy(self) -> str:
        """Methods by budgets, with a mark beside random."""

        def cell(label: str, budget: float) -> str:
            made = self.made.get((label, budget))
            return "" if made is None else f"{percent(made.mean)}{self.mark(label, budget)}"

        if self.again is None:
            return self.by_budget(self.labels, cell)
        kept = {label: share for (label, budget), share in self.again.items() if budget}
        return self.by_budget(self.labels, cell, kept)

    def by_budget(
        self,
        labels: Sequence[str],
        cell: Callable[[str, float], str],
        again: Mapping[str, float] | None = None,
    ) -> str:
        """A table of methods by budgets, with a last column of shares that are kept again."""
        heads = ["method", *(f"{budget:.0%}" for budget in self.budgets)]
        rows = [[name(one), *(cell(one, budget) for budget in self.budgets)] for one in labels]
        if again is not None:
            heads.append(AGAIN)
            for label, row in zip(labels, rows, strict=True):
                row.append(kept_share(again.get(label)))
        return table(heads, rows)

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

        def cell(label: str, budget: float) -> str:
            gain = self.gain(label, budget)
            return "" if gain is None else percent(gain, signed=True)

        return self.by_budget([one for one in self.labels if one != "random"], cell)

    def cost(self) -> str:
        """What is left of tokens, decoder FLOPs and KV bytes."""

        def cell(label: str, budget: float) -> str:
            row = self.rows.get((label, budget))
            return "" if row is None else shares(row)

        return self.by_budget(self.labels, cell)

    def own(self) -> str:
        """Methods that decide themselves how much they keep."""
        heads = ["method", "tokens · FLOPs · KV", "accuracy", "minus unpruned", "minus random"]
        rows = []
        for (label, budget), row in self.rows.items():
            if budget is None:
                made = self.made[label, budget]
                means = made.minus(self.full), self.gain(label, None)
                losses = [percent(one, signed=True) for one in means]
                rows.append([label, shares(row), percent(made.mean), *losses])
                if self.again is not None:
                    rows[-1].append(kept_share(self.again.get((label, None))))
        if self.again is not None:
            heads.append(AGAIN)
        return table(heads, rows)

    def kinds(self) -> str:
        """For some budgets, methods by kinds."""
        parts = []
        for budget in CLOSE:
            if budget not in self.budgets:
                continue
            full = self.cells(self.found["unpruned"])
            lines = [("unpruned", self.full, full)]
            for label in self.labels:
                if (label, budget) in self.made:
                    row = self.rows[label, budget]
                    lines.append((name(label), self.made[label, budget], self.cells(row)))
            rows = [
                [label, *(percent(made.by_kind[kind]) for kind in KINDS), percent(cells.mean)]
                for label, made, cells in lines
            ]
            parts.append(f"**{budget:.0%}**\n\n" + table(["method", *KINDS, CELLS], rows))
        return "\n\n".join(parts)

    def by_tokens(self) -> str:
        """A table for each number of tokens: all kinds, each, and the difference from random."""
        parts = []
        for tokens in sorted({budget for _, budget in self.rows}, reverse=True):
            rows = []
            for label, budget in self.rows:
                if budget != tokens:
                    continue
                made = self.made[label, budget]
                gain = made.minus(self.made["random", tokens])
                apart = "" if label == "random" else percent(gain, signed=True)
                kinds = (percent(made.by_kind[kind]) for kind in KINDS)
                rows.append([name(label), percent(made.mean), apart, *kinds])
            title = f"**{tokens:g} visual token{'' if tokens == 1 else 's'}**"
            parts.append(f"{title}\n\n" + table(["method", "all", "minus random", *KINDS], rows))
        return "\n\n".join(parts)


def name(label: str) -> str:
    """Controls stand in italics."""
    return f"*{label}*" if label in CONTROLS else label


def kept_share(share: float | None) -> str:
    """What is kept again, in per cent; 100 where nothing at all is lost."""
    if share is None:
        return ""
    # What is not all is not rounded to it.
    return "100" if share == 1 else f"{min(99.9, 100 * share):.1f}"


def shares(row: Mapping[str, Any]) -> str:
    """What is left of tokens, decoder FLOPs and KV bytes."""
    names = ("visual_tokens", "decoder_flops", "kv_bytes")
    return " · ".join(f"{100 * row['shares'][one]:.0f}" for one in names)


def percent(mean: Mean | None, signed: bool = False) -> str:
    """A mean and half its interval's width."""
    assert mean is not None
    value = f"{100 * mean.value:{'+' if signed else ''}.1f}"
    return f"{value} ± {50 * (mean.high - mean.low):.1f}"
