"""`vlmprune.select.retention` under its former name, as docs/stability.md promises."""

from vlmprune.select.retention import FLOOR, important, per_image, shared

__all__ = [
    "FLOOR",
    "important",
    "per_image",
    "shared",
]
