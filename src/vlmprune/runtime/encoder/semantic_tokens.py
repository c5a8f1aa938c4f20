"""Tokens of a method's own that go through a vision tower beside the patches, in isolation.

They see all patches and one another, no patch sees them. So the patches go through the tower as
ever, which cannot change a bit of them, while the keys and values that each layer's attention is
given are recorded. Then the layers run once more on the method's tokens alone, and their attention
is given the recorded keys and values in front of the tokens' own. That equals one pass over both
with a mask, without a mask, which not every attention implementation takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune import costs
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import contract, sizes, towers
from vlmprune.hosts.attention import AttentionCall, attention_of
from vlmprune.hosts.decoder import LayerCall, layer_call, states_of
from vlmprune.hosts.families.media import Encoder, Inputs, Medium
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.release import computed_once
from vlmprune.method import Method
from vlmprune.runtime.attention.interception import Changing, Proceed, intercepting
from vlmprune.runtime.hooks import Hooks
from vlmprune.views.layout import Layout


def unfit(model: Any, medium: Medium) -> str | None:
    """Why tokens of a method's own cannot go through a medium's tower; None where they can."""
    name = type(model).__name__
    if medium.unattended:
        return f"{name} {medium.unattended}"
    if not isinstance(medium, Crops):
        return f"{name} encodes images at their own resolution"
    odd = towers.unknown_layers(medium.encoder(model, {}).layers)
    if odd:
        known = ", ".join(sorted(towers.PARTS))
        return f"{', '.join(sorted(odd))} is not among the layers it knows ({known})"
    return None


def check(
    model: Any, medium: Medium, inputs: Inputs, layouts: Sequence[Layout], width: int, who: str
) -> None:
    """Refuse, before anything is encoded, a request whose tower the tokens cannot go through.

    Args:
        model: the host.
        medium: the modality.
        inputs: the request's inputs.
        layouts: one an item; none where there is no request yet.
        width: of the tokens.
        who: the method.

    Raises:
        VlmpruneError: one sentence says why.
    """
    why = unfit(model, medium)
    if why is None:
        assert isinstance(medium, Crops)
        why = medium.joins_patches(model, inputs, layouts) or medium.joins_layers(model, inputs)
        wide = sizes.width(model.config)
        if why is None and width != wide:
            why = f"its tokens are {width} wide and the tower of {type(model).__name__} {wide}"
    if why is not None:
        raise VlmpruneError(
            f"{who} sends tokens of its own through the vision encoder, but {why}; use a method "
            "that does not, such as VisPruner."
        )


def flops(
    model: Any,
    media: Sequence[Medium],
    layouts: Sequence[Sequence[Layout]],
    method: Method,
) -> float | None:
    """FLOPs of the towers with the tokens that go through them beside the patches.

    Args:
        model: the host.
        media: the family's modalities.
        layouts: for each of them one an item.
        method: the method, or a chain; None comes back of one that sends none.
    """
    tokens = sum(stage.beside for stage in method.links)
    if not tokens:
        return None
    total = 0.0
    for medium, items in zip(media, layouts, strict=True):
        if items:
            patches, crops = items[0].patches, sum(one.crops for one in items)
            layers = medium.encoder(model, {}).feature + 1
            total += costs.encoder_flops(model.config, crops, patches=patches)
            total += costs.beside_flops(model.config, crops, patches, tokens, layers)
    return total


@dataclass
class _Call:
    """One call of a layer on patches.

    Attributes:
        layer: what it was given.
        keys: [B, H, N, D] of its attention.
        values: likewise.
    """

    layer: LayerCall
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))


class _Layer:
    """A layer whose calls on patches are recorded, with what its attention is given."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.attention = layer, attention_of(layer)
        self.calls: list[_Call] = []

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the layer begins (a hook)."""
        self.calls.append(_Call(layer_call(self.layer, args, kwargs)))

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        """Follow the call to its values."""
        result = contract.run(proceed, call, causal=False)
        if call.mask is not None:
            raise VlmpruneError(
                f"{type(self.layer).__name__} masks its patches, which vlmprune does not follow; "
                "pass what the model's own processor returns."
            )
        self.calls[-1].keys, self.calls[-1].values = call.key.detach(), call.value.detach()
        return result

    def run(self, number: int, states: Tensor) -> Tensor:
        """The layer on other tokens [B, M, C], which see the patches of a recorded call."""
        call = self.calls[number]
        lending = Changing(partial(_lent, call))
        with intercepting(lending, self.attention), _as_is(self.layer):
            args, kwargs = call.layer.with_hidden(states.to(call.keys.device)).unbuilt()
            out = self.layer(*args, **kwargs)
        return states_of(out)


def _lent(patches: _Call, call: AttentionCall) -> AttentionCall:
    """The attention of other tokens, with the patches' keys and values in front of their own."""
    keys = torch.cat((patches.keys.to(call.key), call.key), dim=2)
    values = torch.cat((patches.values.to(call.value), call.value), dim=2)
    return replace(call, key=keys, value=values, mask=None)


@contextmanager
def _as_is(layer: Any) -> Iterator[None]:
    """With the layer's parameters as constants, and without gradient checkpointing.

    That would run the layer a second time, when no patches are lent to it.
    """
    trained = [one for one in layer.parameters() if one.requires_grad and one.is_leaf]
    for one in trained:
        one.requires_grad_(False)
    try:
        with computed_once(layer):
            yield
    finally:
        for one in trained:
            one.requires_grad_(True)


class Patches:
    """What was recorded of a tower's layers, call by call of the tower.

    Holds the keys and values of all layers: 2 · layers · patches · width numbers a crop.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = [_Layer(layer) for layer in layers]

    def run(self, tokens: Tensor) -> list[Tensor]:
        """The method's tokens behind the last layer.

        Args:
            tokens: [M, C], as they enter the first layer.

        Returns:
            For each call of the tower [crops, M, C]. Gradients reach `tokens` alone: no layer's
            parameters, frozen or not, and nothing of the patches.
        """
        out = []
        for number, first in enumerate(self.layers[0].calls):
            states = tokens.to(first.keys).expand(len(first.keys), -1, -1)
            for layer in self.layers:
                states = layer.run(number, states)
            out.append(states)
        return out


@contextmanager
def recorded(encoder: Encoder) -> Iterator[Patches]:
    """Record what the layers up to the feature layer do with patches while the block runs."""
    patches = Patches(encoder.layers[: encoder.feature + 1])
    with Hooks() as hooks:
        for layer in patches.layers:
            hooks.before(layer.layer, layer.begin)
            hooks.enter_context(intercepting(layer, layer.attention))
        yield patches
