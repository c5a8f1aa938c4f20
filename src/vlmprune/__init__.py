"""Keep the visual tokens that matter, on the vision-language model that you already have."""

from vlmprune import select
from vlmprune.errors import VlmpruneError
from vlmprune.methods import METHODS, VisPruner
from vlmprune.pruner import Handle, Pruner
from vlmprune.report import Report

__version__ = "0.1.0"

__all__ = ["METHODS", "Handle", "Pruner", "Report", "VisPruner", "VlmpruneError", "select"]
