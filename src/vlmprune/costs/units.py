"""Figures as text: FLOPs, bytes, shares, what is saved of them; and numbers that options give."""

from __future__ import annotations

TERA = 1e12
MIB = 2**20
"""Bytes in a MiB, which the published tables call MB."""
_SCALES = (("T", TERA), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def digits(value: float) -> str:
    """A number with three digits, or with all that stand before its point."""
    # What would be rounded up to 100 has three digits before its point.
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def number(text: str) -> int | float | None:
    """What a text says, whole or not; None where it is no number."""
    for kind in (int, float):
        try:
            return kind(text)
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
    return f"{100 * share:{form}} %"


def change(before: float, after: float) -> str:
    """What is saved (or added), in per cent; nothing where it rounds to nothing."""
    share = round(100 * (after / before - 1)) if before else 0
    return f"{share:+d} %" if share else ""
