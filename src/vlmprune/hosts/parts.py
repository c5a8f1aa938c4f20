"""The parts of a host that a family's record relies on, and whether this release has them.

A record names them beforehand (`Medium.parts`), so that a field, a module, a function or an
argument that a release renamed is told at attach in one sentence. No tensor is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, release


@dataclass(frozen=True)
class Parts:
    """What of a host is relied on; `|` joins two.

    Attributes:
        fields: of the config, parts of it before a dot; each must say something.
        attributes: modules and numbers, by their path from the model.
        functions: by their path from the model, or as "module:name"; for each the names of the
            arguments that it is given.
    """

    fields: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    functions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __or__(self, other: Parts) -> Parts:
        return Parts(
            tuple(dict.fromkeys((*self.fields, *other.fields))),
            tuple(dict.fromkeys((*self.attributes, *other.attributes))),
            {**self.functions, **other.functions},
        )


def check(model: Any, parts: Parts) -> None:
    """Refuse a host that lacks one of the parts.

    Args:
        model: the host.
        parts: what is relied on.

    Raises:
        VlmpruneError: the first that is missing.
    """
    config.check_fields(model.config, parts.fields)
    for path in parts.attributes:
        attribute(model, path)
    for path, names in parts.functions.items():
        called = function(path) if ":" in path else attribute(model, path)
        takes = _arguments(getattr(called, "__func__", called))
        missing = [name for name in names if name not in takes]
        if missing:
            raise VlmpruneError(
                f"{path} of {type(model).__name__} takes no {' and no '.join(missing)} in "
                f"transformers {release.version()}, so its images cannot be followed; install "
                f"transformers{release.TESTED}."
            )


def attribute(model: Any, path: str) -> Any:
    """What stands at a path of names from a model.

    Raises:
        VlmpruneError: one of them is not there.
    """
    place = model
    for name in path.split("."):
        # Not `hasattr`: a module's attribute may be there and be None.
        try:
            place = getattr(place, name)
        except AttributeError as error:
            raise VlmpruneError(
                f"{type(model).__name__} has no {path} in transformers {release.version()} "
                f"({name} is missing), so its images cannot be followed; install "
                f"transformers{release.TESTED}."
            ) from error
    return place


@cache
def function(place: str) -> Callable[..., Any]:
    """A function of Transformers that stands in a module.

    Args:
        place: "module:name", the module below `transformers`.

    Raises:
        VlmpruneError: it is not there.
    """
    module, name = place.split(":")
    try:
        found: Callable[..., Any] = getattr(import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise VlmpruneError(
            f"transformers {release.version()} has no {name} in {module}, so images of models "
            f"that need it cannot be followed; install transformers{release.TESTED}."
        ) from error
    return found


@cache
def _arguments(called: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(called).parameters)
