"""One short record a model family: the accessors and policies in which families differ.

A file a family, of at most 150 lines, and with it those that differ from it by a line; what several
share stands in files without records (`media`, `towers`, `features`, `frames`, `tiles`, `squares`,
`placed`, `placed_frames`, `qwen`), what is found out of classes without a record in `generic` and
`counted`. May import the rest of `hosts`, `views` and `errors`; Transformers not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, contract, parallel, parts, sizes
from vlmprune.hosts.families import (
    aya_vision,
    gemma3,
    gemma3n,
    gemma4,
    gemma4_unified,
    glm4v,
    idefics3,
    internvl,
    llama4,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    mistral3,
    paligemma,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    video_llava,
)
from vlmprune.hosts.families.counted import counted
from vlmprune.hosts.families.media import Medium
from vlmprune.hosts.families.proved import Proved, table
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import TOWERS, Crops
from vlmprune.hosts.requests import base_of
from vlmprune.views.settings import Positions

__all__ = [
    "FAMILIES",
    "FILES",
    "PROVED",
    "TOWERS",
    "Crops",
    "Family",
    "Medium",
    "check_host",
    "counted",
    "record_of",
    "register",
]


# In the order in which they are listed to users.
FILES = (
    llava,
    llava_next,
    llava_onevision,
    llava_next_video,
    video_llava,
    pixtral,
    mistral3,
    gemma3,
    gemma3n,
    gemma4,
    gemma4_unified,
    paligemma,
    internvl,
    idefics3,
    aya_vision,
    llama4,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    qwen3_5,
    glm4v,
)

_records: dict[str, Family] = {
    kind: family for file in FILES for kind, family in file.FAMILIES.items()
}
# What the tests prove of each model with a record of the package's own.
PROVED: Mapping[str, Proved] = MappingProxyType(table(_records))
# By the type of model, or "type:tower" where a family has a record of its own for one of its
# towers. Those that are registered come in.
FAMILIES: Mapping[str, Family] = MappingProxyType(_records)


def register(kind: str, family: Family, *, replace: bool = False) -> None:
    """Let models of a class be followed by a record from outside of the package.

    Args:
        kind: the `model_type` of their config, or "model_type:tower" for those with one tower.
        family: the record.
        replace: whether it may take the place of a record that is there.

    Raises:
        VlmpruneError: `kind` is no such name, `family` no record, or a record is there already.
    """
    if not isinstance(kind, str) or not all(kind.split(":")) or kind.count(":") > 1:
        raise VlmpruneError(
            f"kind={kind!r} must be the model_type of a config, or 'model_type:tower'."
        )
    if not isinstance(family, Family):
        raise VlmpruneError(
            f"family={family!r} must be a vlmprune.hosts.families.Family; docs/add-a-family.md "
            "says how to write one."
        )
    if kind in _records and not replace:
        raise VlmpruneError(
            f"there is a record of {kind!r} already ({_records[kind].name}); give another kind, or "
            "replace=True to put yours in its place."
        )
    _records[kind] = family


def record_of(model: Any) -> Family | None:
    """The record of a model's family; None where there is none for its class.

    A subclass has the record of its nearest base that has one, and so has a class that FSDP put in
    front of the model's own.

    Raises:
        VlmpruneError: the model lacks something of its record, or cannot be followed.
    """
    family = _nearest(model)
    if family is None:
        return None
    check_host(model, family)
    for medium in family.media:
        medium.check(model)
    return family


def _nearest(model: Any) -> Family | None:
    """The record of a model's class, else of the nearest of its bases that has one."""
    said = config.of_model(model)
    own, tower = config.model_type(said), config.tower_type(said)
    for cls in type(model).__mro__:
        kinds = [kind for kind, family in FAMILIES.items() if family.cls == cls.__name__]
        # A config of somebody's own may have a type of its own.
        for kind in (own, *(one for one in kinds if ":" not in one)):
            for key in (f"{kind}:{tower}", kind):
                if key in kinds:
                    return FAMILIES[key]
    return None


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
