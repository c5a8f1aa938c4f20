"""The methods, one a file."""

from vlmprune.methods.plphp import PLPHP
from vlmprune.methods.vispruner import VisPruner

# By the name that the command line takes.
METHODS = {"vispruner": VisPruner, "plphp": PLPHP}

__all__ = ["METHODS", "PLPHP", "VisPruner"]
