"""The picture of a search: accuracy against cost, and a schedule where one was found."""

from __future__ import annotations

import io
from typing import Any

from vlmprune.study.search.optimise import MARK, Found

# Colours that people with colour-blindness can tell apart.
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#8a8a8a"
_INCHES, _DPI = (8.0, 4.6), 120


def plot(found: Found, cost: str, title: str = "") -> bytes:
    """Draw every trial, the front, the limit and the choice, as PNG.

    Args:
        found: the outcome.
        cost: what costs are, in words.
        title: its heading.

    Returns:
        A PNG.
    """
    # It takes a second, and only this needs it. Without pyplot no window system is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    rates = None if found.best is None else found.best.settings.get("rates")
    if rates is None:
        left = figure.subplots()
    else:
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        _draw_rates(right, rates)
    _draw_trials(left, found, cost)
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=_DPI, metadata={"Software": MARK})
    return target.getvalue()


def _draw_trials(axes: Any, found: Found, cost: str) -> None:
    for allowed, colour, words in (
        (False, _GREY, "loses more"),
        (True, _BLUE, "within the limit"),
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
    axes.plot([b.cost for b in best], [b.accuracy for b in best], color=_BLUE, linewidth=1)
    axes.axhline(found.full, color=_GREY, linewidth=1)
    limit = found.full * (1 - found.max_loss)
    axes.axhline(limit, color=_ORANGE, linewidth=1.4, linestyle="--")
    for height, words, colour, side in (
        (found.full, "unpruned", _GREY, "bottom"),
        (limit, f"loss {100 * found.max_loss:g} %", _ORANGE, "top"),
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
            color=_ORANGE,
            zorder=3,
            label="chosen",
        )
    axes.set_xlabel(f"{cost}, relative to the unpruned model", fontsize=10)
    axes.set_ylabel("accuracy on the search's questions", fontsize=10)
    axes.legend(fontsize=9, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rates(axes: Any, rates: list[float]) -> None:
    axes.bar(range(len(rates)), rates, color=_BLUE, alpha=0.65)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("decoder layer", fontsize=10)
    axes.set_ylabel("visual tokens kept", fontsize=10)
    axes.set_xticks(range(0, len(rates), max(1, len(rates) // 16)))
    axes.spines[["top", "right"]].set_visible(False)
