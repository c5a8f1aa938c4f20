"""From one prompt's attention to what each layer keeps of it: scores, the method's choice, the cut.

It runs inside the attention call of each layer, as prefill leaves it, so that at most one layer
is dense at a time. A method with probes chooses before the layer attends, which then attends
among what is kept.
"""

from __future__ import annotations

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
        whole: whether that is every visual token.
    """

    view: LayerView
    found: Retention | None
    kept: Tensor
    whole: bool


class CacheCut(PromptEnd):
    """One prompt under a method that cuts caches.

    Attributes:
        layers: what each layer that was asked keeps, once it has been cut.
    """

    def __init__(self, method: Method, mask: Tensor, visual: VisualColumns) -> None:
        """Prepare the cut of a prompt, as `PromptEnd` has it."""
        super().__init__(method, mask, visual)
        self.layers: list[LayerReport] = []
        # The last real columns, the window, newest first; -1 where a row has fewer.
        rank = self.mask.flip(1).cumsum(dim=1).flip(1)
        columns = torch.arange(self.columns, device=mask.device)
        self.window = [
            torch.where(self.mask & (rank == i), columns, -1).amax(dim=1)
            for i in range(1, method.window + 1)
        ]
        self.probes = None if method.probes is None else drawn(self.mask, method.probes)
        self._choice: LayerChoice | None = None

    def reported(self, report: Report, numbers: list[Tensor]) -> Report:
        """The report with what each layer keeps."""
        return report.with_layers(self.layers, self.seconds, numbers)

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
        with Timer(self, call.query):
            self._choice = choice = self._choose(shown, call)
            if choice.found is None or choice.whole:
                return None
            columns = self._columns(choice.kept, call.query.shape[0] // self.mask.shape[0])
            # What any head keeps takes part.
            return columns[:, :, shown.layer.start :].any(dim=1).to(call.query.device)

    @torch.no_grad()
    def cut(self, shown: Shown, call: AttentionCall) -> None:
        """Cut the layer to what the method keeps."""
        layer, query = shown.layer, call.query
        self.reached.note(layer.index, layer)
        with Timer(self, query):
            times = query.shape[0] // self.mask.shape[0]
            dense = self._nbytes(layer)
            choice, self._choice = self._choice, None
            choice = choice or self._choose(shown, call)
            kept, found = choice.kept, choice.found
            if found is not None:
                if not choice.whole:
                    self._store(shown, kept, times)
                self.layers.append(
                    LayerReport(
                        index=layer.index,
                        gamma=self._of_rows(found.gamma[::times]),
                        retention=self._of_rows(found.rate[::times]),
                        mask=kept[::times],
                        images=self.images,
                        bytes_before=dense,
                        bytes_after=self._nbytes(layer),
                        kv_bytes=int(kept[::times].sum()) * choice.view.token_bytes,
                        flops_saved=self._saved(kept[::times], query, layer),
                    )
                )

    def _choose(self, shown: Shown, call: AttentionCall) -> LayerChoice:
        times = call.query.shape[0] // self.mask.shape[0]
        view = self._view(shown, call, times)
        if self.probes is not None:
            view = self._probed(view, shown, call, times)
        with unrounded(call.query):
            found = self.method.retain(shown.layer.index, view)
        real = (view.images >= 0)[:, None]
        if found is None:
            return LayerChoice(view, None, real, True)
        kept = found.kept & real
        return LayerChoice(view, found, kept, bool((kept == real).all()))

    def _view(self, shown: Shown, call: AttentionCall, times: int) -> LayerView:
        query, keys, values, prefix = call.query, shown.keys, shown.values, shown.prefix
        start = shown.layer.start
        total: Any = 0.0
        rows: Any = 0
        for columns in self.window:
            columns = repeated(columns, times).to(query.device)
            at = columns - (self.columns - query.shape[2])
            row = query.gather(2, at.clamp(min=0)[:, None, None, None].expand_as(query[:, :, :1]))
            sees = self._before(columns[:, None], start, times)
            attention = self._attention(row, shown, sees, call)[:, :, 0]
            there = (at >= 0)[:, None, None]
            total, rows = total + attention * there, rows + there.long()
        places = repeated(self.places, times).to(query.device) - start
        images = repeated(self.images, times).to(query.device)
        index = places.clamp(min=0)[:, None].expand(-1, query.shape[1], -1)
        sharing = shown.layer.sharing
        attention = sharing.joined((total / rows.clamp(min=1)).gather(2, index))
        heads = keys.shape[1] * sharing.ranks
        held = self._others(times)[:, start:].sum(dim=1).to(query.device) * heads
        if prefix is not None:
            held = held + sharing.summed(row_lengths(prefix).to(query.device))
        return LayerView(
            attention.masked_fill((images < 0)[:, None], 0.0),
            images,
            repeated(self.counts, times).to(query.device),
            heads,
            held,
            (keys.shape[3] + values.shape[3]) * keys.element_size(),
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

    def _attention(self, rows: Tensor, shown: Shown, sees: Tensor, call: AttentionCall) -> Tensor:
        """Post-softmax attention [B, Hq, R, T] of queries `rows` [B, Hq, R, D]."""
        found, beside = scores(rows, shown.keys, call.scale), None
        if shown.prefix is not None:
            beside = ragged.partial(rows, shown.prefix, call.scale)[1]
        return softmax(found, sees[:, None], beside)

    def _nbytes(self, layer: RaggedLayer) -> int:
        """Bytes that a layer holds, those of heads of other processes included."""
        return int(layer.sharing.summed(torch.tensor(layer.nbytes(), device=layer.keys.device)))

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

    def _of_rows(self, values: Tensor) -> list[float | None]:
        """One number a row, None where a row has no image; float32's tail of digits cut off."""
        if bool(values.isnan().any()):
            raise VlmpruneError(
                "the attention of a decoder layer is not a number, so the model overflows; load it "
                "as float32 or bfloat16."
            )
        has = (self.counts.sum(dim=1) > 0).tolist()
        return [round(v, 6) if h else None for v, h in zip(values.tolist(), has, strict=True)]

    def _others(self, times: int) -> Tensor:
        """[B, S] bool: columns that stay whatever is chosen."""
        return repeated(self.mask & ~self.visual, times)

    def _columns(self, kept: Tensor, times: int) -> Tensor:
        """[B, H, S] bool: all columns that stay, of which `kept` [B, H, V] are visual tokens."""
        keep = self._others(times)[:, None].expand(-1, kept.shape[1], -1).clone()
        places = repeated(self.places, times)[:, None].expand_as(kept)
        # Places beyond a row's visual tokens hold other columns, which stay as they are.
        real = (repeated(self.images, times) >= 0)[:, None]
        values = torch.where(real, kept.to(keep.device), keep.gather(2, places))
        return keep.scatter_(2, places, values)

    def _store(self, shown: Shown, kept: Tensor, times: int) -> None:
        layer, start = shown.layer, shown.layer.start
        keep = self._columns(layer.sharing.own(kept), times)[:, :, start:].to(shown.keys.device)
        new = Ragged.cut(shown.keys, shown.values, keep, offset=start)
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
