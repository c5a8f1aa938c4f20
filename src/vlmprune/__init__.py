"""Keep the visual tokens that matter, on the vision-language model that you already have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from vlmprune.handle import Handle
    from vlmprune.methods import (
        DART,
        EVS,
        METHODS,
        PLPHP,
        AveragePooling,
        CDPruner,
        DivPrune,
        Downsample,
        FasterVLM,
        FastV,
        FoPru,
        GSearch,
        MoD,
        PruMerge,
        PSigmoid,
        PyramidDrop,
        QueCC,
        RandomTokens,
        SparseVLM,
        ToMe,
        UniformGrid,
        VisionZip,
        VisPruner,
        VisToG,
        VtcCls,
        ZipVL,
    )
    from vlmprune.pruner import Pruner
    from vlmprune.report import Report
    from vlmprune.reuse import Vision

__version__ = "0.2.0"

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
    "Handle",
    "MoD",
    "PSigmoid",
    "PruMerge",
    "Pruner",
    "PyramidDrop",
    "QueCC",
    "RandomTokens",
    "Report",
    "SparseVLM",
    "ToMe",
    "UniformGrid",
    "VisPruner",
    "VisToG",
    "Vision",
    "VisionZip",
    "VlmpruneError",
    "VtcCls",
    "ZipVL",
]

# Imported when first asked for, so that the command line's help needs no torch.
_HOMES = {
    "METHODS": "methods",
    "SparseVLM": "methods",
    "PSigmoid": "methods",
    "GSearch": "methods",
    "DART": "methods",
    "Downsample": "methods",
    "ToMe": "methods",
    "PLPHP": "methods",
    "VisPruner": "methods",
    "VisToG": "methods",
    "ZipVL": "methods",
    "Handle": "handle",
    "Pruner": "pruner",
    "Report": "report",
    "Vision": "reuse",
    "AveragePooling": "methods",
    "CDPruner": "methods",
    "DivPrune": "methods",
    "EVS": "methods",
    "FasterVLM": "methods",
    "FastV": "methods",
    "FoPru": "methods",
    "MoD": "methods",
    "PruMerge": "methods",
    "PyramidDrop": "methods",
    "QueCC": "methods",
    "RandomTokens": "methods",
    "UniformGrid": "methods",
    "VisionZip": "methods",
    "VtcCls": "methods",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")
    value = getattr(import_module(f"vlmprune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
