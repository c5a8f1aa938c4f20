"""Means with their intervals, and the points that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
"""Resamples of a bootstrap."""
LEVEL = 0.95
GROUPS = 10
"""Groups of pictures below which no interval is told."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        value: the mean.
        low: lower end, the 2.5th percentile over resamples of the groups; None where there are too
            few questions to tell.
        high: upper end, the 97.5th percentile.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends; None where there are none."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Mean(Interval):
    """The same, and of how many samples.

    Attributes:
        count: samples.
    """

    count: int = 0


def mean_of(scores: Sequence[float], groups: Sequence[str]) -> Mean | None:
    """The mean of some scores; None of none.

    Bootstrap over groups: each resample draws as many groups as there are, with replacement.

    Args:
        scores: one a sample.
        groups: the group of each.
    """
    if not scores:
        return None
    numbers = {name: at for at, name in enumerate(dict.fromkeys(groups))}
    which = [numbers[one] for one in groups]
    sums = np.bincount(which, weights=list(scores))
    counts = np.bincount(which)
    # The same seed and number of groups give the same draws for every method.
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(float(sums.sum() / counts.sum()), float(low), float(high), len(scores))


def interval_of(mean: Mean, groups: Sequence[str]) -> Interval:
    """A mean as it is told: without the ends where there are too few groups.

    Args:
        mean: from `mean_of`.
        groups: the group of each sample.
    """
    if len(set(groups)) < GROUPS:
        return Interval(mean.value)
    return Interval(mean.value, mean.low, mean.high)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats.

    A point beats another if it costs no more, scores no less, and is better in one of the two; so
    of equal points all stay.

    Args:
        points: (cost, score) of each.

    Returns:
        Their numbers, by rising cost and then by number.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    found: list[int] = []
    for i in order:
        if not found or points[i][1] > points[found[-1]][1] or points[i] == points[found[-1]]:
            found.append(i)
    return found
