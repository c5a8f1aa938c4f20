"""How many visual tokens a `keep` setting means. Imports no tensor library."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Literal

from vlmprune.errors import VlmpruneError, meant

# What a budget counts for: each crop, or all crops of an image together. Of a video the frames are
# the crops; "frame" and "clip" say the same of it, and are refused where there is none.
Budget = Literal["crop", "image", "frame", "clip"]
BUDGETS: tuple[Budget, ...] = ("crop", "image", "frame", "clip")
# Newline tokens, which some hosts put between the rows of patches: kept whatever is chosen, as the
# host has them, or dropped like all that is not chosen, as the methods' releases do.
Newlines = Literal["keep", "drop"]


def each_crop(budget: Budget) -> bool:
    """Whether a budget counts for each crop (frame), not for a whole image (clip)."""
    return budget in ("crop", "frame")


def check_budget(budget: str, videos: bool = True) -> None:
    """Refuse a budget that is not known, or that counts videos where there are none.

    Args:
        budget: the setting.
        videos: whether there is a video.

    Raises:
        VlmpruneError: it is one of the two.
    """
    if budget not in BUDGETS:
        raise VlmpruneError(
            f"budget={budget!r} is not known{meant(budget, BUDGETS)}; use 'crop' or 'image', or "
            "for videos 'frame' or 'clip'."
        )
    if budget in ("frame", "clip") and not videos:
        instead = "crop" if budget == "frame" else "image"
        raise VlmpruneError(
            f"budget={budget!r} is for videos, and this request holds none; use budget={instead!r}."
        )


def check_keep(keep: int | float, name: str = "keep", does: str = "leaves") -> None:
    """Refuse a `keep` that no number of visual tokens could make right.

    Args:
        keep: the setting.
        name: of the setting.
        does: what it does to visual tokens.

    Raises:
        VlmpruneError: as `resolve_keep`, all but the comparison with what there is.
    """
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise VlmpruneError(
            f"{name}={keep!r} is not a number; use an int of at least 1 for visual tokens, or a "
            "float in (0, 1] for a fraction of them."
        )
    if isinstance(keep, Integral):
        if keep < 1:
            raise VlmpruneError(f"{name}={keep} {does} no visual tokens; use an int of at least 1.")
    # Written this way round so that NaN is refused too.
    elif not 0.0 < float(keep) <= 1.0:
        raise VlmpruneError(
            f"{name}={float(keep)} is a fraction outside (0, 1]; use a float in (0, 1], or an int "
            "of at least 1 for a number of visual tokens."
        )


def plain_keep(keep: int | float) -> int | float:
    """A `keep` as Python's own int or float, of which the int is all that counts tokens.

    Raises:
        VlmpruneError: as `check_keep`.
    """
    check_keep(keep)
    return int(keep) if isinstance(keep, Integral) else float(keep)


def exceeds(keep: int | float | None, available: int) -> bool:
    """Whether a `keep` counts more tokens than there are, all of which then stay."""
    return isinstance(keep, Integral) and keep > available


def resolve_keep(keep: int | float, available: int, what: str = "crop") -> int:
    """Turn a budget into a number of visual tokens.

    Args:
        keep: an int is a number of tokens; a float is a fraction in (0, 1]. So `1` keeps one
            token and `1.0` keeps all.
        available: number of visual tokens that there are, at least 1.
        what: the thing that holds them ("crop" or "image"), for the error sentences.

    Returns:
        `keep` itself, or `max(1, round(keep * available))` for a fraction.

    Raises:
        VlmpruneError: `keep` is no number, a bool, below 1 or above `available` as an int, or
            outside (0, 1] as a float; or there is nothing to keep.
    """
    if available < 1:
        raise VlmpruneError(
            f"this {what} has {available} visual tokens, so none can be kept; give it an image."
        )
    check_keep(keep)
    if not isinstance(keep, Integral):
        return max(1, round(float(keep) * available))
    if keep > available:
        raise VlmpruneError(
            f"keep={keep} is more than the {available} visual tokens of the {what}; "
            f"use an int from 1 to {available}, or keep=1.0 to keep all."
        )
    return int(keep)


def kept_of(keep: int | float, available: int) -> int:
    """How many of so many tokens are kept; a crop with fewer than `keep` keeps all it has.

    Args:
        keep: as `resolve_keep` takes it.
        available: number of visual tokens that there are, at least 1.

    Raises:
        VlmpruneError: as `resolve_keep`, but for a `keep` above what there is.
    """
    if exceeds(keep, available):
        return available
    return resolve_keep(keep, available)
