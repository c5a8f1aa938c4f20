"""One style for every plot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pages import result
from vlmprune.draw import style
from vlmprune.methods import PLPHP
from vlmprune.study.calibrate.plot import plot as plot_calibration
from vlmprune.study.calibrate.results import Gammas
from vlmprune.study.compare import plot as pareto
from vlmprune.study.search.optimise import Found, Tried
from vlmprune.study.search.plot import plot as plot_search
from vlmprune.training import curve


def colours(content: bytes) -> set[str]:
    """Those that a picture holds."""
    with Image.open(io.BytesIO(content)) as picture:
        found = picture.convert("RGB").getcolors(2**24) or []
    return {"#{:02X}{:02X}{:02X}".format(*one) for _, one in found}


def compared(folder: Path) -> bytes:
    found = result()
    return pareto.plot(pareto.dots_of(found), pareto.axes_of(found), found.what)


def searched(folder: Path) -> bytes:
    tried = [Tried({"keep": k}, 0.8 - 0.1 / k, 0.1 / k, k, k > 1) for k in (0.5, 2.0)]
    return plot_search(Found(0.8, 0.1, tried), "FLOPs")


def calibrated(folder: Path) -> bytes:
    values = torch.tensor([[0.1, 0.4], [0.2, 0.6]], dtype=torch.float64)
    gammas = Gammas(values, (0, 1), 1, "a model")
    plot_calibration(gammas, PLPHP(alpha=0.5, beta=0.2), folder / "a.png")
    return (folder / "a.png").read_bytes()


def trained(folder: Path) -> bytes:
    history = [{"step": n, "loss": 3 / n} for n in range(1, 20)]
    curve.write(folder, "a run", [*history, {"step": 9, "eval_loss": 1.0, "eval_accuracy": 0.5}])
    assert json.loads((folder / "curve.json").read_text())["points"][8]["accuracy"] == 0.5
    return (folder / "curve.png").read_bytes()


@pytest.mark.parametrize(
    ("draw", "other"),
    [
        (compared, style.GREY),
        (searched, style.ORANGE),
        (calibrated, style.GREEN),
        (trained, style.ORANGE),
    ],
)
def test_every_plot_is_drawn_in_it(tmp_path: Path, draw: Any, other: str) -> None:
    content = draw(tmp_path)
    assert {style.BLUE, other} <= colours(content)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        # Matplotlib writes the dots of a metre, rounded.
        assert round(picture.info["dpi"][0]) == style.DPI


def test_what_a_figure_begins_with() -> None:
    figure = style.figure(2, 1, "costs $5 or $6")
    axes = figure.subplots()
    style.open_axes(axes, labels=7)
    style.in_percent(axes.yaxis)
    style.grid(axes, "x")
    axes.plot([0, 1], [0, 0.5], color=style.BLUE)
    content = style.png(figure, "vlmprune test")
    assert figure.get_suptitle() == r"costs \$5 or \$6"
    shown = {side: axes.spines[side].get_visible() for side in ("top", "right", "left", "bottom")}
    assert shown == {"top": False, "right": False, "left": True, "bottom": True}
    assert "50 %" in [label.get_text() for label in axes.get_yticklabels()]
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (2 * style.DPI, style.DPI)
        assert picture.info["Software"] == "vlmprune test"
    lines = {axis.get_gridlines()[0].get_visible(): axis for axis in (axes.xaxis, axes.yaxis)}
    assert lines == {True: axes.xaxis, False: axes.yaxis}
    assert axes.xaxis.get_gridlines()[0].get_color() == style.GRID
    assert style.png(style.figure(2, 1), "x") != content and not style.figure(2, 1).get_suptitle()
