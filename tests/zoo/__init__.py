"""Tiny random models of every supported family's real class, and requests as processors make them.

A file a record of `vlmprune.hosts.families`, under the same name, with `FAMILIES` and, where its
decoder looks back no further than a window, `WINDOWED`, in which that is shorter than the requests.
What several share stands in files without (`base`, `crops`, `tiles`, `qwen`, `mended`).

No tokenizer, no image library and no download is needed. `ZOO` is the table that tests are made
from: `EVERY` without what a fault of the installed release keeps from being pruned, which
`tests/hosts/test_release.py` holds to be refused. Classes of later releases than the installed one
are in neither.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import transformers
from packaging.specifiers import SpecifierSet

from vlmprune.hosts.families import FAMILIES
from zoo.base import Entry, Modality, Request

__all__ = ["EVERY", "FILES", "UNATTENDED", "WINDOWED", "ZOO", "Entry", "Modality", "Request"]

# By the file's name. A file of the zoo is a record's where it has a table of models.
FILES = {
    name: file
    for _, name, _ in pkgutil.iter_modules(__path__)
    if hasattr(file := import_module(f"zoo.{name}"), "FAMILIES")
}
_LISTED: dict[str, Entry] = {
    name: entry for file in FILES.values() for name, entry in file.FAMILIES.items()
}


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


_SERVED = {name: entry for name, entry in EVERY.items() if _served(entry)}
ZOO: dict[str, Entry] = {name: entry for name, entry in _SERVED.items() if entry.attends}
# Those to whose images nothing attends before the language model.
UNATTENDED: dict[str, Entry] = {n: entry for n, entry in _SERVED.items() if not entry.attends}
# The families whose decoders look back no further than a window, with one shorter than requests. A
# window counts columns. Pruning takes columns away, so it reaches further back than in a full
# request whose dropped columns are masked: there, pruning does not equal masking.
WINDOWED: dict[str, Entry] = {
    name: entry
    for file in FILES.values()
    for name, entry in getattr(file, "WINDOWED", {}).items()
    if name in ZOO
}
