"""The course of a training run: losses and accuracies by step, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmprune.draw import style
from vlmprune.draw.style import BLUE, GREEN, GREYS, ORANGE
from vlmprune.io.outputs import Output, mark_of

MARK = mark_of("train")
DATA, PICTURE = "curve.json", "curve.png"

# Trainer's names of what is kept, and ours.
NAMES = {
    "loss": "loss",
    "learning_rate": "rate",
    "eval_loss": "held_out_loss",
    "eval_accuracy": "accuracy",
}


def points(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """One point a step that was logged, from the Trainer's log history."""
    found: dict[int, dict[str, float]] = {}
    for line in history:
        named = {NAMES[k]: float(v) for k, v in line.items() if k in NAMES}
        if named:
            step = int(line["step"])
            found.setdefault(step, {"step": step}).update(named)
    return [found[step] for step in sorted(found)]


def write(folder: Path, title: str, history: Sequence[dict[str, Any]], force: bool = False) -> None:
    """Write `curve.json` and `curve.png`, over files of a run's alone unless `force` is given.

    Raises:
        VlmpruneError: another file is there, or the disk refuses.
    """
    made = points(history)
    text = json.dumps({"made_by": MARK, "run": title, "points": made}, indent=1) + "\n"
    Output(folder / DATA, MARK, force).write(text)
    if made:
        Output(folder / PICTURE, MARK, force).write(_drawn(title, made))


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Running mean with falling weights, the first values counted in full."""
    out, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + 1 - weight
        out.append(total / mass)
    return out


def _drawn(title: str, made: Sequence[dict[str, float]]) -> bytes:
    """A PNG."""
    figure = style.figure(7, 4, title)
    axes = figure.add_subplot()

    def of(name: str) -> tuple[list[float], list[float]]:
        some = [one for one in made if name in one]
        return [one["step"] for one in some], [one[name] for one in some]

    steps, losses = of("loss")
    axes.plot(steps, losses, color=GREYS[-1], linewidth=1)
    axes.plot(steps, smoothed(losses), color=BLUE, label="loss")
    steps, losses = of("held_out_loss")
    if losses:
        axes.plot(steps, losses, "o-", color=ORANGE, markersize=3, label="held-out loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    steps, right = of("accuracy")
    if right:
        other = axes.twinx()
        other.plot(steps, right, "s--", color=GREEN, markersize=3)
        other.set_ylim(0, 1)
        style.in_percent(other.yaxis)
        other.set_ylabel("accuracy", color=GREEN)
    axes.legend(handles, labels, frameon=False, loc="upper right")
    return style.png(figure, MARK)
