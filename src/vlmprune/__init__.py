"""Keep the visual tokens that matter, on the vision-language model that you already have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmprune.errors import VlmpruneError as VlmpruneError
from vlmprune.version import __version__ as __version__

if TYPE_CHECKING:
    from vlmprune.methods import *  # noqa: F403
    from vlmprune.pruner import Handle as Handle
    from vlmprune.pruner import Pruner as Pruner
    from vlmprune.report import Report as Report
    from vlmprune.runtime.encoder.visions import Vision as Vision

# Modules that moved are still found under their former names.
__path__.append(f"{__path__[0]}/former")  # noqa: F405

# Imported when first asked for, so that the command line's help needs no torch. What is not here is
# a method.
_HOMES = {
    "Handle": "pruner",
    "Pruner": "pruner",
    "Report": "report",
    "Vision": "runtime.encoder.visions",
}


# Modules of former names, which are attributes too.
_FORMER = ("budget", "calibrate", "learned", "loading", "retention", "rowrules")


def _all() -> list[str]:
    return sorted(["VlmpruneError", *_HOMES, *import_module("vlmprune.methods").__all__])


def __getattr__(name: str) -> Any:
    if name == "__all__":
        value: Any = _all()
    elif name in _FORMER:
        value = import_module(f"vlmprune.{name}")
    elif name in _HOMES:
        value = getattr(import_module(f"vlmprune.{_HOMES[name]}"), name)
    elif name[:1].isupper() and name in _all():
        value = getattr(import_module("vlmprune.methods"), name)
    else:
        raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_all()})
