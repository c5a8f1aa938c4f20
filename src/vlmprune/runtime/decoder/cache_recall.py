"""From a prompt's columns to a cache that is read in part: which are text, and which are visual.

It runs inside the attention call of each layer, as prefill leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.hosts.attention import AttentionCall
from vlmprune.method import Method
from vlmprune.report import ImageTokens, Reading, Report
from vlmprune.runtime.attention.recalled import Recalled
from vlmprune.runtime.cache.binding import Shown
from vlmprune.runtime.cache.recall_layer import RecallLayer, Text
from vlmprune.runtime.decoder.prompt_end import PromptEnd, repeated
from vlmprune.runtime.geometry import VisualColumns
from vlmprune.runtime.timer import Timer


@dataclass(frozen=True, eq=False)
class Parted:
    """Where the columns of a layer's dense part go; the same for all layers of a prompt.

    Attributes:
        text: [B, R] int64 places of the text, padding first.
        left: what these are then.
        visual: [B, V] int64 places of the prompt's visual tokens.
        columns: [B, V] int64 their columns.
        images: [B, V] int64 as in `Recalled`.
        tokens: [B, I] int64 likewise.
    """

    text: Tensor
    left: Text
    visual: Tensor
    columns: Tensor
    images: Tensor
    tokens: Tensor


class CacheRecall(PromptEnd):
    """One prompt under a method that reads caches in part."""

    def __init__(self, method: Method, mask: Tensor, visual: VisualColumns) -> None:
        """Prepare the end of a prompt, as `PromptEnd` has it."""
        super().__init__(method, mask, visual)
        self._own = visual
        # What is read of each image is worked out here, so that no layer waits for a device.
        self._counts = visual.counts.cpu()
        self._parted: dict[tuple[int, int, int, str], Parted] = {}
        self._layers: list[RecallLayer] = []
        self._reading: Reading | None = None

    @torch.no_grad()
    def cut(self, shown: Shown, call: AttentionCall) -> None:
        """Put the layer's visual tokens away, if the method reads a part of them."""
        layer: RecallLayer = shown.layer
        self.reached.note(layer.index, layer)
        keep = self.method.recall(layer.index, self._counts)
        if keep is None or bool((keep >= self._counts).all()):
            return
        with Timer(self.spent, call.query):
            self._put_away(layer, shown, keep, call.query.shape[0] // self.mask.shape[0])
        self._note(layer)

    def _put_away(self, layer: RecallLayer, shown: Shown, keep: Tensor, times: int) -> None:
        device = shown.keys.device
        parted = self._part(layer, times, device)
        keep = repeated(keep, times).to(device)
        keys, values = (_taken(s, parted.visual) for s in (shown.keys, shown.values))
        images, columns, tokens = parted.images, parted.columns, parted.tokens
        before: Recalled | None = shown.prefix
        if before is not None:
            held = before.store.whole()
            keys, values = torch.cat((held[0], keys), dim=2), torch.cat((held[1], values), dim=2)
            later = (images + before.tokens.shape[1]).masked_fill(images < 0, -1)
            images = torch.cat((before.images, later), dim=1)
            columns = torch.cat((before.columns, columns), dim=1)
            tokens, keep = torch.cat((before.tokens, tokens), 1), torch.cat((before.keep, keep), 1)
        method = self.method
        may_step_aside = not (method.always or method.watch or method.store == "host")
        recalled = Recalled.of(
            keys,
            values,
            images,
            columns,
            tokens,
            keep,
            method.sketch,
            method.store,
            method.rest,
            may_step_aside,
        )
        layer.put_away(
            _taken(shown.keys, parted.text),
            _taken(shown.values, parted.text),
            parted.left,
            recalled,
            self.columns,
        )
        layer.alike = torch.arange(len(keys)) // times

    def _part(self, layer: RecallLayer, times: int, device: torch.device) -> Parted:
        """Where a layer's columns go, whose tail begins at a column of its own."""
        text = layer.text
        held = 0 if text is None else text.length
        key = layer.start, held, times, str(device)
        if key not in self._parted:
            self._parted[key] = self._new_part(layer.start, text, times, device)
        return self._parted[key]

    def _new_part(self, start: int, text: Text | None, times: int, device: torch.device) -> Parted:
        mask, visual = (repeated(one, times).to(device) for one in (self.mask, self.visual))
        stays = (mask & ~visual)[:, start:]
        columns = torch.arange(start, self.columns, device=device).expand_as(stays)
        held = 0
        if text is not None:
            held = text.length
            stays = torch.cat((text.columns >= 0, stays), dim=1)
            columns = torch.cat((text.columns, columns), dim=1)
        # What stays comes last, in its order.
        most = int(stays.sum(dim=1).max())
        places = stays.long().sort(dim=1, stable=True).indices[:, stays.shape[1] - most :]
        real = stays.gather(1, places)
        left = Text(
            columns.gather(1, places).masked_fill(~real, -1), None if bool(real.all()) else real
        )
        at, images, tokens = (
            repeated(one, times).to(device) for one in (self.places, self.images, self.counts)
        )
        return Parted(places, left, (at - start).clamp(min=0) + held, at, images, tokens)

    def _note(self, layer: RecallLayer) -> None:
        """Let the layer's steps be noted with those of the prompt's other layers."""
        self._layers.append(layer)
        if self._reading is None:
            keep = self.method.recall(layer.index, self._counts)
            assert keep is not None
            rows = zip(keep.tolist(), self._own.lengths, strict=True)
            self._reading = Reading(
                (), [read[: len(own)] for read, own in rows], 0, 0, 0, 0, rows=len(self.mask)
            )
            self._reading.watch = self.method.watch
        layer.binding.reading = self._reading

    def reported(self, report: Report, numbers: list[Tensor]) -> Report:
        """The report with what the layers hold, and what their steps are to read."""
        reading, layers = self._reading, self._layers
        if reading is None:
            return report
        reading.layers = tuple(layer.index for layer in layers)
        held = [(layer.prefix, layer.sharing) for layer in layers]
        # Beams of a sample hold their prompt each; the report is of the request.
        times = len(layers[0].prefix.images) // len(self.mask)
        reading.dense_bytes = sum(one.bytes_dense * s.ranks for one, s in held) // times
        reading.device_bytes = sum(one.device_bytes * s.ranks for one, s in held) // times
        reading.host_bytes = sum(one.host_bytes * s.ranks for one, s in held) // times
        reading.sketch_bytes = sum(one.scored_bytes * s.ranks for one, s in held) // times
        reading.aside = sum(one.aside for one, _ in held)
        reading.images = self._images(layers[0].prefix)
        reading.own = int(self.counts.sum()) * times / int(layers[0].prefix.tokens.sum())
        return report.with_reading(reading, self.spent.total)

    def _images(self, recalled: Recalled) -> list[ImageTokens]:
        """Where the prompt's images stand among the visual tokens of a layer."""
        first = recalled.images.shape[1] - self.places.shape[1]
        out, numbers = list[ImageTokens](), iter(self._own.numbers)
        layouts = iter(self._own.layouts)
        for row, lengths in enumerate(self._own.lengths):
            at = first
            for length in lengths:
                own = torch.arange(at, at + length)
                out.append(ImageTokens(row, own, next(numbers), len(next(layouts).labels)))
                at += length
        return out


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """[B, H, n, D] of states [B, H, T, D], those at places [B, n]."""
    index = places[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)
