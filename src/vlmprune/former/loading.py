"""`vlmprune.io.models` under the name that docs/stability.md promises; nothing else is here."""

from vlmprune.io.models import Loaded, attached, enough_memory, load, prepare, prepare_batch

__all__ = ["Loaded", "attached", "enough_memory", "load", "prepare", "prepare_batch"]
