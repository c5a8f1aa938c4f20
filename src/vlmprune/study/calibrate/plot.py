"""The picture of a calibration: γ by layer with the thresholds, and the retention they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmprune.costs.units import percent
from vlmprune.draw import style
from vlmprune.draw.style import BLUE, GREEN, GREY, ORANGE
from vlmprune.io.outputs import check_target, write
from vlmprune.methods import PLPHP
from vlmprune.study.calibrate.results import MARK, Gammas

_ALPHA, _BETA, _GAMMA = "\u03b1", "\u03b2", "\u03b3"
# Dots drawn at most, so that the picture stays small.
_DOTS = 2000


def plot(gammas: Gammas, pruner: PLPHP, path: Path, title: str = "") -> None:
    """Draw γ by layer with the thresholds, and below the mean retention that comes of it, as PNG.

    Args:
        gammas: from `measure`.
        pruner: whose thresholds and rates are drawn.
        path: the picture.
        title: its heading.

    Raises:
        VlmpruneError: the disk refuses.
    """
    check_target(path)
    write(path, drawn(gammas, pruner, title))


def drawn(gammas: Gammas, pruner: PLPHP, title: str = "") -> bytes:
    """The same as a PNG's bytes."""
    figure = style.figure(8.2, 5.0, title)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_gammas(above, gammas, pruner)
    _draw_retention(below, gammas, pruner)
    for axes in (above, below):
        style.open_axes(axes)
    return style.png(figure, MARK)


def _draw_gammas(axes: Any, gammas: Gammas, pruner: PLPHP) -> None:
    places = torch.arange(len(gammas.layers), dtype=torch.float64)
    marks = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = gammas.values.quantile(marks, dim=0)
    # Evenly picked and evenly set apart, so that the same γ always give the same picture.
    step = -(-gammas.values.numel() // _DOTS)
    dots = gammas.values[::step]
    apart = ((torch.arange(len(dots)) * 0.618034) % 1 - 0.5)[:, None] * 0.3
    axes.scatter(
        (places + apart).flatten(),
        dots.flatten(),
        s=9,
        color=GREY,
        alpha=0.35,
        linewidths=0,
        label=f"a question ({len(dots)} of {len(gammas)} drawn)",
    )
    axes.fill_between(
        places,
        low,
        high,
        color=BLUE,
        alpha=0.22,
        linewidth=0,
        label="middle half of questions",
    )
    axes.plot(places, middle, color=BLUE, marker="o", markersize=5, linewidth=2, label="median")
    for name, value, colour, dashes, side in (
        (_ALPHA, pruner.alpha, ORANGE, "--", "bottom"),
        (_BETA, pruner.beta, GREEN, ":", "top"),
    ):
        axes.axhline(value, color=colour, linestyle=dashes, linewidth=1.6)
        style.beside(axes, f"{name} = {value:.3g}", value, colour, side)
    top = max(1.05 * float(gammas.values.max()), 1.1 * pruner.alpha)
    # A little below 0, so that questions without any attention to the image are seen.
    axes.set_ylim(-0.02 * top, top)
    axes.set_ylabel(f"vision attention {_GAMMA}", fontsize=11)
    axes.legend(
        fontsize=9, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
    )


def _draw_retention(axes: Any, gammas: Gammas, pruner: PLPHP) -> None:
    rates = gammas.retention(pruner)
    mean = rates.mean(dim=0).tolist()
    bars = axes.bar(range(len(mean)), mean, width=0.6, color=BLUE, alpha=0.65)
    axes.axhline(float(rates.mean()), color=GREY, linewidth=1, linestyle="--")
    every = float(rates.mean())
    style.beside(axes, f"all: {percent(every)}", every, GREY)
    few = len(mean) <= 16
    if few:
        axes.bar_label(bars, list(map(percent, mean)), fontsize=9, padding=1)
    axes.set_ylim(0, 1.25 * max(mean) if few else 1)
    style.in_percent(axes.yaxis)
    axes.set_ylabel("mean\nretention", fontsize=11)
    axes.set_xlabel(f"decoder layer  (r = {pruner.r:g}, Δr = {pruner.dr:g})", fontsize=11)
    step = max(1, len(mean) // 16)
    shown = list(range(0, len(mean), step))
    axes.set_xticks(shown, [str(gammas.layers[i]) for i in shown])
