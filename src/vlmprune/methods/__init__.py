"""The methods, one a file."""

from vlmprune.methods.average_pooling import AveragePooling
from vlmprune.methods.cdpruner import CDPruner
from vlmprune.methods.dart import DART
from vlmprune.methods.divprune import DivPrune
from vlmprune.methods.downsample import Downsample
from vlmprune.methods.evs import EVS
from vlmprune.methods.fastervlm import FasterVLM
from vlmprune.methods.fastv import FastV
from vlmprune.methods.fopru import FoPru
from vlmprune.methods.gsearch import GSearch
from vlmprune.methods.mod import MoD
from vlmprune.methods.plphp import PLPHP
from vlmprune.methods.prumerge import PruMerge
from vlmprune.methods.psigmoid import PSigmoid
from vlmprune.methods.pyramiddrop import PyramidDrop
from vlmprune.methods.quecc import QueCC
from vlmprune.methods.random_tokens import RandomTokens
from vlmprune.methods.sparsevlm import SparseVLM
from vlmprune.methods.tome import ToMe
from vlmprune.methods.uniform_grid import UniformGrid
from vlmprune.methods.visionzip import VisionZip
from vlmprune.methods.vispruner import VisPruner
from vlmprune.methods.vistog import VisToG
from vlmprune.methods.vtc_cls import VtcCls
from vlmprune.methods.zipvl import ZipVL

# By the name that the command line takes.
METHODS = {
    "vispruner": VisPruner,
    "plphp": PLPHP,
    # Before the language model.
    "fastervlm": FasterVLM,
    "vtc_cls": VtcCls,
    "fopru": FoPru,
    "visionzip": VisionZip,
    "prumerge": PruMerge,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "evs": EVS,
    "tome": ToMe,
    # The same, by training.
    "quecc": QueCC,
    "vistog": VisToG,
    # Inside it.
    "fastv": FastV,
    "sparsevlm": SparseVLM,
    "pyramiddrop": PyramidDrop,
    "dart": DART,
    "gsearch": GSearch,
    "psigmoid": PSigmoid,
    "zipvl": ZipVL,
    # The same, by training.
    "mod": MoD,
    # Controls.
    "random": RandomTokens,
    "uniform": UniformGrid,
    "average_pooling": AveragePooling,
    "downsample": Downsample,
}

__all__ = [
    "DART",
    "EVS",
    "METHODS",
    "PLPHP",
    "AveragePooling",
    "CDPruner",
    "DivPrune",
    "Downsample",
    "FastV",
    "FasterVLM",
    "FoPru",
    "GSearch",
    "MoD",
    "PSigmoid",
    "PruMerge",
    "PyramidDrop",
    "QueCC",
    "RandomTokens",
    "SparseVLM",
    "ToMe",
    "UniformGrid",
    "VisPruner",
    "VisToG",
    "VisionZip",
    "VtcCls",
    "ZipVL",
]
