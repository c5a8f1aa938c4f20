"""Methods that need training: attached like any other, saved and loaded as a folder."""

from vlmprune.learned.base import Learned
from vlmprune.learned.lora import Lora
from vlmprune.learned.mod import MoD
from vlmprune.learned.quecc import QueCC
from vlmprune.learned.vistog import VisToG

__all__ = ["Learned", "Lora", "MoD", "QueCC", "VisToG"]
