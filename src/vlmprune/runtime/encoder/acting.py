"""Methods that act inside a vision tower while it runs: tokens merged, or pixels scaled down.

Hooks on the host's own layers do it, without a line of theirs copied. At its end the tower hands
on as many tokens as ever, of which those that became one are alike, so that the host's own
selection, projector and packing go on as they do.

How tokens merge between a layer's attention and its MLP: the norm before the MLP is given the
merged tokens, the MLP's output is handed back to all members of each, the layer itself adds what
each was, and the mean over the members, by size, is the merged token plus its MLP's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune import costs
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import attention, decoder, outputs, towers
from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.families.media import Encoder, Inputs, Medium
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.release import recomputes
from vlmprune.hosts.towers import TowerCall
from vlmprune.method import Method
from vlmprune.runtime.attention.interception import Changing, intercepting
from vlmprune.runtime.attention.taps import KeyTap, tapped
from vlmprune.runtime.hooks import Hooks
from vlmprune.select import bipartite, coarse_grid
from vlmprune.select.precision import unrounded
from vlmprune.views import Inside
from vlmprune.views.layout import Layout


def check(model: Any, family: Family, method: Method) -> None:
    """Refuse, at attach, a family none of whose towers the method can act inside.

    Raises:
        VlmpruneError: there is none.
    """
    if not method.acts:
        return
    found = [_unfit(model, medium, method) for medium in family.media]
    reasons = [why for why in found if why]
    if len(reasons) == len(found):
        raise VlmpruneError(
            f"{method!r} acts in the vision encoder, but {reasons[0]}; {method.instead}."
        )


def acts_of(
    model: Any,
    media: Sequence[Medium],
    inputs: Sequence[Inputs],
    layouts: Sequence[Sequence[Layout]],
    method: Method,
) -> list[Inside | None]:
    """What a method does inside the tower of each medium; None for nothing.

    Args:
        model: the host.
        media: the family's modalities.
        inputs: for each of them the request's inputs.
        layouts: for each of them one an item; empty where the request brings none.
        method: the method, or a chain.

    Raises:
        VlmpruneError: it cannot act there, or its budget is out of reach.
    """
    if not method.acts:
        return [None] * len(media)
    return [
        _act(model, medium, given, items, method) if items else None
        for medium, given, items in zip(media, inputs, layouts, strict=True)
    ]


def _act(
    model: Any, medium: Medium, inputs: Inputs, layouts: Sequence[Layout], method: Method
) -> Inside:
    why = _unfit(model, medium, method) or _unfit_request(model, medium, inputs, layouts, method)
    if why is not None:
        raise VlmpruneError(f"{method!r} acts in the vision encoder, but {why}; {method.instead}.")
    encoder = medium.encoder(model, inputs)
    found = method.inside(layouts[0].grid, encoder.feature + 1)
    reads = method.reads(len(encoder.layers), encoder.feature)
    several = reads.layers or reads.states or reads.semantic is not None
    if found.acts and (several or any(n is not None for n in reads.single)):
        raise VlmpruneError(
            f"{method!r} changes the tokens of the vision encoder and then reads layers of it; "
            "chain a method that reads none, such as VisPruner."
        )
    shortening = [stage for stage in method.links if stage.shortens]
    return replace(found, alone=len(shortening) == 1)


def flops(
    model: Any,
    media: Sequence[Medium],
    inputs: Sequence[Inputs],
    layouts: Sequence[Sequence[Layout]],
    method: Method,
) -> float | None:
    """FLOPs of the towers by `costs.encoder_flops`, of pixels seen now or before.

    Args:
        model: the host.
        media: the family's modalities.
        inputs: for each of them the request's inputs, with or without pixels.
        layouts: for each of them one an item.
        method: the method, or a chain; None comes back of one that does not act.
    """
    if not method.acts:
        return None
    total = 0.0
    for medium, given, items in zip(media, inputs, layouts, strict=True):
        if items:
            grid, crops = items[0].grid, sum(one.crops for one in items)
            inside = method.inside(grid, medium.encoder(model, given).feature + 1)
            rows, columns = inside.grid or grid
            patches, merges = rows * columns, inside.merges
            total += costs.encoder_flops(model.config, crops, patches=patches, merges=merges)
    return total


def _unfit(model: Any, medium: Medium, method: Method) -> str | None:
    """Why a method cannot act inside a medium's tower, whatever is asked of it."""
    if medium.unattended:
        return f"{type(model).__name__} {medium.unattended}"
    if not isinstance(medium, Crops):
        return f"{type(model).__name__} encodes images at their own resolution"
    if method.acts == "merging":
        encoder = medium.encoder(model, {})
        if encoder.cls == -1:
            return f"{type(model).__name__} puts its CLS token last"
        odd = towers.unknown_layers(encoder.layers)
        if odd:
            known = ", ".join(towers.PARTS)
            return f"{', '.join(sorted(odd))} is not among the layers that it knows ({known})"
        return None
    tower = _tower(model, medium)
    if tower is None or not towers.scales(tower):
        name = type(model).__name__ if tower is None else type(tower).__name__
        return f"{name} cannot scale its positions to a smaller picture"
    return None


