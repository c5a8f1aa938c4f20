"""Keep the visual tokens that matter, on the vision-language model that you already have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from vlmprune.methods import METHODS, PLPHP, VisPruner
    from vlmprune.pruner import Handle, Pruner
    from vlmprune.report import Report
    from vlmprune.reuse import Vision

__version__ = "0.1.0"

__all__ = ["METHODS", "PLPHP", "Handle", "Pruner", "Report", "VisPruner", "Vision", "VlmpruneError"]

# Imported when first asked for, so that the command line's help needs no torch.
_HOMES = {
    "METHODS": "methods",
    "PLPHP": "methods",
    "VisPruner": "methods",
    "Handle": "pruner",
    "Pruner": "pruner",
    "Report": "report",
    "Vision": "reuse",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")
    value = getattr(import_module(f"vlmprune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
