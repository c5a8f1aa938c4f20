"""`vlmprune.select.row_rules` under its former name, as docs/stability.md promises."""

from vlmprune.select.row_rules import (
    CLUSTER,
    most_attended,
    recycle,
    share,
    text_raters,
    unlike_pivots,
)

__all__ = [
    "CLUSTER",
    "most_attended",
    "recycle",
    "share",
    "text_raters",
    "unlike_pivots",
]
