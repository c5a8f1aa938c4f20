"""From one prompt's attention to what each layer keeps of it: scores, the method's choice, the cut.

What a layer's last rows attend to is computed in its attention call, as prefill leaves it. The cut
may wait for a few layers, whose choices are then one and whose dense caches are small (`HELD`); of
a method that looks at layers one by one, and where a layer is large, at most one is dense at a
time. A method with probes chooses before the layer attends, which then attends among what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmprune import costs
from vlmprune.errors import VlmpruneError
from vlmprune.hosts.attention import AttentionCall
from vlmprune.method import Method
from vlmprune.report import LayerReport, Report
from vlmprune.runtime.attention.ragged_tokens import Ragged
from vlmprune.runtime.cache.binding import Shown
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.runtime.decoder import probe_rows, seen_layers
from vlmprune.runtime.decoder.prompt_columns import Alike, Facts
from vlmprune.runtime.decoder.prompt_end import PromptEnd
from vlmprune.runtime.decoder.seen_layers import Seen
from vlmprune.runtime.geometry import VisualColumns
from vlmprune.runtime.timer import Timer
from vlmprune.select.precision import unrounded
from vlmprune.views import Retention

# Bytes that layers may hold which wait for their cut: five of a 7B model's at 2,880 tokens.
HELD = 2**28


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """What a method keeps of one or more layers, the samples of each behind those of the former.

    Attributes:
        found: what it said; None for everything.
        kept: [n · B, H, V] bool.
        numbers: sample by sample, how many tokens each KV head keeps.
        whole: layer by layer, whether that is every visual token.
    """

    found: Retention | None
    kept: Tensor
    numbers: list[list[int]]
    whole: list[bool]


@dataclass(frozen=True, eq=False)
class Told:
    """Layers that were cut together, and what their reports are still to be read from.

    Attributes:
        reports: without the rates.
        gamma: [n, b] as in `Retention`.
        rate: [n, b] likewise.
    """

    reports: list[LayerReport]
    gamma: Tensor
    rate: Tensor


class CacheCut(PromptEnd):
    """One prompt under a method that cuts caches.

    Attributes:
        layers: what each layer that was asked keeps, once it has been cut.
    """

    def __init__(self, method: Method, mask: Tensor, visual: VisualColumns) -> None:
        """Prepare the cut of a prompt, as `PromptEnd` has it."""
        super().__init__(method, mask, visual)
        self.layers: list[LayerReport] = []
        self._told: list[Told] = []
        # The last real columns, the window, newest first; -1 where a row has fewer.
        rank = self.mask.flip(1).cumsum(dim=1).flip(1)
        columns = torch.arange(self.columns, device=mask.device)
        window = [
            torch.where(self.mask & (rank == i), columns, -1).amax(dim=1)
            for i in range(1, method.window + 1)
        ]
        self.window = torch.stack(window, dim=1)
        self.facts = Facts.of(self, [[*row] for row in visual.lengths], method.window)
        self.probes = None
        if method.probes is not None:
            self.probes = probe_rows.drawn(self.mask, method.probes)
        self._alike: dict[Any, Alike] = {}
        # Of a layer that chose before it attends.
        self._chosen: tuple[Seen, LayerChoice] | None = None
        # Layers that wait for their cut, by what they have in common.
        self._waiting: dict[Hashable, list[Seen]] = {}
        self._held = 0

    def check_cut(self, model: Any, due: Sequence[int]) -> None:
        """Refuse a prompt of which a layer's cache was not cut, or attention was not a number.

        Args:
            model: the host.
            due: the decoder layers that were to be cut.

        Raises:
            ContractError: one was not.
            VlmpruneError: the model overflows.
        """
        self._cut_waiting()
        super().check_cut(model, due)
        # All layers at once, for reading a number waits for the device.
        gammas, rates = (
            self._of_rows([getattr(one, name) for one in self._told]) for name in ("gamma", "rate")
        )
        reports = [report for one in self._told for report in one.reports]
        found = [
            replace(report, gamma=gamma, retention=rate)
            for report, gamma, rate in zip(reports, gammas, rates, strict=True)
        ]
        self.layers += sorted(found, key=lambda one: one.index)
        self._told.clear()

    def reported(self, report: Report, numbers: list[Tensor]) -> Report:
        """The report with what each layer keeps."""
        return report.with_layers(self.layers, self.spent.total, numbers)

    def attended(self, shown: Shown, call: AttentionCall) -> Tensor | None:
        """[B, T] bool: the columns shown among which the layer attends; None for all.

        Args:
            shown: by the layer.
            call: with all rows of the prompt, before its attention.

        Raises:
            VlmpruneError: the prompt comes in parts.
        """
        if self.probes is None:
            return None
        if not self.due(shown.layer.get_seq_length()):
            raise VlmpruneError(
                f"{self.method!r} chooses among all tokens of a prompt, which comes in parts here; "
                "leave out prefill_chunk_size."
            )
        with torch.no_grad(), Timer(self.spent, call.query):
            seen = self._look(shown, call)
            choice = self._choose([seen], call)
            self._chosen = seen, choice
            if choice.found is None or all(choice.whole):
                return None
            columns = seen.alike.staying(shown.layer.sharing.own(choice.kept))
            # What any head keeps takes part.
            return columns.any(dim=1)

    @torch.no_grad()
    def cut(self, shown: Shown, call: AttentionCall) -> None:
        """Cut the layer to what the method keeps, now or together with later ones."""
        layer, method = shown.layer, self.method
        self.reached.note(layer.index, layer)
        if method.leaves_whole(layer.index):
            return
        with Timer(self.spent, call.query):
            if self._chosen is not None:
                (seen, choice), self._chosen = self._chosen, None
                self._store([seen], choice)
                return
            seen = self._look(shown, call)
            if not method.retains_together:
                self._store([seen], self._choose([seen], call))
                return
            self._waiting.setdefault(seen.key, []).append(seen)
            self._held += seen.nbytes
        # Another one is likely as large.
        if self._held + seen.nbytes > HELD:
            self._cut_waiting()

    @torch.no_grad()
    def _cut_waiting(self) -> None:
        """Cut the layers that wait for it."""
        waiting, self._waiting, self._held = self._waiting, {}, 0
        for some in waiting.values():
            with Timer(self.spent, some[0].rows):
                self._store(some, self._choose(some, None))

    def _look(self, shown: Shown, call: AttentionCall) -> Seen:
        """What the window's rows attend to in a layer."""
        query, times = call.query, call.query.shape[0] // self.mask.shape[0]
        alike, width = self._of_layer(shown, call, times), self.window.shape[1]
        if alike.rows is None:
            rows = query.narrow(2, query.shape[2] - width, width)
            # Newest first.
            rows = rows if width == 1 else rows.flip(2)
        else:
            at = alike.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            rows = query.gather(2, at)
        found = seen_layers.attention(rows, shown, alike.sees, call)
        saved = 0 if self.probes is None else query.shape[1] * query.shape[3]
        return Seen(shown, found, alike, times, saved)

    def _of_layer(self, shown: Shown, call: AttentionCall, times: int) -> Alike:
        """What the layer needs that others need, too."""
        query, start = call.query, shown.layer.start
        shape = query.shape[1], shown.keys.shape[1], query.shape[2]
        key = shape, start, times, query.device
        found = self._alike.get(key)
        if found is None:
            found = self._alike[key] = Alike.of(
                self, self.facts, self.window, shape, start, times, query.device
            )
        return found

    def _choose(self, some: Sequence[Seen], call: AttentionCall | None) -> LayerChoice:
        """What the method keeps of layers that have all in common; of one, with its call."""
        first = some[0]
        numbers = [one.shown.layer.index for one in some]
        view = seen_layers.view(some, self.facts.one_image)
        if self.probes is not None and call is not None:
            places = self.places
            view = probe_rows.probed(view, first, call, self.probes, self.mask, places)
        with unrounded(first.rows):
            if self.method.retains_together:
                each = torch.tensor(numbers, device=view.images.device)
                layers = each.repeat_interleave(len(view.images) // len(some))
                found = self.method.retain_together(layers, view)
            elif (alone := self.method.retain(numbers[0], view)) is not None:
                found = alone
            else:
                return LayerChoice(None, (view.images >= 0)[:, None], [], [True])
        kept = found.kept
        if not self.facts.even:
            kept = kept & (view.images >= 0)[:, None]
        # The one time that layers wait for the device: what is kept takes so much room.
        sizes = kept.sum(dim=2).tolist()
        most = [n for n in self.facts.visual for _ in range(first.times)]
        every = [
            all(n == all_ for n in row) for row, all_ in zip(sizes, most * len(some), strict=True)
        ]
        batch = len(most)
        whole = [all(every[n * batch : (n + 1) * batch]) for n in range(len(some))]
        return LayerChoice(found, kept, sizes, whole)

    def _store(self, some: Sequence[Seen], choice: LayerChoice) -> None:
        """Cut layers to what was chosen of them, and note what is to be told."""
        found, first, count = choice.found, some[0], len(some)
        if found is None:
            return
        times, batch = first.times, len(choice.kept) // count
        layers = [one.shown.layer for one in some]
        dense = [self._nbytes(layer) for layer in layers]
        if not all(choice.whole):
            self._put(some, choice)
        masks = choice.kept.unflatten(0, (count, batch))[:, ::times].unbind()
        reports = [
            LayerReport(
                index=layer.index,
                gamma=[],
                retention=[],
                mask=mask,
                images=self.images,
                bytes_before=before,
                bytes_after=self._nbytes(layer),
                kv_bytes=sum(map(sum, sizes[::times])) * one.token_bytes,
                flops_saved=self._saved(mask, one),
            )
            for one, layer, before, mask, sizes in zip(
                some, layers, dense, masks, _in_parts(choice.numbers, batch), strict=True
            )
        ]
        gamma, rate = (
            v.unflatten(0, (count, batch))[:, ::times] for v in (found.gamma, found.rate)
        )
        self._told.append(Told(reports, gamma, rate))

    def _put(self, some: Sequence[Seen], choice: LayerChoice) -> None:
        """Let layers hold what was chosen of their dense parts, and what they held before."""
        first, count = some[0], len(some)
        layer, times = first.shown.layer, first.times
        keep = first.alike.staying(layer.sharing.own(choice.kept), count)
        lengths = None
        if layer.start == 0 and layer.sharing.group is None:
            text = [n for n in self.facts.text for _ in range(times)] * count
            lengths = tuple(n + k for n, row in zip(text, choice.numbers, strict=True) for k in row)
        keys, values = ([getattr(one.shown, name) for one in some] for name in ("keys", "values"))
        cut = Ragged.cut_each(keys, values, keep, offset=layer.start, lengths=lengths)
        for one, whole, new in zip(some, choice.whole, cut, strict=True):
            shown = one.shown
            if not whole:
                prefix = new if shown.prefix is None else shown.prefix.join(new)
                shown.layer.set_prefix(prefix, self.columns)

    def _nbytes(self, layer: RaggedLayer) -> int:
        """Bytes that a layer holds, those of heads of other processes included."""
        own = layer.nbytes()
        if layer.sharing.group is None:
            return own
        return int(layer.sharing.summed(torch.tensor(own, device=layer.keys.device)))

    def _saved(self, kept: Tensor, one: Seen) -> float:
        """FLOPs that attention among fewer visual tokens saves in one layer."""
        if self.probes is None:
            return 0.0
        before = self.counts.sum(dim=1).tolist()
        after = kept.any(dim=1).sum(dim=1).tolist()
        width = one.saved * one.shown.layer.sharing.ranks
        return sum(
            costs.attention_flops(width, n) - costs.attention_flops(width, k)
            for n, k in zip(before, after, strict=True)
        )

    def _of_rows(self, values: list[Tensor]) -> list[list[float | None]]:
        """One number a row of each layer, [n, b] each; None where a row has no image; rounded."""
        if not values:
            return []
        found = torch.cat([one.to(values[0].device) for one in values]).tolist()
        if any(math.isnan(v) for rows in found for v in rows):
            raise VlmpruneError(
                "the attention of a decoder layer is not a number, so the model overflows; load it "
                "as float32 or bfloat16."
            )
        has = [n > 0 for n in self.facts.visual]
        # float32's tail of digits is cut off.
        return [
            [round(v, 6) if h else None for v, h in zip(rows, has, strict=True)] for rows in found
        ]


def _in_parts(values: list[Any], length: int) -> list[list[Any]]:
    """A list in parts of that length."""
    return [values[at : at + length] for at in range(0, len(values), length)]
