"""From one prompt's attention to what each layer keeps of it: scores, the method's choice, the cut.

It runs inside the attention call of each layer, as prefill leaves it, so that at most one layer
is dense at a time. A method with probes chooses before the layer attends, which then attends
among what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune import costs
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import masks
from vlmprune.hosts.attention import AttentionCall
from vlmprune.method import Method
from vlmprune.report import LayerReport, Report
from vlmprune.runtime.attention import ragged
from vlmprune.runtime.attention.ragged_tokens import Ragged
from vlmprune.runtime.cache.binding import Shown
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.runtime.decoder.prompt_columns import Alike, Facts
from vlmprune.runtime.decoder.prompt_end import PromptEnd, repeated
from vlmprune.runtime.geometry import VisualColumns
from vlmprune.runtime.timer import Timer
from vlmprune.select.precision import unrounded
from vlmprune.select.softmax import scores, softmax
from vlmprune.views import LayerView, Probes, Retention

# Numbers of keys that are scored at once.
SCORED = 2**24


@dataclass(frozen=True)
class LayerChoice:
    """What a method keeps of one layer.

    Attributes:
        view: what it saw.
        found: what it said; None for everything.
        kept: [B, H, V] bool.
        numbers: sample by sample, how many tokens each KV head keeps.
        whole: whether that is every visual token.
    """

    view: LayerView
    found: Retention | None
    kept: Tensor
    numbers: list[list[int]]
    whole: bool


@dataclass(frozen=True, eq=False)
class Told:
    """A layer that was cut, and what its report is still to be read from.

    Attributes:
        report: without the rates.
        gamma: [b] as in `Retention`.
        rate: [b] likewise.
    """

    report: LayerReport
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
        self.probes = None if method.probes is None else drawn(self.mask, method.probes)
        self._choice: LayerChoice | None = None
        self._alike: dict[Any, Alike] = {}

    def check_cut(self, model: Any, due: Sequence[int]) -> None:
        """Refuse a prompt of which a layer's cache was not cut, or attention was not a number.

        Args:
            model: the host.
            due: the decoder layers that were to be cut.

        Raises:
            ContractError: one was not.
            VlmpruneError: the model overflows.
        """
        super().check_cut(model, due)
        # All layers at once, for reading a number waits for the device.
        gammas, rates = (
            self._of_rows([getattr(one, name) for one in self._told]) for name in ("gamma", "rate")
        )
        self.layers += [
            replace(one.report, gamma=gamma, retention=rate)
            for one, gamma, rate in zip(self._told, gammas, rates, strict=True)
        ]
        self._told.clear()

    def reported(self, report: Report, numbers: list[Tensor]) -> Report:
        """The report with what each layer keeps."""
        return report.with_layers(self.layers, self.spent.total, numbers)

    @torch.no_grad()
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
        with Timer(self.spent, call.query):
            self._choice = choice = self._choose(shown, call)
            if choice.found is None or choice.whole:
                return None
            alike = self._of_layer(shown, call, call.query.shape[0] // self.mask.shape[0])
            columns = alike.staying(shown.layer.sharing.own(choice.kept))
            # What any head keeps takes part.
            return columns.any(dim=1)

    @torch.no_grad()
    def cut(self, shown: Shown, call: AttentionCall) -> None:
        """Cut the layer to what the method keeps."""
        layer, query = shown.layer, call.query
        self.reached.note(layer.index, layer)
        with Timer(self.spent, query):
            times = query.shape[0] // self.mask.shape[0]
            dense = self._nbytes(layer)
            choice, self._choice = self._choice, None
            choice = choice or self._choose(shown, call)
            kept, found = choice.kept, choice.found
            if found is not None:
                if not choice.whole:
                    self._store(shown, choice, call, times)
                own = slice(None, None, times)
                if times > 1:
                    kept, found = kept[own], replace(found, gamma=found.gamma[own])
                numbers = sum(map(sum, choice.numbers[own]))
                report = LayerReport(
                    index=layer.index,
                    gamma=[],
                    retention=[],
                    mask=kept,
                    images=self.images,
                    bytes_before=dense,
                    bytes_after=self._nbytes(layer),
                    kv_bytes=numbers * choice.view.token_bytes,
                    flops_saved=self._saved(kept, query, layer),
                )
                self._told.append(Told(report, found.gamma, found.rate[own]))

    def _choose(self, shown: Shown, call: AttentionCall) -> LayerChoice:
        times = call.query.shape[0] // self.mask.shape[0]
        view = self._view(shown, call, times)
        if self.probes is not None:
            view = self._probed(view, shown, call, times)
        with unrounded(call.query):
            found = self.method.retain(shown.layer.index, view)
        if found is None:
            real = (view.images >= 0)[:, None]
            return LayerChoice(view, None, real, [], True)
        kept = found.kept
        if not self.facts.even:
            kept = kept & (view.images >= 0)[:, None]
        # The one time that a layer waits for the device: what is kept takes so much room.
        numbers = kept.sum(dim=2).tolist()
        most = [n for n in self.facts.visual for _ in range(times)]
        whole = all(n == all_ for row, all_ in zip(numbers, most, strict=True) for n in row)
        return LayerChoice(view, found, kept, numbers, whole)

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

    def _view(self, shown: Shown, call: AttentionCall, times: int) -> LayerView:
        query, keys, values, prefix = call.query, shown.keys, shown.values, shown.prefix
        alike = self._of_layer(shown, call, times)
        width = self.window.shape[1]
        if alike.rows is None:
            rows = query.narrow(2, query.shape[2] - width, width)
            # Newest first.
            rows = rows if width == 1 else rows.flip(2)
        else:
            at = alike.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            rows = query.gather(2, at)
        each = self._attention(rows, shown, alike.sees, call)
        total = each[:, :, 0]
        if alike.there is not None:
            total = total * alike.there[:, :1, None]
        for i in range(1, width):
            row = each[:, :, i]
            total = total + (row if alike.there is None else row * alike.there[:, i : i + 1, None])
        if alike.counted is not None:
            total = total / alike.counted
        elif width > 1:
            total = total / width
        sharing = shown.layer.sharing
        attention = sharing.joined(total.gather(2, alike.index))
        if alike.fewer is not None:
            attention = attention.masked_fill(alike.fewer, 0.0)
        heads = keys.shape[1] * sharing.ranks
        held = alike.others * heads
        if prefix is not None:
            held = held + sharing.summed(row_lengths(prefix).to(query.device))
        return LayerView(
            attention,
            alike.images,
            alike.counts,
            heads,
            held,
            (keys.shape[3] + values.shape[3]) * keys.element_size(),
            one_image=self.facts.one_image,
            notes=alike.notes,
        )

    def _probed(self, view: LayerView, shown: Shown, call: AttentionCall, times: int) -> LayerView:
        """The view with what the probe rows see."""
        assert self.probes is not None
        query, mask = call.query, call.mask
        start, tail = shown.layer.start, shown.keys.shape[2]
        batch, heads, rows, width = query.shape
        columns = repeated(self.probes, times).to(query.device)
        sums = torch.zeros(batch, tail, device=query.device)
        seen = torch.zeros(batch, tail, dtype=torch.long, device=query.device)
        # A few rows at a time, so that memory stays linear in the prompt's length.
        for part in columns.split(max(1, SCORED // (batch * heads * tail)), dim=1):
            at = (part - (self.columns - rows)).clamp(min=0)
            if isinstance(mask, Tensor) and mask.ndim == 4:
                lines = masks.lines(masks.last(mask, tail), at, tail, None)
                sees = masks.visible(lines).any(dim=1)
            else:
                sees = self._before(part, start, times)
            sees = sees & (part >= 0)[..., None]
            probes = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, width))
            sums += self._attention(probes, shown, sees, call).mean(dim=1).sum(dim=1)
            seen += sees.sum(dim=1)
        places = (repeated(self.places, times).to(query.device) - start).clamp(min=0)
        return replace(view, sums=shown.layer.sharing.mean(sums), seen=seen, places=places)

    def _before(self, columns: Tensor, start: int, times: int) -> Tensor:
        """[B, R, T] bool: the real columns from `start` on, up to each of `columns` [B, R]."""
        real = repeated(self.mask, times)[:, start:].to(columns.device)
        return masks.lines(real, columns - start, real.shape[1], 0)[:, 0]

    def _attention(
        self, rows: Tensor, shown: Shown, sees: Tensor | None, call: AttentionCall
    ) -> Tensor:
        """Post-softmax attention [B, Hq, R, T] of queries [B, Hq, R, D] to what they see."""
        found, beside = scores(rows, shown.keys, call.scale), None
        if shown.prefix is not None:
            beside = ragged.partial(rows, shown.prefix, call.scale)[1]
        return softmax(found, None if sees is None else sees[:, None], beside)

    def _nbytes(self, layer: RaggedLayer) -> int:
        """Bytes that a layer holds, those of heads of other processes included."""
        own = layer.nbytes()
        if layer.sharing.group is None:
            return own
        return int(layer.sharing.summed(torch.tensor(own, device=layer.keys.device)))

    def _saved(self, kept: Tensor, query: Tensor, layer: RaggedLayer) -> float:
        """FLOPs that attention among fewer visual tokens saves in one layer."""
        if self.probes is None:
            return 0.0
        before = self.counts.sum(dim=1).tolist()
        after = kept.any(dim=1).sum(dim=1).tolist()
        width = query.shape[1] * layer.sharing.ranks * query.shape[3]
        return sum(
            costs.attention_flops(width, n) - costs.attention_flops(width, k)
            for n, k in zip(before, after, strict=True)
        )

    def _of_rows(self, values: list[Tensor]) -> list[list[float | None]]:
        """One number a row of each layer, None where a row has no image; rounded."""
        if not values:
            return []
        found = torch.stack([one.to(values[0].device) for one in values]).tolist()
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

    def _store(self, shown: Shown, choice: LayerChoice, call: AttentionCall, times: int) -> None:
        layer, start, sharing = shown.layer, shown.layer.start, shown.layer.sharing
        alike = self._of_layer(shown, call, times)
        keep = alike.staying(sharing.own(choice.kept))
        if keep.device != shown.keys.device:
            keep = keep.to(shown.keys.device)
        lengths = None
        if start == 0 and sharing.group is None:
            text = [n for n in self.facts.text for _ in range(times)]
            rows = zip(text, choice.numbers, strict=True)
            lengths = tuple(n + k for n, row in rows for k in row)
        new = Ragged.cut(shown.keys, shown.values, keep, offset=start, lengths=lengths)
        prefix = new if shown.prefix is None else shown.prefix.join(new)
        layer.set_prefix(prefix, self.columns)


def drawn(mask: Tensor, probes: Probes) -> Tensor:
    """[B, P] columns of each sample's probe rows, -1 where it has fewer.

    Drawn on the CPU, sample by sample, so that neither the device nor the other samples matter.

    Args:
        mask: [B, S] bool; False is padding.
        probes: how many.
    """
    rows = []
    for real in mask.cpu():
        columns = real.nonzero()[:, 0]
        split = max(0, len(columns) - probes.recent)
        generator = torch.Generator().manual_seed(probes.seed)
        chance = torch.randperm(split, generator=generator)[: probes.random].sort().values
        rows.append(torch.cat((columns[chance], columns[split:])))
    longest = max((len(row) for row in rows), default=0)
    padded = [nn.functional.pad(row, (longest - len(row), 0), value=-1) for row in rows]
    return torch.stack(padded).to(mask.device)


def row_lengths(prefix: Ragged) -> Tensor:
    """[B] tokens stored for each sample, all heads together."""
    return torch.tensor(prefix.lengths).view(prefix.batch, prefix.heads).sum(dim=1)
