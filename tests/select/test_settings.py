"""What settings of methods are refused, and in which words."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from vlmprune.errors import VlmpruneError
from vlmprune.select.settings import (
    check_choice,
    check_count,
    check_share,
    check_whole,
    is_number,
    is_share,
    is_whole,
)

NAN, INFINITY = float("nan"), float("inf")


def said(check: Any, *args: Any, **options: Any) -> str:
    """The sentence of a check, empty where it passes."""
    try:
        check(*args, **options)
    except VlmpruneError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("value", "number", "whole", "share"),
    [
        (0, True, True, True),
        (1, True, True, True),
        (2, True, True, False),
        (-1, True, False, False),
        (0.5, True, False, True),
        (1.0, True, False, True),
        (NAN, True, False, False),
        (INFINITY, True, False, False),
        (True, False, False, False),
        (False, False, False, False),
        ("1", False, False, False),
        (None, False, False, False),
        (1j, False, False, False),
    ],
)
def test_kinds_of_numbers(value: Any, number: bool, whole: bool, share: bool) -> None:
    assert (is_number(value), is_whole(value, 0), is_share(value)) == (number, whole, share)


def test_bounds_are_within() -> None:
    assert is_whole(-5) and is_whole(3, 3) and not is_whole(2, 3)
    assert is_share(0) and not is_share(0, zero=False)
    assert is_share(1e-9, zero=False) and is_share(1, zero=False)
    assert not is_share(1 + 1e-9) and not is_share(-1e-9)


def test_sentences() -> None:
    assert said(check_whole, "seed", 0, 0) == ""
    assert said(check_whole, "seed", -1, 0) == "seed=-1 is not a whole number of 0 or more."
    assert said(check_whole, "seed", "a", 2) == "seed='a' is not a whole number of 2 or more."
    assert said(check_count, "heads", 1) == ""
    assert said(check_count, "heads", 0) == "heads=0 is not a whole number of at least 1."
    assert said(check_share, "part", 0, "0.5") == ""
    assert said(check_share, "part", 1.5, "0.5") == "part=1.5 is outside [0, 1]; use 0.5."
    assert said(check_share, "part", 0, "0.5, as we", zero=False) == (
        "part=0 is outside (0, 1]; use 0.5, as we."
    )


def test_choices() -> None:
    two, three = Literal["a", "b"], Literal["a", "b", "c"]
    assert said(check_choice, "kind", "c", three) == ""
    assert said(check_choice, "kind", "c", two) == "kind='c' is not known; use 'a' or 'b'."
    assert said(check_choice, "kind", None, three) == (
        "kind=None is not known; use 'a', 'b' or 'c'."
    )
    # What cannot be hashed is refused like any other.
    assert said(check_choice, "kind", ["a"], two).startswith("kind=['a'] is not known")