def _unfit_request(
    model: Any, medium: Medium, inputs: Inputs, layouts: Sequence[Layout], method: Method
) -> str | None:
    """Why a method cannot act in a request."""
    assert isinstance(medium, Crops)
    why = medium.joins_patches(model, inputs, layouts)
    if why is not None or method.acts != "merging":
        return why
    why = medium.joins_layers(model, inputs)
    if why is not None:
        return why
    layers: Any = medium.encoder(model, inputs).layers
    if recomputes(layers):
        return "gradient checkpointing runs its layers a second time, out of reach"
    name = attention.implementation(attention.attention_of(layers[0]))
    if name not in ("sdpa", "eager"):
        return (
            f"{name} cannot weigh merged tokens by size, which attn_implementation='sdpa' and "
            "'eager' can"
        )
    return None


def _tower(model: Any, medium: Crops) -> nn.Module | None:
    try:
        return medium.tower(model)
    except AttributeError:
        return None


class TowerRun:
    """A run of a tower in which nothing happens; subclasses act.

    Attributes:
        inside: what is to happen.
        shared: for each crop [N], as in `EncoderView`; empty where nothing happens.
    """

    def __init__(self, inside: Inside | None) -> None:
        self.inside = inside
        self.shared: list[Tensor] = []

    def per_patch(self, layer: nn.Module | None, rows: list[Tensor]) -> list[Tensor]:
        """Attention to a layer's tokens [B, T], handed out to those that the tower began with.

        Tokens that became one share equally what it gets. None is a head behind all layers.
        """
        return rows

    def words(self, scored: str) -> str:
        """What was looked at; `scored` says which attention was read besides."""
        if self.inside is None:
            return scored
        return self.inside.words if self.inside.alone else f"{self.inside.words}; {scored}"


@contextmanager
def acting(model: Any, medium: Medium, inputs: Inputs, inside: Inside | None) -> Iterator[TowerRun]:
    """Act inside the tower while the block runs; all hooks are gone afterwards."""
    if inside is None or not inside.acts:
        yield TowerRun(inside)
        return
    assert isinstance(medium, Crops)
    encoder = medium.encoder(model, inputs)
    with Hooks() as hooks:
        if inside.grid is None:
            yield _Merging(encoder, inside, hooks)
        else:
            grid = medium.patch_grid(model, inputs)
            yield _Downscaling(medium.tower(model), grid, inside, encoder.cls, hooks)


