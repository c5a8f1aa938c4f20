"""What settings of methods may be, and the sentences that refuse others. Imports no tensor library.

Numbers are Python's own or another library's (NumPy's integers and floats), and never bool, of
either; `plain` makes Python's own of them, as every pruner does with its settings. A budget has its
checks in `select.budget`.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, get_args

from vlmprune.errors import VlmpruneError, meant


def plain(value: Any) -> Any:
    """A setting with Python's own number for another library's, in tuples too; else as it is."""
    if isinstance(value, tuple):
        made = tuple(map(plain, value))
        return made if any(a is not b for a, b in zip(made, value, strict=True)) else value
    if not is_number(value) or type(value) in (int, float):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number: NaN and infinity are, True is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any, least: int | None = None) -> bool:
    """Whether a value is a whole number, and no less than `least` where that is given."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return least is None or int(value) >= least


def is_share(value: Any, zero: bool = True) -> bool:
    """Whether a value is a number from 0 to 1.

    Args:
        value: the setting.
        zero: whether 0 is one.
    """
    # NaN is not, for it compares to nothing.
    return is_number(value) and 0 <= value <= 1 and (zero or value > 0)


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of `least` or more.

    Raises:
        VlmpruneError: it is none.
    """
    if not is_whole(value, least):
        raise VlmpruneError(f"{name}={value!r} is not a whole number of {least} or more.")


def check_count(name: str, value: Any) -> None:
    """Refuse what is no number of things, of which there is at least one.

    Raises:
        VlmpruneError: it is none.
    """
    if not is_whole(value, 1):
        raise VlmpruneError(f"{name}={value!r} is not a whole number of at least 1.")


def check_share(name: str, value: Any, advice: str, zero: bool = True) -> None:
    """Refuse what is no share of a whole.

    Args:
        name: of the setting.
        value: its value.
        advice: what to use, in words.
        zero: whether 0 is a share.

    Raises:
        VlmpruneError: it is none.
    """
    if not is_share(value, zero):
        raise VlmpruneError(
            f"{name}={value!r} is outside {'[' if zero else '('}0, 1]; use {advice}."
        )


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse what is none of a few values.

    Args:
        name: of the setting.
        value: its value.
        choices: the `Literal` of two or more that its annotation names.

    Raises:
        VlmpruneError: it is none of them.
    """
    known = get_args(choices)
    if value not in known:
        *others, last = map(repr, known)
        near = meant(value, map(str, known))
        raise VlmpruneError(
            f"{name}={value!r} is not known{near}; use {', '.join(others)} or {last}."
        )
