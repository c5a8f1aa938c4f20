"""The picture of a search: accuracy against cost, and a schedule where one was found."""

from __future__ import annotations

from typing import Any

from vlmprune.costs.units import percent
from vlmprune.draw import style
from vlmprune.draw.style import BLUE, GREY, ORANGE
from vlmprune.study.search.optimise import MARK, Found


def plot(found: Found, cost: str, title: str = "") -> bytes:
    """Draw every trial, the front, the limit and the choice, as PNG.

    Args:
        found: the outcome.
        cost: what costs are, in words.
        title: its heading.

    Returns:
        A PNG.
    """
    figure = style.figure(8.0, 4.6, title)
    rates = None if found.best is None else found.best.settings.get("rates")
    if rates is None:
        left = figure.subplots()
    else:
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        _draw_rates(right, rates)
    _draw_trials(left, found, cost)
    return style.png(figure, MARK)


def _draw_trials(axes: Any, found: Found, cost: str) -> None:
    for allowed, colour, words in (
        (False, GREY, "loses more"),
        (True, BLUE, "within the limit"),
    ):
        some = [one for one in found.tried if one.allowed == allowed]
        axes.scatter(
            [one.cost for one in some],
            [one.accuracy for one in some],
            s=28,
            color=colour,
            alpha=0.75,
            linewidths=0,
            label=f"{words} ({len(some)})",
        )
    best = found.front
    axes.plot([b.cost for b in best], [b.accuracy for b in best], color=BLUE, linewidth=1)
    axes.axhline(found.full, color=GREY, linewidth=1)
    limit = found.full * (1 - found.max_loss)
    axes.axhline(limit, color=ORANGE, linewidth=1.4, linestyle="--")
    for height, words, colour, side in (
        (found.full, "unpruned", GREY, "bottom"),
        (limit, f"loss {percent(found.max_loss, 'g')}", ORANGE, "top"),
    ):
        axes.annotate(
            words,
            (0.005, height),
            xycoords=("axes fraction", "data"),
            ha="left",
            va=side,
            color=colour,
            fontsize=9,
        )
    if found.best is not None:
        axes.scatter(
            [found.best.cost],
            [found.best.accuracy],
            s=170,
            marker="*",
            color=ORANGE,
            zorder=3,
            label="chosen",
        )
    axes.set_xlabel(f"{cost}, relative to the unpruned model", fontsize=10)
    axes.set_ylabel("accuracy on the search's questions", fontsize=10)
    axes.legend(fontsize=9, frameon=False, loc="lower right")
    style.open_axes(axes)


def _draw_rates(axes: Any, rates: list[float]) -> None:
    axes.bar(range(len(rates)), rates, color=BLUE, alpha=0.65)
    axes.set_ylim(0, 1.05)
    style.in_percent(axes.yaxis)
    axes.set_xlabel("decoder layer", fontsize=10)
    axes.set_ylabel("visual tokens kept", fontsize=10)
    axes.set_xticks(range(0, len(rates), max(1, len(rates) // 16)))
    style.open_axes(axes)
