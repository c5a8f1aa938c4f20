"""Layers whose prompt is complete: what its last rows attend to there, and what a method sees."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import ragged
from vlmprune.runtime.attention.ragged_tokens import Ragged
from vlmprune.runtime.cache.binding import Shown
from vlmprune.runtime.decoder.prompt_columns import Alike
from vlmprune.select.softmax import scores, softmax
from vlmprune.views import LayerView


@dataclass(frozen=True, eq=False)
class Seen:
    """A layer whose prompt is complete, with what its cut needs.

    Attributes:
        shown: by the layer.
        rows: [B, Hq, w, T] float32; what the window's rows attend to, newest first.
        alike: what it has in common with others.
        times: how often each sample of the prompt stands in the forward.
        saved: query heads times their width, of methods with probes; else 0.
    """

    shown: Shown
    rows: Tensor
    alike: Alike
    times: int
    saved: int

    @property
    def key(self) -> Hashable:
        """What layers have in common that are cut together."""
        keys, values, group = self.shown.keys, self.shown.values, self.shown.layer.sharing.group
        widths = keys.shape[3], values.shape[3]
        return id(self.alike), self.times, widths, keys.dtype, keys.device, id(group)

    @property
    def token_bytes(self) -> int:
        """Of one token's key and value in one KV head."""
        keys, values = self.shown.keys, self.shown.values
        return (keys.shape[3] + values.shape[3]) * keys.element_size()

    @property
    def nbytes(self) -> int:
        """Of what waits for the cut."""
        return self.shown.keys.nbytes + self.shown.values.nbytes + self.rows.nbytes


def attention(rows: Tensor, shown: Shown, sees: Tensor | None, call: AttentionCall) -> Tensor:
    """Post-softmax attention [B, Hq, R, T] of queries [B, Hq, R, D] to what they see."""
    found, beside = scores(rows, shown.keys, call.scale), None
    if shown.prefix is not None:
        beside = ragged.partial(rows, shown.prefix, call.scale)[1]
    return softmax(found, None if sees is None else sees[:, None], beside)


def view(some: Sequence[Seen], one_image: bool) -> LayerView:
    """What a method sees of layers, one behind the other.

    Args:
        some: of one `Seen.key`.
        one_image: as in `LayerView`.
    """
    first, count = some[0], len(some)
    alike, sharing = first.alike, first.shown.layer.sharing
    each = first.rows[None] if count == 1 else torch.stack([one.rows for one in some])
    total = each[:, :, :, 0]
    if alike.there is not None:
        total = total * alike.there[:, :1, None]
    width = each.shape[3]
    for i in range(1, width):
        row = each[:, :, :, i]
        total = total + (row if alike.there is None else row * alike.there[:, i : i + 1, None])
    if alike.counted is not None:
        total = total / alike.counted
    elif width > 1:
        total = total / width
    found = total.gather(3, alike.index.expand(count, -1, -1, -1))
    if alike.fewer is not None:
        found = found.masked_fill(alike.fewer, 0.0)
    attention = sharing.joined(found.flatten(0, 1))
    heads = first.shown.keys.shape[1] * sharing.ranks
    layers = alike.layers(count)
    held = layers.others * heads
    if first.shown.prefix is not None:
        stored = torch.cat([row_lengths(one.shown.prefix) for one in some])
        held = held + sharing.summed(stored.to(held.device))
    return LayerView(
        attention,
        layers.images,
        layers.counts,
        heads,
        held,
        first.token_bytes,
        one_image=one_image,
        notes=layers.notes,
    )


def row_lengths(prefix: Ragged) -> Tensor:
    """[B] tokens stored for each sample, all heads together."""
    return torch.tensor(prefix.lengths).view(prefix.batch, prefix.heads).sum(dim=1)
