"""What a calibration found: γ of every layer over many questions, and the file made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.io.outputs import mark_of
from vlmprune.methods import PLPHP
from vlmprune.study.measure import versions

MARK = mark_of("calibrate")
BINS = 20
"""Bins of the histogram, from 0 to 1."""


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
    marks = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    names = ("min", "q25", "median", "q75", "max")
    layers = []
    for index, column in zip(gammas.layers, gammas.values.T, strict=True):
        quantiles = zip(names, column.quantile(marks).tolist(), strict=True)
        figures = {"mean": float(column.mean()), **dict(quantiles)}
        layers.append({"layer": index, **{k: round(v, 6) for k, v in figures.items()}})
    flat = gammas.values.flatten().clamp(0, 1)
    counts = torch.histc(flat, bins=BINS, min=0, max=1).long().tolist()
    return {
        "made_by": MARK,
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
        "versions": versions(),
    }
