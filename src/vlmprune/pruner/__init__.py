"""What users hold: `Pruner`, the base of every method, `Chain`, and an attachment's `Handle`.

Here belongs what attaches a method to a model. May import `runtime` and what stands below it;
methods import it.
"""

from vlmprune.pruner.base import Chain, Pruner
from vlmprune.pruner.handle import Handle

__all__ = ["Chain", "Handle", "Pruner"]
