"""One short record a model family: the accessors and policies in which families differ.

A file a kind. May import the rest of `hosts`, `views` and `errors`; Transformers not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, contract, parallel, parts, sizes
from vlmprune.hosts.families import llava, pixtral, pooled, qwen, tiles, video
from vlmprune.hosts.families.counted import counted
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import TOWERS
from vlmprune.hosts.requests import base_of
from vlmprune.views.settings import Positions

__all__ = [
    "FAMILIES",
    "TOWERS",
    "Family",
    "check_host",
    "counted",
    "record_of",
]


FAMILIES: Mapping[str, Family] = {
    **llava.FAMILIES,
    **video.FAMILIES,
    **pixtral.FAMILIES,
    **pooled.FAMILIES,
    **tiles.FAMILIES,
    **qwen.FAMILIES,
}


def record_of(model: Any) -> Family | None:
    """The record of a model's family; None where there is none for its class.

    Raises:
        VlmpruneError: the model lacks something of its record, or cannot be followed.
    """
    said = config.of_model(model)
    kind, tower = config.model_type(said), config.tower_type(said)
    # A family may have a record of its own for one of its towers.
    family = FAMILIES.get(f"{kind}:{tower}") or FAMILIES.get(kind)
    if family is None or parallel.class_of(model).__name__ != family.cls:
        return None
    check_host(model, family)
    for medium in family.media:
        medium.check(model)
    return family


def check_host(model: Any, family: Family) -> None:
    """Refuse a host that lacks a field, module, function or argument of its family's record.

    Args:
        model: the host.
        family: its record.

    Raises:
        VlmpruneError: one sentence names the release, the class and what is missing.
    """
    if not contract.checks():
        return
    config.check_text(model.config)
    for medium in family.media:
        parts.check(model, medium.required())
        parts.attribute(base_of(model), medium.method)


def unwrapped(model: Any) -> Any:
    """The model inside a wrapper of PEFT, `torch.compile` or DDP; any other as it is."""
    while True:
        if hasattr(type(model), "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        elif (inner := parallel.inner(model)) is not model:
            model = inner
        else:
            return model


def architecture(model: Any) -> str:
    """What a calibration holds for: the type and size of the language model, in words."""
    of = sizes.decoder(model.config)
    return (
        f"{config.model_type(model.config)} with {of.layers} layers, hidden size {of.width}, "
        f"{of.heads} query and {of.kv_heads} KV heads, vocabulary {of.vocabulary}"
    )


def resolve_positions(
    model: Any, family: Family, positions: Positions
) -> Literal["compact", "original"]:
    """What `positions="auto"` means for a model: its config's advice, else the release's way.

    A config gives advice by an extra entry `"vlmprune": {"positions": "original"}`.
    """
    if family.rope is not None:
        if positions == "compact":
            raise VlmpruneError(
                f"{family.name} gives a visual token three positions, which renumbering would "
                "destroy; use positions='original' or 'auto'."
            )
        return "original"
    if positions != "auto":
        return positions
    return advised_positions(model) or family.positions


def advised_positions(model: Any) -> Literal["compact", "original"] | None:
    """What a model's config advises, if it does."""
    advised = config.advice(model.config).get("positions")
    if advised == "compact" or advised == "original":
        return advised
    return None
