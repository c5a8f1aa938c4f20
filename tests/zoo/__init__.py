"""Tiny random models of every supported family's real class, and requests as processors make them.

No tokenizer, no image library and no download is needed. `ZOO` is the table that tests are
generated from: `EVERY` without what a fault of the installed release keeps from being pruned, which
`tests/hosts/test_release.py` holds to be refused. Classes of later releases than the installed one
are in neither. `WINDOWED` has the families that look back no
further than a window, with a window shorter than the requests.
"""

from __future__ import annotations

import transformers
from packaging.specifiers import SpecifierSet

from vlmprune.hosts.families import FAMILIES
from zoo import llava, qwen, tiles
from zoo.base import Entry, Modality, Request

__all__ = ["EVERY", "WINDOWED", "ZOO", "Entry", "Modality", "Request"]

_LISTED = {**llava.FAMILIES, **qwen.FAMILIES, **tiles.FAMILIES}


def _is_there(name: str) -> bool:
    """Whether the installed release has the class; those of no record have been there long."""
    return name not in FAMILIES or hasattr(transformers, FAMILIES[name].cls)


EVERY: dict[str, Entry] = {name: entry for name, entry in _LISTED.items() if _is_there(name)}


def _served(entry: Entry) -> bool:
    """Whether the class has no such fault, or the model is of one that mends it."""
    cls = type(entry.make())
    records = (one for one in FAMILIES.values() if one.cls == cls.__name__)
    faulty = any(
        transformers.__version__ in SpecifierSet(at) for one in records for at in one.fails
    )
    return not faulty or cls is not getattr(transformers, cls.__name__)


ZOO: dict[str, Entry] = {name: entry for name, entry in EVERY.items() if _served(entry)}
_SHORT = {**tiles.WINDOWED, **qwen.WINDOWED}
WINDOWED: dict[str, Entry] = {name: entry for name, entry in _SHORT.items() if name in ZOO}
