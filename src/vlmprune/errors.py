"""The exception for mistakes that the user can mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VlmpruneError(ValueError):
    """A mistake in what was asked for, told in one sentence that names the way out.

    The command line prints the sentence alone, without a traceback, and exits with code 2.
    """


def meant(written: object, names: Iterable[str]) -> str:
    """In brackets the name that was probably meant, a blank before it; "" where none is near.

    Args:
        written: what is none of the names, as it was given.
        names: all that there are.
    """
    lower = {name.lower(): name for name in names}
    near = get_close_matches(str(written).lower(), lower, n=1)
    found = lower[near[0]] if near else written
    return "" if found == written else f" (did you mean {found!r}?)"


def reason(error: Exception) -> str:
    """The first sentence of an error, for use in brackets."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")
