"""The methods, one a file, which is named as the command line calls the method.

Here belong a rule's settings and its choice, no machinery. May import `methods.bases`, `embedded`,
`pruner` and what stands below. A new method is a file here and a line below.
"""

# ruff: noqa: I001, the order is that in which they are shown.

from vlmprune.methods.vispruner import VisPruner as VisPruner
from vlmprune.methods.plphp import PLPHP as PLPHP
from vlmprune.methods.recall import Recall as Recall

# Before the language model.
from vlmprune.methods.fastervlm import FasterVLM as FasterVLM
from vlmprune.methods.vtc_cls import VtcCls as VtcCls
from vlmprune.methods.fopru import FoPru as FoPru
from vlmprune.methods.visionzip import VisionZip as VisionZip
from vlmprune.methods.prumerge import PruMerge as PruMerge
from vlmprune.methods.divprune import DivPrune as DivPrune
from vlmprune.methods.cdpruner import CDPruner as CDPruner
from vlmprune.methods.evs import EVS as EVS
from vlmprune.methods.tome import ToMe as ToMe
from vlmprune.methods.evit import EViT as EViT

# The same, by training.
from vlmprune.methods.quecc import QueCC as QueCC
from vlmprune.methods.vistog import VisToG as VisToG

# Inside it.
from vlmprune.methods.fastv import FastV as FastV
from vlmprune.methods.sparsevlm import SparseVLM as SparseVLM
from vlmprune.methods.pyramiddrop import PyramidDrop as PyramidDrop
from vlmprune.methods.dart import DART as DART
from vlmprune.methods.gsearch import GSearch as GSearch
from vlmprune.methods.psigmoid import PSigmoid as PSigmoid
from vlmprune.methods.zipvl import ZipVL as ZipVL

# The same, by training.
from vlmprune.methods.mod import MoD as MoD

# Controls.
from vlmprune.methods.random import RandomTokens as RandomTokens
from vlmprune.methods.uniform import UniformGrid as UniformGrid
from vlmprune.methods.average_pooling import AveragePooling as AveragePooling
from vlmprune.methods.downsample import Downsample as Downsample
from vlmprune.pruner import Pruner as _Pruner

# By the name that the command line takes.
METHODS: dict[str, type[_Pruner]] = {
    one.__module__.rpartition(".")[2]: one
    for one in list(vars().values())
    if isinstance(one, type) and one is not _Pruner
}

__all__ = ["METHODS", *(one.__name__ for one in METHODS.values())]
