"""Thresholds of PLPHP for one model: γ measured over questions, its quantiles, a file, a plot.

What counts as much attention to the image differs from model to model, so that alpha and beta do
not carry over. Prints nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import families, release
from vlmprune.io.models import Loaded, prepare_batch
from vlmprune.methods import PLPHP

BINS = 20
"""Bins of the histogram, from 0 to 1."""

# Of Okabe and Ito's palette, which the colour-blind can tell apart; darker where text has it.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#C04F00", "#00785A", "#5F6670"
_ALPHA, _BETA, _GAMMA = "\u03b1", "\u03b2", "\u03b3"
# Dots drawn at most, so that the picture stays small.
_DOTS = 2000
_INCHES, _DPI = (8.2, 5.0), 150


@dataclass(frozen=True)
class Gammas:
    """Vision attention γ of every decoder layer that PLPHP may cut, over many questions.

    Attributes:
        values: [S, L] float64; one row a question with its images.
        layers: number of each of the L layers.
        window: how many of a prompt's last tokens were asked.
        architecture: what it was measured on, as in `families.architecture`.
    """

    values: Tensor = field(repr=False)
    layers: tuple[int, ...]
    window: int
    architecture: str

    def __len__(self) -> int:
        return len(self.values)

    def retention(self, pruner: PLPHP) -> Tensor:
        """[S, L] retention rates that a pruner asks for at these γ."""
        three = [pruner.r - pruner.dr, pruner.r, pruner.r + pruner.dr]
        rates = torch.tensor([three] * len(self.layers), dtype=torch.float64)
        rates[torch.tensor(self.layers) < pruner.first_pruned_layer] = 1
        level = (self.values >= pruner.beta).long() + (self.values >= pruner.alpha).long()
        return rates.gather(1, level.T).T


def questions_for(
    loaded: Loaded,
    images: Iterable[Image.Image],
    questions: Sequence[str],
    batch: int = 4,
) -> Iterator[Any]:
    """The processor's inputs for every question about every image, some of them at a time.

    Args:
        loaded: model and processor.
        images: pictures; taken one by one, so that they may be opened as they are wanted.
        questions: asked about each of them.
        batch: questions in one batch.

    Yields:
        Inputs with `input_ids` [≤ batch, T], padded on the left.
    """
    if batch < 1:
        raise VlmpruneError(f"batch={batch} is too few; use 1 or more.")
    pairs = ((image, question) for image in images for question in questions)
    while some := list(islice(pairs, batch)):
        yield prepare_batch(loaded, [[image] for image, _ in some], [asked for _, asked in some])


def measure(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    window: int = 1,
    say: Callable[[str], None] = lambda message: None,
) -> Gammas:
    """Run prefill over batches of questions and collect γ; the model's answers do not change.

    Args:
        model: the host.
        batches: inputs of its processor, with `input_ids` [B, T]; rows without images are skipped.
        window: how many of a prompt's last tokens are asked.
        say: told how far it is, for a progress line.

    Raises:
        VlmpruneError: there was no image, or the model computes no numbers.
    """
    # Keeps everything, so that it only looks.
    probe = PLPHP(r=1.0, dr=0.0, window=window)
    rows: list[list[float]] = []
    layers: tuple[int, ...] = ()
    with probe(model) as handle:
        for inputs in batches:
            model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
            found = handle.report.cut if handle.report is not None else []
            if not found:
                continue
            layers = tuple(layer.index for layer in found)
            for row in zip(*(layer.gamma for layer in found), strict=True):
                seen = [gamma for gamma in row if gamma is not None]
                rows += [seen] if seen else []
            say(f"{len(rows)} questions seen")
    if not rows:
        raise VlmpruneError("there was no image to calibrate on; give one or more pictures.")
    values = torch.tensor(rows, dtype=torch.float64)
    return Gammas(values, layers, window, families.architecture(model))


def check_quantiles(beta_quantile: float, alpha_quantile: float) -> None:
    """Refuse quantiles that cannot be thresholds, before any work.

    Raises:
        VlmpruneError: they are not in rising order within 0 and 1.
    """
    if not 0 <= beta_quantile < alpha_quantile <= 1:
        raise VlmpruneError(
            f"the quantiles {beta_quantile:g} for beta and {alpha_quantile:g} for alpha are not in "
            "rising order within 0 and 1, as 0.25 and 0.75 are."
        )


def thresholds(
    gammas: Gammas, beta_quantile: float = 0.25, alpha_quantile: float = 0.75
) -> tuple[float, float]:
    """alpha and beta, as quantiles of γ over all layers and questions together.

    The quantiles are our choice, for the paper has none to hand: a quarter of all layers, over the
    questions, counts as vision-attentive and a quarter as vision-indifferent. As both are equally
    many, the mean retention rate stays r.

    Args:
        gammas: from `measure`.
        beta_quantile: share of layers below beta.
        alpha_quantile: share of layers below alpha.

    Returns:
        (alpha, beta), linear between neighbouring values and rounded to γ's six digits.

    Raises:
        VlmpruneError: the quantiles are out of order, or γ is the same at both.
    """
    check_quantiles(beta_quantile, alpha_quantile)
    asked = torch.tensor([beta_quantile, alpha_quantile], dtype=torch.float64)
    beta, alpha = (round(float(value), 6) for value in gammas.values.flatten().quantile(asked))
    if not alpha > beta:
        raise VlmpruneError(
            f"vision attention is {alpha:g} at both quantiles, so that no threshold tells layers "
            "apart; give quantiles further apart or more pictures, or set alpha and beta yourself."
        )
    return alpha, beta


def document(
    gammas: Gammas,
    alpha: float,
    beta: float,
    model: str,
    beta_quantile: float | None = None,
    alpha_quantile: float | None = None,
) -> dict[str, Any]:
    """The calibration as JSON can hold it; `PLPHP.from_file` reads its entry "plphp".

    Args:
        gammas: from `measure`.
        alpha: upper threshold.
        beta: lower threshold.
        model: name of the model, for people.
        beta_quantile: of γ, that beta is; None where it was set otherwise.
        alpha_quantile: likewise.
    """
    import vlmprune

    marks = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    names = ("min", "q25", "median", "q75", "max")
    layers = []
    for index, column in zip(gammas.layers, gammas.values.T, strict=True):
        spread = zip(names, column.quantile(marks).tolist(), strict=True)
        figures = {"mean": float(column.mean()), **dict(spread)}
        layers.append({"layer": index, **{k: round(v, 6) for k, v in figures.items()}})
    flat = gammas.values.flatten().clamp(0, 1)
    counts = torch.histc(flat, bins=BINS, min=0, max=1).long().tolist()
    return {
        "plphp": {
            "alpha": alpha,
            "beta": beta,
            "window": gammas.window,
            "calibrated_on": gammas.architecture,
        },
        "model": model,
        "samples": len(gammas),
        "quantiles": {"alpha": alpha_quantile, "beta": beta_quantile},
        "layers": layers,
        "histogram": {"from": 0.0, "to": 1.0, "counts": counts},
        "versions": {
            "vlmprune": vlmprune.__version__,
            "torch": torch.__version__,
            "transformers": release.version(),
        },
    }


def check_target(path: Path) -> Path:
    """Refuse a file that could not be written, before any work.

    Raises:
        VlmpruneError: its folder is missing, it is a folder itself, or permission is.
    """
    if path.is_dir():
        raise VlmpruneError(f"{str(path)!r} is a folder; give the name of a file in it.")
    if not path.parent.is_dir():
        raise VlmpruneError(f"the folder of {str(path)!r} does not exist; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise VlmpruneError(f"{str(path)!r} may not be written; give another file.")
    return path


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write what `document` made.

    Raises:
        VlmpruneError: the disk refuses.
    """
    check_target(path)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise VlmpruneError(f"{str(path)!r} cannot be written ({error.strerror}).") from error


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
    # It takes a second, and only this needs it. Without pyplot no window system is looked for.
    from matplotlib.figure import Figure

    check_target(path)
    figure = Figure(figsize=_INCHES, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_gammas(above, gammas, pruner)
    _draw_retention(below, gammas, pruner)
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
    try:
        figure.savefig(path, format="png", dpi=_DPI)
    except OSError as error:
        raise VlmpruneError(f"{str(path)!r} cannot be written ({error.strerror}).") from error


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
        color=_GREY,
        alpha=0.35,
        linewidths=0,
        label=f"a question ({len(dots)} of {len(gammas)} drawn)",
    )
    axes.fill_between(
        places, low, high, color=_BLUE, alpha=0.22, linewidth=0, label="middle half of questions"
    )
    axes.plot(places, middle, color=_BLUE, marker="o", markersize=5, linewidth=2, label="median")
    for name, value, colour, dashes, side in (
        (_ALPHA, pruner.alpha, _ORANGE, "--", "bottom"),
        (_BETA, pruner.beta, _GREEN, ":", "top"),
    ):
        axes.axhline(value, color=colour, linestyle=dashes, linewidth=1.6)
        axes.annotate(
            f"{name} = {value:.3g}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            fontsize=11,
            va=side,
        )
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
    bars = axes.bar(range(len(mean)), mean, width=0.6, color=_BLUE, alpha=0.65)
    axes.axhline(float(rates.mean()), color=_GREY, linewidth=1, linestyle="--")
    axes.annotate(
        f"all: {rates.mean():.0%}",
        (1, float(rates.mean())),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        color=_GREY,
        fontsize=10,
        va="center",
    )
    few = len(mean) <= 16
    if few:
        axes.bar_label(bars, [f"{value:.0%}" for value in mean], fontsize=9, padding=1)
    axes.set_ylim(0, 1.25 * max(mean) if few else 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("mean\nretention", fontsize=11)
    axes.set_xlabel(f"decoder layer  (r = {pruner.r:g}, Δr = {pruner.dr:g})", fontsize=11)
    step = max(1, len(mean) // 16)
    shown = list(range(0, len(mean), step))
    axes.set_xticks(shown, [str(gammas.layers[i]) for i in shown])
