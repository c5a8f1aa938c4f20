"""Methods that need training: attached like any other, saved and loaded as a folder."""

from vlmprune.methods.bases.learned import Learned
from vlmprune.methods.bases.lora import Lora
from vlmprune.methods.mod import MoD
from vlmprune.methods.quecc import QueCC
from vlmprune.methods.vistog import VisToG

__all__ = ["Learned", "Lora", "MoD", "QueCC", "VisToG"]
