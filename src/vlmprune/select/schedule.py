"""Retention rates by decoder layer, and the file that holds them. Imports no tensor library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.files import parsed
from vlmprune.select.settings import is_share

FORMAT = "vlmprune schedule 1"


def check_rates(rates: Sequence[Any]) -> tuple[float, ...]:
    """Retention rates, one a decoder layer.

    Args:
        rates: of layer 0 on.

    Raises:
        VlmpruneError: one is no number above 0 to 1, or above the one before it; or the first is
            not 1, as nothing ranks tokens before layer 0.
    """
    for layer, rate in enumerate(rates):
        if not is_share(rate, zero=False):
            raise VlmpruneError(f"rate {rate!r} of layer {layer} is not a number above 0, up to 1.")
        if layer and rate > rates[layer - 1]:
            raise VlmpruneError(
                f"rate {rate} of layer {layer} is above the {rates[layer - 1]} of the layer before "
                "it; what was dropped is gone, so rates may only fall."
            )
    if not rates or rates[0] != 1:
        raise VlmpruneError(
            f"the rates begin with {rates[0] if rates else 'nothing'}; layer 0 is whole, so begin "
            "with 1."
        )
    return tuple(float(rate) for rate in rates)


def check_depth(rates: Sequence[float], depth: int) -> None:
    """Refuse rates for a language model of another depth.

    Raises:
        VlmpruneError: there is not one rate a layer.
    """
    if len(rates) != depth:
        raise VlmpruneError(
            f"the schedule is for {len(rates)} decoder layers and this model has {depth}; run "
            "`vlmprune search` on it."
        )


def document(
    rates: Sequence[float],
    architecture: str,
    found_on: str | Mapping[str, Any] = "",
    method: str = "gsearch",
) -> dict[str, Any]:
    """A schedule as JSON can hold it.

    Args:
        rates: of layer 0 on.
        architecture: what it is for, as `families.architecture` says it.
        found_on: task, questions, loss and the like, for people.
        method: by which it was found ("gsearch" or "psigmoid"), for people.

    Raises:
        VlmpruneError: as `check_rates`.
    """
    return {
        "format": FORMAT,
        "method": method,
        "rates": list(check_rates(rates)),
        "architecture": architecture,
        "found_on": found_on if isinstance(found_on, str) else dict(found_on),
    }


def read(path: str | Path) -> tuple[tuple[float, ...], str]:
    """The rates of a file and the architecture that they are for.

    Raises:
        VlmpruneError: the file cannot be read, or holds no schedule.
    """
    try:
        content = parsed(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT or not isinstance(content["rates"], list):
            raise ValueError
        rates, architecture = content["rates"], str(content["architecture"])
    except OSError as error:
        raise VlmpruneError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise VlmpruneError(
            f"{str(path)!r} is no schedule; make one with `vlmprune search`."
        ) from error
    return check_rates(rates), architecture


@lru_cache(maxsize=1024)
def sigmoid_rates(depth: int, mean: float, k: float) -> tuple[float, ...]:
    """Rates that fall along a sigmoid: r(i) = 1 / (1 + exp(k (i - α))).

    α is solved by bisection so that the mean over layers 1 to depth - 1 is as asked. Layer 0 is
    whole and does not count.

    Args:
        depth: number of decoder layers, 2 or more.
        mean: above 0 to 1.
        k: steepness, above 0.

    Returns:
        One rate a layer, never rising.
    """
    layers = range(1, depth)
    if mean >= 1:
        return (1.0,) * depth

    def at(alpha: float) -> list[float]:
        # Far from α nothing overflows, and no rate is quite 0.
        return [1 / (1 + math.exp(max(-700.0, min(700.0, k * (i - alpha))))) for i in layers]

    # At either end every rate is as good as 0 or 1.
    low, high = 1 - 700 / k, depth + 700 / k
    for _ in range(200):
        middle = (low + high) / 2
        if sum(at(middle)) < mean * len(layers):
            low = middle
        else:
            high = middle
    return (1.0, *at(high))
