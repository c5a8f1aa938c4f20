"""The KV-cache layer that lacks columns: rows that were dropped before it left no keys in it.

It stores what came, densely, and knows which column of the sequence each stored one is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches, contract
from vlmprune.hosts.caches import GrowingLayer, WindowLayer
from vlmprune.runtime.cache.short_layer import ShortLayer


class GappedLayer(ShortLayer):
    """A dynamic cache layer in which columns may be missing.

    Stored are the columns `held`, and behind them a tail in which none is missing.

    Attributes:
        held: [B, P] int64; the column of each stored one before the tail, -1 where a sample has
            fewer; None as long as none is missing.
        padded: whether `held` may contain -1.
        shift: [B] by how much later positions are lower in this layer; None for not at all.
        window: how many columns a layer with a sliding window looks back; None without one. All
            stored columns stay, and the host's mask hides those outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: Tensor | None = None
        self.padded = False
        self.shift: Tensor | None = None
        self.window: int | None = None
        # What the next update brings, as the hook before the layer says: columns, or True where
        # none is missing.
        self._coming: tuple[Tensor, int, bool] | bool = False
        # Told that the update comes, where no hook before the layer does so.
        self._told: Callable[[], None] | None = None

    @classmethod
    def adopt(cls, old: GrowingLayer, rows: int, device: torch.device) -> GappedLayer:
        """A layer that holds what `old` holds."""
        new = cls()
        vars(new).update(caches.held_of(old))
        new.window = caches.window_of(old)
        new.is_sliding = new.window is not None
        new.start = old.get_seq_length()
        stored = new.stored
        columns = torch.arange(new.start - stored, new.start, device=device)
        new.held = columns.expand(rows, -1)
        return new

    @property
    def tail(self) -> int:
        """Columns stored behind `held`."""
        return self.stored - (0 if self.held is None else self.held.shape[1])

    def columns(self, device: torch.device) -> Tensor:
        """[B, stored] int64 column of each stored one; -1 for padding."""
        assert self.held is not None
        held = self.held.to(device)
        tail = torch.arange(self.start, self.start + self.tail, device=device)
        return torch.cat((held, tail.expand(len(held), -1)), dim=1) if self.tail else held

    def expect(self, columns: Tensor | None, length: int = 0, padded: bool = False) -> None:
        """Say what the next update brings; without, it is refused.

        Args:
            columns: [B, R] the column of each row that comes, and of each that is stored before,
                -1 for padding; None for a tail in which none is missing.
            length: columns of the sequence afterwards.
            padded: whether `columns` may contain -1.
        """
        self._coming = True if columns is None else (columns, length, padded)

    def expect_step(self, told: Callable[[], None]) -> None:
        """Say that the next update brings columns of which none is missing.

        Args:
            told: called as they come.
        """
        self._coming, self._told = True, told

    def expect_nothing(self) -> None:
        """Take back what was said, where the forward that it was about has failed."""
        self._coming, self._told = False, None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add rows.

        Raises:
            VlmpruneError: no pruner is attached to tell which columns they are.
        """
        self.check_alone()
        coming, self._coming = self._coming, False
        if self._told is not None:
            told, self._told = self._told, None
            told()
        if not isinstance(coming, bool):
            self.held, self.start, self.padded = coming
        keys, values = super().update(key_states, value_states)
        if self.held is None and self.window is not None:
            # The columns of which the host's mask tells.
            seen = self.window - 1 + key_states.shape[-2]
            return keys[:, :, -seen:], values[:, :, -seen:]
        return keys, values

    def check_alone(self) -> None:
        """Refuse columns of which nobody said which they are.

        Raises:
            VlmpruneError: some are missing. Once reset the layer may be used as any other.
        """
        if self._coming is False and self.held is not None:
            raise VlmpruneError(
                "this cache lacks columns in its later layers, and the model alone would misread "
                "it; continue it with the pruner attached, or start with a fresh cache."
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the host's mask has, and the first of them."""
        seen = self.get_seq_length()
        if self.window is None:
            return seen + query_length, 0
        offset = max(seen - self.window + 1, 0)
        length = self.window - 1 if seen >= self.window else seen
        return length + query_length, offset

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        if self.stored == 0:
            return 0
        others = [t for t in (self.held, self.shift) if t is not None]
        return sum(int(t.nbytes) for t in (self.keys, self.values, *others))

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns away.

        Args:
            tokens_to_remove: minus their number.
        """
        if self.held is None:
            # It was reset. A positive number means what the release says it does.
            if self.stored:
                super().crop(tokens_to_remove)
            return
        if tokens_to_remove > 0:
            raise VlmpruneError(
                f"crop({tokens_to_remove}) on a cache that lacks columns is ambiguous; pass minus "
                "the number of columns to remove."
            )
        left = max(0, self.get_seq_length() + tokens_to_remove)
        if self.stored == 0 or tokens_to_remove == 0:
            return
        if left == 0:
            self.reset()
            return
        if left >= self.start:
            stored = self.held.shape[1] + left - self.start
            self.keys, self.values = self.keys[:, :, :stored], self.values[:, :, :stored]
            return
        columns = self.columns(self.held.device)
        keep = (columns >= 0) & (columns < left)
        longest = int(keep.sum(dim=1).max())
        order = keep.long().sort(dim=1, stable=True).indices[:, columns.shape[1] - longest :]
        self.held = columns.gather(1, order).masked_fill(~keep.gather(1, order), -1)
        self.start, self.padded = left, True
        places = order.to(self.keys.device)[:, None, :, None]
        self.keys, self.values = (
            t.gather(2, places.expand(-1, t.shape[1], -1, t.shape[3]))
            for t in (self.keys, self.values)
        )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.held = self.shift = None
        self.padded = False
        self.expect_nothing()

    def take_samples(self, rows: Tensor) -> None:
        """The columns and shifts of some samples."""
        if self.held is not None:
            self.held = self.held.index_select(0, rows.to(self.held.device))
        if self.shift is not None:
            self.shift = self.shift.index_select(0, rows.to(self.shift.device))


def gapped_at(cache: Any, index: int, rows: int, device: torch.device) -> GappedLayer:
    """The layer `index` of a dynamic cache, made one that may lack columns."""
    caches.fill(cache, index + 1)
    held = caches.layers_of(cache)
    if index >= len(held):
        raise contract.broken(cache, f"it has {len(held)} layers where number {index} is due")
    layer = held[index]
    if not isinstance(layer, GappedLayer):
        if type(layer) not in (GrowingLayer, WindowLayer):
            raise contract.broken(
                cache, f"it holds {type(layer).__name__}s, not {GrowingLayer.__name__}s"
            )
        layer = GappedLayer.adopt(layer, rows, device)
        caches.replace_layer(cache, index, layer)
    elif layer.held is None:
        # It was reset.
        layer.start = layer.stored
        layer.held = torch.arange(layer.start, device=device).expand(rows, -1)
    return layer


def gapped_layers(cache: Any) -> Iterator[tuple[int, GappedLayer]]:
    """The layers of a cache that lack columns, with their numbers."""
    for index, layer in enumerate(caches.layers_of(cache)):
        if isinstance(layer, GappedLayer):
            yield index, layer


def refusal(cache: Any, layers: Sequence[int]) -> str | None:
    """Why a cache cannot lack columns at those decoder layers; None if it can."""
    known = (GrowingLayer, WindowLayer, GappedLayer)
    return caches.refusal(cache, layers, known, "leave columns out of")
