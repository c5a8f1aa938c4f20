"""Visual tokens that skip single decoder layers: absent from one layer, back for the next.

At a layer that a method routes, the states of the text and of the visual tokens that it chose are
gathered, and the layer gets the host's own mask, rotary angles and cache for these rows alone. A
visual token that was chosen comes out as x + weight · (layer(x) - x), so that a weight of 1 is the
layer as it is; text comes out of the layer plainly; a token that was not chosen keeps its state.
It leaves no key in that layer's cache, and its position stays its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches, config, decoder
from vlmprune.hosts.decoder import LayerCall
from vlmprune.method import Method
from vlmprune.runtime.cache.gapped_layer import gapped_layers
from vlmprune.runtime.decoder import rows as ops
from vlmprune.runtime.decoder.dropping import Dropping, PromptRows, Timer
from vlmprune.runtime.decoder.row_pass import Pass, dropping_rows, hooked
from vlmprune.views import FrameView
from vlmprune.views.layout import Layout


@dataclass
class Skipping(Dropping):
    """A prompt whose visual tokens may skip decoder layers.

    Attributes:
        layers: those that they may skip, ascending.
        frames: for each new image, [n] int64 the frame of each of its visual tokens; of an image
            that is no video, zeros.
    """

    layers: tuple[int, ...] = ()
    frames: Sequence[Tensor] = field(default_factory=list)


def skipped(model: Any, method: Method) -> tuple[int, ...]:
    """The layers that a method lets tokens skip, once it is sure that the model can be followed.

    Raises:
        VlmpruneError: it cannot; one sentence says why.
    """
    layers = decoder.decoder_layers(model)
    found = tuple(method.dropper.skips(len(layers)))
    name = type(model).__name__
    for index in found:
        if not 0 < index < len(layers):
            raise VlmpruneError(
                f"{method!r} would let tokens skip decoder layer {index}, and {name} has layers 1 "
                f"to {len(layers) - 1} that can be skipped."
            )
    kinds = config.layer_kinds(model.config)
    for index in found:
        if kinds[index] not in decoder.ATTENDING:
            raise VlmpruneError(
                f"decoder layer {index} of {name} has {kinds[index].replace('_', ' ')}, whose "
                f"state every token passes through, so {method!r} cannot let tokens skip it; prune "
                "before the language model."
            )
        if not decoder.takes_angles(layers[index]):
            raise VlmpruneError(
                f"the decoder layers of {name} do not take rotary angles from outside, so "
                f"{method!r} cannot give them those of the tokens that they work on; prune before "
                "the language model."
            )
    return found


def frames_of(layout: Layout, numbers: Tensor) -> Tensor:
    """[k] int64 the frame of some of an item's visual tokens; zeros for what is no video.

    Args:
        layout: of the item.
        numbers: [k] of the tokens. One that belongs to no patch goes with the frame before it.
    """
    if layout.kind != "video":
        return torch.zeros_like(numbers)
    crops = layout.crop.clamp(min=0).cummax(dim=0).values
    return crops.to(numbers.device)[numbers]


class SkipPass(Pass):
    """One forward of the decoder over a prompt, layer by layer."""

    def __init__(self, skipping: Skipping, last: int, flash: bool) -> None:
        super().__init__(skipping, last, lambda index: False, flash)
        self.skipping = skipping
        self.frames: FrameRows | None = None
        # Of the layer that runs: its rows' states, and what weights them.
        self.given: Tensor | None = None
        self.weight: Tensor | None = None

    def before(self, index: int, layer: nn.Module, call: LayerCall) -> LayerCall | None:
        """What a layer gets instead of what the host gives it; None for the same."""
        if not self.thread.runs:
            return None
        self.reached.note(index, layer)
        hidden = call.hidden
        start = caches.length_of(call.cache, index)
        if self.prompt is None:
            self.prompt = PromptRows(self.skipping, hidden.shape[0], hidden.shape[1], start)
            self.frames = FrameRows(self.skipping, self.prompt)
        rows = hidden
        if index in self.skipping.layers:
            rows = self._route(index, hidden)
        changed = self._arguments(index, call, rows, start, runs=True)
        return None if changed is call and rows is hidden else changed.with_hidden(rows)

    def after(self, index: int, layer: nn.Module, output: Any) -> Any:
        """What the host gets of a layer."""
        if not self.thread.runs or self.given is None or self.prompt is None:
            return None
        going, self.prompt.going = self.going, None
        full, given, weight = self.full, self.given, self.weight
        self.full = self.given = self.weight = None
        # Where the layer failed, its error is on its way.
        if output is None or (going is None and weight is None):
            return None
        made = decoder.states_of(output)
        if weight is not None:
            made = _weighted(given, made, weight)
        if going is not None:
            assert full is not None
            made = going.scatter(full, made)
        return decoder.with_states(output, made)

    def _route(self, index: int, hidden: Tensor) -> Tensor:
        """The states of the rows that a layer works on."""
        assert self.prompt is not None and self.frames is not None
        prompt, frames = self.prompt, self.frames
        with Timer(self.skipping, hidden):
            found = self.skipping.method.route(index, frames.view(hidden))
            kept = found.kept.to(prompt.real.device) & frames.there
            keep = prompt.real.scatter(
                1, frames.places, torch.where(frames.there, kept, frames.spare)
            )
            self.weight = None if found.weight is None else frames.weights_of_rows(found.weight)
            self.given = hidden
            if bool((keep == prompt.real).all()):
                return hidden
            source = prompt.source
            prompt.going, order = ops.pack(source, source, keep, prompt.length)
        self.memo.clear()
        if not self.skipping.done:
            self.skipping.kept[index] = prompt.reached(prompt.going)
        self.full, self.given = hidden, ops.gather_rows(hidden, order)
        if self.weight is not None:
            self.weight = self.weight.gather(1, order.to(self.weight.device))
        return self.given


class FrameRows:
    """The visual tokens of a forward by frame; what is the same for all layers.

    Attributes:
        places: [B, V] int64 columns of each sample's visual tokens, then of others.
        there: [B, V] bool; which of them are visual tokens.
        spare: [B, V] bool; which of the others are no padding.
        frames: [B, V] int64; -1 where not `there`.
        counts: [B, F] int64.
    """

    def __init__(self, skipping: Skipping, prompt: PromptRows) -> None:
        flat, most, at = list[Tensor](), 0, iter(skipping.frames)
        for row in skipping.lengths:
            first = 0
            for _ in row:
                one = next(at).cpu() + first
                flat.append(one)
                first = max(first, int(one.max()) + 1) if len(one) else first
            most = max(most, first)
        visual = skipping.visual
        found = torch.full_like(visual, -1, dtype=torch.long)
        if flat:
            found[visual] = torch.cat(flat).to(visual.device)
        found = prompt.aligned(found, -1)
        self.places, self.there = ops.visual_places(found >= 0, prompt.longest)
        self.spare = prompt.real.gather(1, self.places)
        self.frames = found.gather(1, self.places).masked_fill(~self.there, -1)
        self.counts = ops.image_counts(self.frames, most)
        self.shape = found.shape

    def view(self, hidden: Tensor) -> FrameView:
        """What the method sees of states [B, L, D]."""
        return FrameView(ops.gather_rows(hidden, self.places), self.frames, self.counts)

    def weights_of_rows(self, weight: Tensor) -> Tensor:
        """[B, L] weights of all rows, from those [B, V] of the visual tokens; not a number: text.

        Not a number is told apart from every weight, and never enters a sum.
        """
        there, places = self.there.to(weight.device), self.places.to(weight.device)
        text = weight.new_full(self.shape, torch.nan)
        return text.scatter(1, places, torch.where(there, weight, torch.nan))


def _weighted(given: Tensor, out: Tensor, weight: Tensor) -> Tensor:
    """States [B, R, D] of which those that have a weight [B, R] take on that part of the change."""
    weight = weight.to(out.device)[..., None]
    plain = weight.isnan()
    mixed = given + weight.masked_fill(plain, 1).to(out.dtype) * (out - given)
    return torch.where(plain, out, mixed)


@contextmanager
def skipping_layers(
    model: Any, dropping: Dropping | None, cache: Any, wanted: bool
) -> Iterator[None]:
    """Let tokens drop out between layers, or skip some, in a forward inside the block.

    Args:
        model: the host.
        dropping: the prompt that it brings; None while decoding.
        cache: the cache that it continues, or None.
        wanted: whether the states behind every layer are asked for.
    """
    if not isinstance(dropping, Skipping):
        with dropping_rows(model, dropping, cache, wanted):
            yield
        return
    flash = "flash" in config.attention_implementation(config.of_text(model.config))
    run = SkipPass(dropping, len(decoder.decoder_layers(model)) - 1, flash)
    indices = sorted({*dropping.layers, *dict(gapped_layers(cache))})
    with hooked(model, run, indices, True, True):
        yield
