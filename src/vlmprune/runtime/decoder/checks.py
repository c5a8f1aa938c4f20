"""Whether a model's decoder can be followed where a method leaves rows out of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, decoder, families, generation, release
from vlmprune.hosts.attention import attention_of, sinks_of
from vlmprune.hosts.families import Family
from vlmprune.method import Method
from vlmprune.runtime.decoder.missing_rows import lacking
from vlmprune.views import Ask


def entering_positions(
    model: Any, family: Family, method: Method
) -> Literal["compact", "original"]:
    """The position policy of what is kept before the language model: asked for, else the release's.

    Raises:
        VlmpruneError: another one is asked for than that of the model's positions.
    """
    if not family.counted or not method.shortens:
        found = families.resolve_positions(model, family, method.positions)
        if found == "compact" or family.rope is not None or not method.shortens:
            return found
        if not generation.drops_positions(model):
            return found
        if "original" in (method.positions, families.advised_positions(model)):
            raise VlmpruneError(
                f"the generate of {type(model).__name__} in transformers {release.version()} drops "
                "the position_ids that it is given, so gaps in them cannot be kept; use "
                "positions='compact'."
            )
        return "compact"
    if decoder.turns_in_three(model):
        return _in_three(model, method)
    if method.positions == "original":
        raise VlmpruneError(
            f"{type(model).__name__} is in no record, and whether it goes on behind gaps in its "
            "positions is not known; use positions='compact' or 'auto'."
        )
    return "compact"


def _in_three(model: Any, method: Method) -> Literal["original"]:
    """The policy of a model with three positions a visual token, which no other fits."""
    if method.positions == "compact":
        raise VlmpruneError(
            f"{type(model).__name__} gives a visual token three positions, which renumbering would "
            "destroy; use positions='original' or 'auto'."
        )
    return "original"


def resolve_positions(model: Any, family: Family, method: Method) -> Literal["compact", "original"]:
    """The position policy of layers that lack tokens: what was asked for, else the release's."""
    # Tokens that skip a layer come back for the next, in their places.
    if method.routes or family.rope is not None:
        return "original"
    if family.counted and decoder.turns_in_three(model):
        return _in_three(model, method)
    if method.positions != "auto":
        return method.positions
    return families.advised_positions(model) or method.dropper.released


def missing(
    model: Any, family: Family, method: Method
) -> tuple[Mapping[int, Ask], tuple[int, ...]]:
    """What a method wants to see where tokens leave, by layer, and the layers that they may skip.

    Raises:
        VlmpruneError: the model cannot be followed there; one sentence says why.
    """
    layers = decoder.decoder_layers(model)
    depth, name = len(layers), type(model).__name__
    if method.drops and method.routes:
        raise VlmpruneError(
            f"{method!r} has both `drop` and `route`, and tokens either leave for good or skip "
            "layers; let it have one of them."
        )
    asks = method.dropper.asks(depth) if method.drops else {}
    skips = tuple(method.dropper.skips(depth)) if method.routes else ()
    does = "let tokens skip" if method.routes else "drop tokens before"
    for index in (*asks, *skips):
        if not 0 < index < depth:
            raise VlmpruneError(
                f"{method!r} would {does} decoder layer {index}, and {name} has layers 1 to "
                f"{depth - 1} for that."
            )
    # Layers that the config does not know are told while the prompt runs.
    kinds = dict(enumerate(config.layer_kinds(model.config)))
    borrow, _ = config.sharing_layers(model.config)
    for index in lacking(asks, skips, depth):
        if index in borrow:
            raise VlmpruneError(
                f"decoder layer {index} of {name} attends to an earlier layer's keys and values, "
                f"which may be of other tokens than reach it, so {method!r} cannot leave tokens "
                "out of it; prune before the language model."
            )
        kind = kinds.get(index, decoder.FULL)
        if kind not in decoder.ATTENDING:
            why = (
                "whose state every token passes through"
                if kind in config.RECURRENT
                else "which cannot be followed where tokens are missing"
            )
            raise VlmpruneError(
                f"decoder layer {index} of {name} has {kind.replace('_', ' ')}, {why}, so "
                f"{method!r} cannot leave tokens out of it; prune before the language model."
            )
        if not decoder.takes_angles(layers[index]):
            raise VlmpruneError(
                f"the decoder layers of {name} do not take rotary angles from outside, so "
                f"{method!r} cannot give them those of the tokens that reach them; prune before "
                "the language model."
            )
    if family.counted and (asks or skips) and decoder.adds_between(model) is not None:
        raise VlmpruneError(
            f"the language model of {name} adds features to visual tokens between its layers "
            f"({decoder.adds_between(model)}), and nothing says where; prune its cache instead."
        )
    try:
        for index, ask in asks.items():
            read = []
            if ask.attention == "own":
                decoder.check_attended(model, index, cut=False)
                read.append(attention_of(layers[index]))
            if ask.attention == "previous" or ask.keys:
                decoder.check_attended(model, index - 1, cut=False)
                read.append(attention_of(layers[index - 1]))
            if ask.attention and any(map(sinks_of, read)):
                raise VlmpruneError(
                    f"{name} has a language model with attention sinks, which take a share of "
                    f"attention that {method!r} does not follow; prune before the language model."
                )
    except LookupError as error:
        raise VlmpruneError(f"{error}; prune before the language model.") from error
    if any(ask.normed for ask in asks.values()):
        decoder.final_norm(model)
    compact = resolve_positions(model, family, method) == "compact"
    if asks and compact and not decoder.rotary_modules(model):
        raise VlmpruneError(
            f"{name} has no module that makes rotary angles, so tokens cannot be renumbered "
            "inside it; use positions='original'."
        )
    return asks, skips
