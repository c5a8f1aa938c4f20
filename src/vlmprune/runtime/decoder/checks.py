"""Whether a model's decoder can be followed where a method drops rows between its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, decoder, families
from vlmprune.hosts.attention import attention_of
from vlmprune.hosts.families import Family
from vlmprune.method import Method
from vlmprune.views import Ask


def resolve_positions(model: Any, family: Family, method: Method) -> Literal["compact", "original"]:
    """The position policy of layers that lack tokens: what was asked for, else the release's."""
    # Tokens that skip a layer come back for the next, in their places.
    if method.routes or family.rope is not None:
        return "original"
    if method.positions != "auto":
        return method.positions
    return families.advised_positions(model) or method.dropper.released


def asked(model: Any, family: Family, method: Method) -> Mapping[int, Ask]:
    """What a method wants to see, by layer, once it is sure that the model can be followed.

    Raises:
        VlmpruneError: it cannot; one sentence says why.
    """
    layers = decoder.decoder_layers(model)
    asks = method.dropper.asks(len(layers))
    name = type(model).__name__
    for index in asks:
        if not 0 < index < len(layers):
            raise VlmpruneError(
                f"{method!r} would drop tokens before decoder layer {index}, and {name} has "
                f"layers 1 to {len(layers) - 1} to drop before."
            )
    if not asks:
        return asks
    kinds = config.layer_kinds(model.config)[min(asks) :]
    odd = next((kind for kind in kinds if kind not in decoder.ATTENDING), None)
    if odd is not None:
        raise VlmpruneError(
            f"{name} has layers of {odd.replace('_', ' ')}, behind which {method!r} cannot drop "
            "tokens; prune before the language model."
        )
    try:
        for index, ask in asks.items():
            if ask.attention == "own":
                attention_of(layers[index])
            if ask.attention == "previous" or ask.keys:
                attention_of(layers[index - 1])
    except LookupError as error:
        raise VlmpruneError(f"{error}; prune before the language model.") from error
    if not decoder.takes_angles(layers[min(asks)]):
        raise VlmpruneError(
            f"the decoder layers of {name} do not take rotary angles from outside, so {method!r} "
            "cannot give them those of the tokens that go on; prune before the language model."
        )
    compact = resolve_positions(model, family, method) == "compact"
    if compact and not decoder.rotary_modules(model):
        raise VlmpruneError(
            f"{name} has no module that makes rotary angles, so tokens cannot be renumbered "
            "inside it; use positions='original'."
        )
    return asks
