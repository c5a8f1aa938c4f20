"""The methods, one a file."""

from vlmprune.methods.vispruner import VisPruner

# By the name that the command line takes.
METHODS = {"vispruner": VisPruner}

__all__ = ["METHODS", "VisPruner"]
