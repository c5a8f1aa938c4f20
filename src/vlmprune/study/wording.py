"""Figures in words, as tables and plots have them: shares, points, budgets, units."""

from __future__ import annotations

from vlmprune.study.stats import Interval

ALL_TOKENS = "all tokens"
"""The model without pruning."""


def interval(one: Interval) -> str:
    """Per cent with the ends of the interval."""
    value = f"{100 * one.value:.1f}"
    if one.low is None or one.high is None:
        return value
    return f"{value} ({100 * one.low:.0f}-{100 * one.high:.0f})"


def percent(one: Interval) -> str:
    """Per cent with its unit and, in words, the ends of the interval."""
    text = f"{100 * one.value:.1f} %"
    if one.low is None or one.high is None:
        return text
    return f"{text} ({100 * one.low:.1f} to {100 * one.high:.1f})"


def points(one: Interval) -> str:
    """Points more or less, with the ends of the interval."""
    text = f"{100 * one.value:+.1f}"
    if one.low is None or one.high is None:
        return text
    return f"{text} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"


def digits(value: float) -> str:
    """A number with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def budget(keep: int | float) -> str:
    """A budget as people say it: 64, or 25 %."""
    return str(keep) if isinstance(keep, int) else f"{100 * keep:.3g} %"


def flops_unit(most: float) -> tuple[str, float]:
    """The unit in which so many FLOPs have a few digits, and its size."""
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if most >= size:
            return unit, size
    return "M", 1e6
