"""What a score costs: three panels with the Pareto front, as a PNG. Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.costs.units import MIB
from vlmprune.draw import style
from vlmprune.draw.style import COLOURS, GREYS, INK
from vlmprune.errors import VlmpruneError
from vlmprune.study.compare.results import MARK, Comparison, Row
from vlmprune.study.compare.tables import unit_of
from vlmprune.study.stats import front
from vlmprune.study.wording import budget

_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_GREY_MARKS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Dot:
    """One configuration.

    Attributes:
        name: of its method; configurations of one name are joined by a line.
        label: its budget, as text; "" for none.
        score: the higher the better, 0 to 1.
        costs: the lower the better, one an axis.
        low: lower end of the score's interval; None for none.
        high: upper end.
        control: whether it is a control, which is drawn in grey.
        full: whether it is the unpruned model.
    """

    name: str
    label: str
    score: float
    costs: tuple[float, ...]
    low: float | None = None
    high: float | None = None
    control: bool = False
    full: bool = False


def dots_of(result: Comparison) -> list[Dot]:
    """The configurations as the plot has them, with the costs that are known of all."""
    _, scale = unit_of(result)
    shown = _known(result)
    return [
        Dot(
            name=row.name,
            label=budget(row.keep) if row.keep is not None else "",
            score=row.score.value,
            costs=tuple(_costs(row)[at] / (scale, MIB, 1)[at] for at in shown),
            low=row.score.low,
            high=row.score.high,
            control=row.control,
            full=row.full,
        )
        for row in result.rows
    ]


def _costs(row: Row) -> tuple[float, float, float]:
    return row.flops, row.kv_bytes, row.first_token_ratio


def _known(result: Comparison) -> list[int]:
    """Numbers of the costs that are known of all configurations."""
    columns = zip(*map(_costs, result.rows), strict=True)
    return [at for at, each in enumerate(columns) if not any(map(math.isnan, each))]


def axes_of(result: Comparison) -> tuple[str, ...]:
    """What the costs of the plot are, those that are known."""
    names = (
        f"{unit_of(result)[0]}FLOPs of visual tokens (encoder and prefill)",
        "visual KV (MiB)",
        f"time to the first token on {result.device} (all tokens: 1)",
    )
    return tuple(names[at] for at in _known(result))


def plot(dots: Sequence[Dot], axes: Sequence[str], score: str, title: str = "") -> bytes:
    """Draw the score against each cost, with the points that no other beats joined by a line.

    Args:
        dots: the configurations, one or more.
        axes: what each cost is.
        score: what the score is.
        title: the heading.

    Returns:
        A PNG.

    Raises:
        VlmpruneError: there is nothing to draw.
    """
    if not dots:
        raise VlmpruneError("there is nothing to draw; compare one method or more.")
    columns = min(4, 1 + len({dot.name for dot in dots}))
    legend = -(-(1 + len({dot.name for dot in dots})) // columns)
    figure = style.figure(1.2 + 3.9 * len(axes), 4.1 + 0.24 * legend, title)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for number, (panel, name) in enumerate(zip(panels, axes, strict=True)):
        _panel(panel, dots, number)
        panel.set_xlabel(name, fontsize=11)
        style.open_axes(panel)
        style.grid(panel)
        panel.margins(x=0.14, y=0.1)
    panels[0].set_ylabel(score, fontsize=11)
    style.in_percent(panels[0].yaxis)
    handles, names = panels[0].get_legend_handles_labels()
    shown = list(map(style.plain, names))
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, frameon=False)
    return style.png(figure, MARK)


def _styles(dots: Sequence[Dot]) -> Iterator[tuple[str, list[Dot], dict[str, Any]]]:
    """The configurations by method, controls first so that the others lie over them."""
    names = dict.fromkeys(dot.name for dot in dots if not dot.full)
    groups = [(name, [dot for dot in dots if dot.name == name and not dot.full]) for name in names]
    controls = [group for group in groups if group[1][0].control]
    others = [group for group in groups if not group[1][0].control]
    for number, (name, group) in enumerate(controls):
        mark = _GREY_MARKS[number % len(_GREY_MARKS)]
        yield name, group, {"color": GREYS[number % len(GREYS)], "marker": mark, "zorder": 2}
    for number, (name, group) in enumerate(others):
        # Coprime steps, so that a colour comes back with another mark.
        mark = _MARKS[(number + number // len(COLOURS)) % len(_MARKS)]
        yield name, group, {"color": COLOURS[number % len(COLOURS)], "marker": mark, "zorder": 3}


def _panel(panel: Any, dots: Sequence[Dot], axis: int) -> None:
    for dot in dots:
        if dot.full:
            panel.axhline(dot.score, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    for name, group, look in _styles(dots):
        group = sorted(group, key=lambda dot: dot.costs[axis])
        costs, scores = [dot.costs[axis] for dot in group], [dot.score for dot in group]
        for dot in group:
            if dot.low is not None and dot.high is not None:
                panel.vlines(
                    *(dot.costs[axis], dot.low, dot.high),
                    color=look["color"],
                    linewidth=1.2,
                    alpha=0.45,
                    zorder=look["zorder"],
                )
        panel.plot(costs, scores, label=name, linewidth=1, markersize=6, alpha=0.9, **look)
    found = [dots[i] for i in front([(dot.costs[axis], dot.score) for dot in dots])]
    panel.plot(
        [dot.costs[axis] for dot in found],
        [dot.score for dot in found],
        color=INK,
        linewidth=5,
        alpha=0.16,
        solid_capstyle="round",
        label="Pareto front",
        zorder=1.5,
    )
    for dot in dots:
        if dot.full:
            panel.plot(
                *([dot.costs[axis]], [dot.score]),
                linestyle="",
                marker="*",
                markersize=13,
                color=INK,
                label=dot.name,
                zorder=4,
            )
    seen = set()
    for dot in found:
        if dot.label and dot.label not in seen:
            seen.add(dot.label)
            panel.annotate(
                *(dot.label, (dot.costs[axis], dot.score)),
                xytext=(-4, 7),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=INK,
            )
