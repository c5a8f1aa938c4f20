"""Keep the visual tokens that matter, on the vision-language model that you already have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
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
    from vlmprune.pruner import Handle, Pruner
    from vlmprune.report import Report
    from vlmprune.runtime.encoder.visions import Vision

__version__ = "0.2.0"

# Modules that moved are still found under their former names.
__path__.append(f"{__path__[0]}/former")

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
    "Handle": "pruner",
    "Pruner": "pruner",
    "Report": "report",
    "Vision": "runtime.encoder.visions",
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
