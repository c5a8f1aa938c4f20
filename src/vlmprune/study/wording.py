"""Scores, budgets and counts in words, as tables and plots have them; `costs.units` has figures."""

from __future__ import annotations

from vlmprune.costs.units import percent
from vlmprune.study.stats import Interval

ALL_TOKENS = "all tokens"
"""The model without pruning."""


def interval(one: Interval) -> str:
    """Per cent with the ends of the interval, short."""
    return f"{100 * one.value:.1f}{_ends(one, '.0f', '-')}"


def in_percent(one: Interval) -> str:
    """Per cent with its unit and, in words, the ends of the interval."""
    return f"{percent(one.value, '.1f')}{_ends(one, '.1f', ' to ')}"


def in_points(one: Interval) -> str:
    """Points more or less, with the ends of the interval."""
    return f"{100 * one.value:+.1f}{_ends(one, '+.1f', ' to ')}"


def _ends(one: Interval, form: str, between: str) -> str:
    if one.ends is None:
        return ""
    return f" ({between.join(format(100 * end, form) for end in one.ends)})"


def budget(keep: int | float) -> str:
    """A budget as people say it: 64, or 25 %."""
    return str(keep) if isinstance(keep, int) else percent(keep, ".3g")


def counted(count: int, noun: str) -> str:
    """So many of something: "1 question", "2 questions"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
