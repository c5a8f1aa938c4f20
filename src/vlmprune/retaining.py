"""From one prompt's attention to what each layer keeps of it: scores, the method's choice, the cut.

It runs inside the attention call of each layer, as prefill leaves it, so that at most one layer
is dense at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune import ragged
from vlmprune.cache import Guest
from vlmprune.errors import VlmpruneError
from vlmprune.ragged import Ragged
from vlmprune.report import LayerReport
from vlmprune.views import LayerView

if TYPE_CHECKING:
    from vlmprune.pruner import Pruner


# Numbers of keys that are scored at once.
SCORED = 2**24


class Retaining:
    """One prompt under a method that cuts caches.

    Attributes:
        layers: what each layer that was asked keeps, once it has been cut.
        seconds: time spent on scores, choice and cut.
        done: whether the prompt is complete.
    """

    def __init__(
        self, method: Pruner, mask: Tensor, visual: Tensor, lengths: Sequence[Sequence[int]]
    ) -> None:
        """Prepare the cut of a prompt.

        Args:
            method: decides what each layer keeps.
            mask: [B, S] columns of the prompt, those that a cache holds included; 0 is padding.
            visual: [B, S] bool; the visual tokens that came with this prompt.
            lengths: visual tokens of each new image, row by row.
        """
        self.method, self.mask, self.columns = method, mask != 0, mask.shape[1]
        self.layers: list[LayerReport] = []
        self.seconds = 0.0
        self.done = False
        device = mask.device
        longest = max((sum(row) for row in lengths), default=0)
        # Columns of the visual tokens first, in order; where a row has fewer, anything.
        order = visual.sort(dim=1, descending=True, stable=True).indices
        self.places = order[:, :longest]
        flat = [[i for i, n in enumerate(row) for _ in range(n)] for row in lengths]
        padded = [row + [-1] * (longest - len(row)) for row in flat]
        self.images = torch.tensor(padded, dtype=torch.long, device=device).view(len(flat), longest)
        most = max((len(row) for row in lengths), default=0)
        counts = [[*row, *[0] * (most - len(row))] for row in lengths]
        self.counts = torch.tensor(counts, dtype=torch.long, device=device).view(len(counts), most)
        self.visual = visual
        # The last real columns, the window, newest first; -1 where a row has fewer.
        rank = self.mask.flip(1).cumsum(dim=1).flip(1)
        columns = torch.arange(self.columns, device=device)
        self.window = [
            torch.where(self.mask & (rank == i), columns, -1).amax(dim=1)
            for i in range(1, method.window + 1)
        ]

    def due(self, length: int) -> bool:
        """Whether a layer of that many columns has seen the whole prompt."""
        return length == self.columns

    @torch.no_grad()
    def cut(self, guest: Guest, query: Tensor, scale: float) -> None:
        """Ask the method what the layer keeps, and cut it."""
        layer, keys = guest.layer, guest.keys
        _synchronize(keys)
        begin = time.perf_counter()
        times = query.shape[0] // self.mask.shape[0]
        dense = layer.nbytes()
        view = self._view(guest, query, scale, times)
        found = self.method.retain(layer.index, view)
        if found is not None:
            kept = found.kept & (view.images >= 0)[:, None]
            whole = bool((kept == (view.images >= 0)[:, None]).all())
            if not whole:
                self._store(guest, kept, times)
            self.layers.append(
                LayerReport(
                    index=layer.index,
                    gamma=self._of_rows(found.gamma[::times]),
                    retention=self._of_rows(found.rate[::times]),
                    mask=kept[::times],
                    images=self.images,
                    bytes_before=dense,
                    bytes_after=layer.nbytes(),
                    kv_bytes=int(kept[::times].sum()) * view.token_bytes,
                )
            )
        _synchronize(keys)
        self.seconds += time.perf_counter() - begin

    def _view(self, guest: Guest, query: Tensor, scale: float, times: int) -> LayerView:
        keys, values, prefix = guest.keys, guest.values, guest.prefix
        start = guest.layer.start
        total: Any = 0.0
        rows: Any = 0
        for columns in self.window:
            columns = _repeat(columns, times).to(query.device)
            at = columns - (self.columns - query.shape[2])
            row = query.gather(2, at.clamp(min=0)[:, None, None, None].expand_as(query[:, :, :1]))
            attention = self._attention(row, guest, columns, scale, times)
            inside = (at >= 0)[:, None, None]
            total, rows = total + attention * inside, rows + inside.long()
        places = _repeat(self.places, times).to(query.device) - start
        images = _repeat(self.images, times).to(query.device)
        index = places.clamp(min=0)[:, None].expand(-1, query.shape[1], -1)
        attention = (total / rows.clamp(min=1)).gather(2, index)
        held = self._others(times)[:, start:].sum(dim=1).to(query.device) * keys.shape[1]
        if prefix is not None:
            held = held + row_lengths(prefix).to(query.device)
        return LayerView(
            attention.masked_fill((images < 0)[:, None], 0.0),
            images,
            _repeat(self.counts, times).to(query.device),
            keys.shape[1],
            held,
            (keys.shape[3] + values.shape[3]) * keys.element_size(),
        )

    def _attention(
        self, row: Tensor, guest: Guest, columns: Tensor, scale: float, times: int
    ) -> Tensor:
        """Post-softmax attention [B, Hq, T] of one query a sample, `row` [B, Hq, 1, D]."""
        keys, start = guest.keys, guest.layer.start
        batch, heads, tail, _ = keys.shape
        grouped = row.reshape(batch, heads, -1, row.shape[-1]).float()
        # In parts, so that float32 copies of half-precision keys stay small.
        part = max(256, SCORED // (batch * heads * row.shape[-1]))
        parts = [grouped @ k.float().transpose(2, 3) for k in keys.split(part, dim=2)]
        scores = (torch.cat(parts, dim=-1) * scale).flatten(1, 2)
        seen = _repeat(self.mask, times)[:, start:].to(row.device)
        seen = seen & (torch.arange(tail, device=row.device) + start <= columns[:, None])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        total = scores.logsumexp(dim=-1)
        if guest.prefix is not None:
            total = torch.logaddexp(total, ragged.partial(row, guest.prefix, scale)[1][:, :, 0])
        # A row of padding alone sees nothing, and its attention is none.
        return (scores - total[..., None]).exp().masked_fill(total.isneginf()[..., None], 0.0)

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
        return _repeat(self.mask & ~self.visual, times)

    def _store(self, guest: Guest, kept: Tensor, times: int) -> None:
        layer, start = guest.layer, guest.layer.start
        keep = self._others(times)[:, None].expand(-1, kept.shape[1], -1).clone()
        places = _repeat(self.places, times)[:, None].expand_as(kept)
        # Places beyond a row's visual tokens hold other columns, which stay as they are.
        real = (_repeat(self.images, times) >= 0)[:, None]
        keep.scatter_(2, places, torch.where(real, kept.to(keep.device), keep.gather(2, places)))
        keep = keep[:, :, start:].to(guest.keys.device)
        new = Ragged.cut(guest.keys, guest.values, keep, offset=start)
        prefix = new if guest.prefix is None else guest.prefix.join(new)
        layer.set_prefix(prefix, self.columns)


def row_lengths(prefix: Ragged) -> Tensor:
    """[B] tokens stored for each sample, all heads together."""
    return torch.tensor(prefix.lengths).view(prefix.batch, prefix.heads).sum(dim=1)


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=0)


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
