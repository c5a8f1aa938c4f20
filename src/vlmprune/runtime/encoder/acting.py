"""Methods that act inside a vision tower while it runs: what they do there, and who refuses.

Tokens merge (`merging_tower`) or leave (`dropping_tower`), or pixels are scaled down in front of it
(`downscaled_tower`). Hooks on the host's own layers do it, without a line of theirs copied. At its
end the tower hands on as many tokens as ever, of which those that became one are alike, and those
that left are zeros, so that the host's own selection, projector and packing go on as they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from vlmprune import costs
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import attention, towers
from vlmprune.hosts.families.media import Inputs, Medium
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.release import recomputes
from vlmprune.method import Method
from vlmprune.runtime.encoder.downscaled_tower import DownscaledTower
from vlmprune.runtime.encoder.dropping_tower import DroppingTower
from vlmprune.runtime.encoder.merging_tower import MergingTower
from vlmprune.runtime.encoder.tower_run import TowerRun
from vlmprune.runtime.hooks import Hooks
from vlmprune.views import Inside
from vlmprune.views.layout import Layout

# What a tower of layers that are known can do, and what that asks of its attention.
_IN_LAYERS = {
    "merging": "cannot weigh merged tokens by size",
    "dropping": "is not among those under which tokens are dropped",
}


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
    seen: Sequence[int] | None,
) -> float | None:
    """FLOPs of the towers by `costs.encoder_flops`, of pixels seen now or before.

    Args:
        model: the host.
        media: the family's modalities.
        inputs: for each of them the request's inputs, with or without pixels.
        layouts: for each of them one an item.
        method: the method, or a chain; None comes back of one that does not act.
        seen: patches of every crop, which are alike.
    """
    if not method.acts or not seen:
        return None
    total = 0.0
    for medium, given, items in zip(media, inputs, layouts, strict=True):
        if items:
            grid, crops = items[0].grid, sum(one.crops for one in items)
            encoder = medium.encoder(model, given)
            inside = method.inside(grid, encoder.feature + 1)
            rows, columns = inside.grid or grid
            patches = max(seen) if inside.grid is None else rows * columns
            merges = _gone(inside, patches // (rows * columns), len(encoder.layers))
            total += costs.encoder_flops(model.config, crops, patches=patches, merges=merges)
    return total


def _gone(inside: Inside, patches: int, layers: int) -> tuple[int, ...]:
    """By how many tokens a crop has become fewer in each layer of an encoder.

    Args:
        inside: what happens to its cells.
        patches: of a cell.
        layers: all that the encoder has.
    """
    if not any(inside.leaves):
        return tuple(cells * patches for cells in inside.merges)
    # What left is gone for the layers behind the features, too.
    gone = [cells * patches for cells in inside.leaves] + [0] * (layers - len(inside.leaves))
    if inside.fuse:
        # The first that leave become the token into which all later ones go.
        gone[next(number for number, tokens in enumerate(gone) if tokens)] -= 1
    return tuple(gone)


def _unfit(model: Any, medium: Medium, method: Method) -> str | None:
    """Why a method cannot act inside a medium's tower, whatever is asked of it."""
    if medium.unattended:
        return f"{type(model).__name__} {medium.unattended}"
    if not isinstance(medium, Crops):
        return f"{type(model).__name__} encodes images at their own resolution"
    if method.acts in _IN_LAYERS:
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
    if method.acts not in _IN_LAYERS:
        return medium.joins_patches(model, inputs, layouts)
    cells = len(medium.members(model, inputs))
    if any(one.blended or one.patches != cells for one in layouts):
        return f"{type(model).__name__} blends neighbouring patches into visual tokens there"
    why = medium.joins_layers(model, inputs)
    if why is not None:
        return why
    layers: Any = medium.encoder(model, inputs).layers
    if recomputes(layers):
        return "gradient checkpointing runs its layers a second time, out of reach"
    name = attention.implementation(attention.attention_of(layers[0]))
    if name not in ("sdpa", "eager"):
        return f"{name} {_IN_LAYERS[method.acts]}; attn_implementation='sdpa' and 'eager' work"
    return None


def _tower(model: Any, medium: Crops) -> nn.Module | None:
    try:
        return medium.tower(model)
    except AttributeError:
        return None


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
            kind = DroppingTower if any(inside.leaves) else MergingTower
            yield kind(encoder, medium.members(model, inputs), inside, hooks)
        else:
            grid = medium.patch_grid(model, inputs)
            yield DownscaledTower(medium.tower(model), grid, inside, encoder.cls, hooks)
