"""`vlmprune.select.budget` under its former name, as docs/stability.md promises."""

from vlmprune.select.budget import (
    BUDGETS,
    Budget,
    check_budget,
    check_keep,
    each_crop,
    resolve_keep,
)

__all__ = [
    "BUDGETS",
    "Budget",
    "check_budget",
    "check_keep",
    "each_crop",
    "resolve_keep",
]
