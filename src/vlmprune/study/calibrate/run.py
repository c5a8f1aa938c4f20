"""Thresholds of PLPHP for one model: γ measured over questions, and its quantiles.

What counts as much attention to the image differs from model to model, so that alpha and beta do
not carry over. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import families
from vlmprune.io.models import Loaded, prepare_batch
from vlmprune.methods import PLPHP
from vlmprune.study.calibrate.results import Gammas


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