class _Merging(TowerRun):
    """Tokens that merge in the layers of an encoder.

    All that it holds is of the tower's present call: `places` [B, T] where each token that the
    tower began with is by now, `size` [B, t] of how many each is made, and the layer's own merge.
    """

    def __init__(self, encoder: Encoder, inside: Inside, hooks: Hooks) -> None:
        super().__init__(inside)
        self.cls = int(encoder.cls == 0)
        self.places = self.size = self.into = self.weights = torch.empty(0)
        # By layer, call by call: places and sizes as the layer begins.
        self.begun: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        last = len(inside.merges) - 1
        for number, (layer, merge) in enumerate(zip(encoder.layers, inside.merges, strict=False)):
            self._hook(layer, merge, number == 0, number == last, hooks)

    def _hook(self, layer: nn.Module, merge: int, first: bool, last: bool, hooks: Hooks) -> None:
        norm, mlp = towers.parts_of(layer)
        tap = KeyTap()
        begun = self.begun[layer] = []

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if first:
                tokens = decoder.layer_call(layer, args, kwargs).hidden[..., 0]
                self.size = torch.ones_like(tokens, dtype=torch.float32)
                every = torch.arange(tokens.shape[1], device=tokens.device)
                self.places = every.expand(tokens.shape)
            begun.append((self.places, self.size))

        def weigh(call: AttentionCall) -> AttentionCall:
            if call.mask is not None:
                raise VlmpruneError(
                    f"{type(layer).__name__} masks its tokens, which vlmprune cannot merge then; "
                    "pass what the model's own processor returns."
                )
            # The tower may lie on several devices.
            device, dtype = call.query.device, call.query.dtype
            self.places, self.size = self.places.to(device), self.size.to(device)
            weights = None if first else self.size.log().to(dtype)[:, None, None]
            return replace(call, mask=weights)

        def merged(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            self.into = bipartite.match(tap.rows_seen.pop(), merge, bool(self.cls))
            left = self.size.shape[1] - merge
            self.weights, self.size = bipartite.averaging(self.into, self.size, left)
            return (self._mean(args[0]), *args[1:]), kwargs

        def back(_: nn.Module, __: Any, ___: Any, output: Tensor) -> Tensor:
            return _taken(output, self.into)

        def end(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
            states = decoder.states_of(output)
            if merge:
                states = self._mean(states)
                self.places = self.into.gather(1, self.places)
            if last:
                states = _taken(states, self.places)
                self.shared += list(self.places[:, self.cls :] - self.cls)
            return decoder.with_states(output, states)

        hooks.before(layer, begin)
        # Before the host's own hooks, which record the states.
        hooks.after(layer, end, first=True)
        if merge:
            hooks.enter_context(tapped(layer, tap))
            hooks.before(norm, merged)
            hooks.after(mlp, back)
        hooks.enter_context(intercepting(Changing(weigh), attention.attention_of(layer)))

    def _mean(self, states: Tensor) -> Tensor:
        """[B, T, C] states by the layer's own merge, in float32."""
        with unrounded(states):
            return (self.weights @ states.float()).to(states.dtype)

    def per_patch(self, layer: nn.Module | None, rows: list[Tensor]) -> list[Tensor]:
        """Each call's rows by where each token was as the layer began."""
        if layer is None or layer not in self.begun:
            return rows
        return [
            (row / size.to(row.device)).gather(1, places.to(row.device))
            for row, (places, size) in zip(rows, self.begun[layer], strict=True)
        ]


class _Downscaling(TowerRun):
    """Pixels scaled down in front of a tower, and its tokens put back on the full grid."""

    def __init__(
        self,
        tower: Any,
        grid: tuple[int, int],
        inside: Inside,
        cls: int | None,
        hooks: Hooks,
    ) -> None:
        super().__init__(inside)
        small = inside.grid or grid
        cells, prefix = coarse_grid.sources(grid, small), int(cls == 0)
        self.index = torch.cat((torch.arange(prefix), cells + prefix))
        if cls == -1:
            self.index = torch.cat((cells, torch.tensor([small[0] * small[1]])))
        size = [n * towers.patch_size(tower) for n in small]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = TowerCall(tower, args, kwargs)
            pixels = call.pixels
            self.shared += [cells.to(pixels.device)] * len(pixels)
            few = nn.functional.interpolate(
                pixels.float(), size=size, mode="bilinear", antialias=True
            ).to(pixels.dtype)
            return call.scaled(few)

        def after(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            states = outputs.states_of(output)
            full = tuple(None if one is None else _put(one, self.index) for one in states)
            if full:
                outputs.set_states(output, full)
            outputs.set_last(output, _put(outputs.last_of(output), self.index))

        hooks.before(tower, before)
        hooks.after(tower, after)

    def per_patch(self, layer: nn.Module | None, rows: list[Tensor]) -> list[Tensor]:
        """Each call's rows on the full grid; the layer makes no difference."""
        return [_put(row / self.index.bincount().to(row.device), self.index) for row in rows]


def _put(states: Tensor, index: Tensor) -> Tensor:
    return states[:, index.to(states.device)]


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """[B, t, C] states at places [B, T]."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[2]))
