"""Figures as text: FLOPs, bytes, shares, what is saved of them; and numbers that options give.

A figure that is not known (`costs.UNKNOWN`) is so in words, and null in JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TERA = 1e12
MIB = 2**20
"""Bytes in a MiB, which the published tables call MB."""
_SCALES = (("T", TERA), ("G", 1e9), ("M", 1e6), ("k", 1e3))


UNKNOWN_WORD = "unknown"


def digits(value: float) -> str:
    """A number with three digits, or with all that stand before its point."""
    if math.isnan(value):
        return UNKNOWN_WORD
    # What would be rounded up to 100 has three digits before its point.
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def number(text: str) -> int | float | None:
    """What a text says, whole or not, or as a share of 100 as "25%"; None where it is no number."""
    body = text.strip()
    for kind in (float,) if body.endswith("%") else (int, float):
        try:
            return float(body[:-1]) / 100 if body.endswith("%") else kind(body)
        except ValueError:
            continue
    return None


def flops_unit(most: float) -> tuple[str, float]:
    """The prefix with which so many FLOPs have a few digits, and its size."""
    return next(((name, size) for name, size in _SCALES if most >= size), ("", 1.0))


def flops(value: float) -> str:
    """FLOPs with three digits and a prefix, behind which the unit may follow: "1.24 T"."""
    prefix, size = flops_unit(value)
    return f"{digits(value / size)} {prefix}"


def mib(size: float) -> str:
    """Bytes in MiB with three digits; the unit is left to the heading, or to who writes it."""
    return digits(size / MIB)


def percent(share: float, form: str = ".0f") -> str:
    """A share in per cent.

    Args:
        share: 1 is all.
        form: of the number, as a format specification.
    """
    return UNKNOWN_WORD if math.isnan(share) else f"{100 * share:{form}} %"


def change(before: float, after: float) -> str:
    """What is saved (or added), in per cent; nothing where it is unknown or rounds to nothing."""
    if math.isnan(before) or math.isnan(after):
        return ""
    share = round(100 * (after / before - 1)) if before else 0
    return f"{share:+d} %" if share else ""


def ready(content: Any) -> Any:
    """Content as JSON may hold it: what is unknown is None, in mappings and lists, too."""
    if isinstance(content, float):
        return None if math.isnan(content) else content
    if isinstance(content, Mapping):
        return {key: ready(one) for key, one in content.items()}
    if isinstance(content, list | tuple):
        return [ready(one) for one in content]
    return content


def known(value: float | None) -> float:
    """A figure as `ready` left it: None is unknown again."""
    return math.nan if value is None else value
