"""What a harness was given as `name=value,…`: which model, which pruner, how to run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune import spec
from vlmprune.errors import VlmpruneError, meant
from vlmprune.pruner import Pruner

NAMES = ("pretrained", "method", "device", "dtype", "batch_size", "max_new_tokens")
"""Arguments that are no settings of a method."""
EMBEDDED = "embedded"
"""What stands for the embedded model; an empty text does too."""
MAX_NEW_TOKENS = 128
"""Limit of an answer where neither the task nor the arguments say one."""

# Commas inside quotes do not part arguments.
_ARGUMENT = re.compile(r"""(?:"[^"]*"|'[^']*'|[^,])+""")


@dataclass(frozen=True)
class Arguments:
    """Arguments, read and checked.

    Attributes:
        pretrained: a model folder or an id of the Hub; None for the embedded model.
        pruner: the method; None for the model as it is.
        device, dtype: as on the command line; None for their defaults.
        batch_size: requests answered at once.
        max_new_tokens: limit of an answer where the task says none.
    """

    pretrained: str | None = None
    pruner: Pruner | None = None
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 1
    max_new_tokens: int = MAX_NEW_TOKENS


def split(text: str) -> dict[str, str]:
    """Arguments as written, by name; a value in quotes may hold commas.

    Raises:
        VlmpruneError: one is not of the form name=value, or is given twice.
    """
    found: dict[str, str] = {}
    for part in _ARGUMENT.findall(text):
        name, equals, value = (one.strip() for one in part.partition("="))
        if not name and not equals:
            continue
        if not name or not equals:
            raise VlmpruneError(
                f"argument {part.strip()!r} is not of the form name=value, as in "
                "method=vispruner,keep=64."
            )
        if name in found:
            raise VlmpruneError(f"argument {name!r} is given twice; give it once.")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        found[name] = value[1:-1] if quoted else value
    return found


def read(given: Mapping[str, Any]) -> Arguments:
    """Read and check arguments.

    Those that are none of `NAMES` are settings of the method: each goes to every method of the
    spec that has it and does not set it itself.

    Args:
        given: values by name, as text or as a harness made of it; None counts as not given.

    Raises:
        VlmpruneError: an argument is unknown, or its value is refused.
    """
    known = {name: value for name, value in given.items() if value is not None}
    settings = {name: known.pop(name) for name in list(known) if name not in NAMES}
    pretrained = str(known.get("pretrained", "")).strip()
    return Arguments(
        pretrained=None if pretrained in ("", EMBEDDED) else pretrained,
        pruner=_pruner(str(known.get("method", "")).strip(), settings),
        device=_text(known, "device"),
        dtype=_text(known, "dtype"),
        batch_size=_count(known, "batch_size", 1),
        max_new_tokens=_count(known, "max_new_tokens", MAX_NEW_TOKENS),
    )


def _pruner(method: str, settings: Mapping[str, Any]) -> Pruner | None:
    if not method or method.lower() == "none":
        for name in settings:
            raise VlmpruneError(
                f"argument {name!r}{meant(name, NAMES)} is none of {', '.join(NAMES)}, and without "
                "method= there is nothing else that it could set; leave it out."
            )
        return None
    stages = spec.read(method)
    for name, value in settings.items():
        taken = spec.fill(stages, name, spec.value_of(value) if isinstance(value, str) else value)
        if taken is None:
            has = "; ".join(f"{stage.name} has {', '.join(stage.names)}" for stage in stages)
            near = meant(name, [*NAMES, *(one for stage in stages for one in stage.names)])
            raise VlmpruneError(
                f"argument {name!r}{near} is none of {', '.join(NAMES)}, and no setting of the "
                f"method ({has})."
            )
        if not taken:
            raise VlmpruneError(
                f"{name} is given twice, in method={method} and beside it; give it once."
            )
    return spec.build(stages)


def _text(known: Mapping[str, Any], name: str) -> str | None:
    return str(known[name]).strip() or None if name in known else None


def _count(known: Mapping[str, Any], name: str, default: int) -> int:
    value = known.get(name, default)
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1 or isinstance(value, float):
        raise VlmpruneError(f"{name}={value} is no whole number of at least 1; give one.")
    return count
