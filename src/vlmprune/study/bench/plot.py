"""`bench`'s figures as a picture: how many times faster each method is, and where its floor lies.

Drawn from the JSON alone, so that a file of another machine can be drawn too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune.draw import style
from vlmprune.draw.style import BLUE, INK
from vlmprune.io.outputs import mark_of
from vlmprune.study.bench.results import Quartiles
from vlmprune.study.bench.tables import title

MARK = mark_of("bench")

_PANELS = (
    ("first token", "first_token_speedup", "first_ms", "floor"),
    ("decode", "decode_speedup", "decode_tokens_per_second", "decode_floor"),
    ("end to end", "total_speedup", "total_ms", None),
    ("visual KV", "visual_kv_ratio", None, "decode_floor"),
)


def plot(content: Mapping[str, Any]) -> bytes:
    """Draw a row of panels for each run: times faster than with all tokens, and each floor.

    Args:
        content: what `vlmprune bench --out` writes.

    Returns:
        A PNG.
    """
    runs = content["runs"]
    height = sum(1.1 + 0.42 * len(run["methods"]) for run in runs)
    about = (
        f"{runs[0]['model']}; {content['device_name']}, {runs[0]['dtype']}: multiples of all tokens"
    )
    figure = style.figure(13, 1.0 + height, about)
    grid = figure.subplots(
        len(runs),
        len(_PANELS),
        squeeze=False,
        height_ratios=[1.1 + 0.42 * len(run["methods"]) for run in runs],
    )
    for run, panels in zip(runs, grid, strict=True):
        for number, (panel, what) in enumerate(zip(panels, _PANELS, strict=True)):
            _panel(panel, run, *what, names=not number)
        panels[0].set_title(style.plain(title(run)), fontsize=10, loc="left", pad=20)
    return style.png(figure, MARK)


def _panel(
    panel: Any,
    run: Mapping[str, Any],
    name: str,
    ratio: str,
    quartiles: str | None,
    floor: str | None,
    names: bool,
) -> None:
    methods = run["methods"]
    floors = {one["name"]: one for one in run.get("floors", ())}
    reach = 1.0
    for place, one in enumerate(methods):
        value = one["against_all_tokens"][ratio]
        if value is None:
            panel.text(0.05, place, "not measured", va="center", fontsize=8, color=INK)
            continue
        reach = max(reach, value)
        panel.barh(place, value, height=0.6, color=BLUE, zorder=2)
        found = one[quartiles] if quartiles else None
        if found and found["median"]:
            around = value * Quartiles(**found).share
            panel.errorbar(value, place, xerr=around, color=INK, linewidth=1, capsize=2, zorder=3)
        # At the panel's edge, where neither a bar nor a floor can lie.
        panel.text(
            *(1.0, place, f"{value:.2f}x"),
            transform=panel.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=8,
        )
        found = floors.get(one.get(floor) if floor else None)
        best = found and found["against_all_tokens"][ratio]
        if best:
            reach = max(reach, best)
            panel.vlines(best, place - 0.38, place + 0.38, color=INK, linewidth=2, zorder=4)
    panel.axvline(1, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    # Room for the numbers.
    panel.set_xlim(0, 1.25 * reach)
    panel.set_ylim(len(methods) - 0.5, -0.5)
    titles = [style.plain(one["name"]) for one in methods]
    panel.set_yticks(range(len(methods)), titles if names else [])
    panel.set_xlabel(f"{name}{', floor: dark line' if floors and names else ''}", fontsize=9)
    style.open_axes(panel, labels=8)
    style.grid(panel, "x")
