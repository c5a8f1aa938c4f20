"""The exception for mistakes that the user can mend."""

from __future__ import annotations


class VlmpruneError(ValueError):
    """A mistake in what was asked for, told in one sentence that names the way out.

    The command line prints the sentence alone, without a traceback, and exits with code 2.
    """


def reason(error: Exception) -> str:
    """The first sentence of an error, for use in brackets."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")
