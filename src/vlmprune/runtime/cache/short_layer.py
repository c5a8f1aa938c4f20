"""What cache layers have in common that hold less than was seen: their length, and their samples.

Masks and positions are counted in columns, so such a layer reports its logical length: the columns
`start` that were seen before its tail, stored or not, and those of the tail, of which none is
missing. What is stored is told by `nbytes`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts.caches import GrowingLayer


class ShortLayer(GrowingLayer):
    """A dynamic cache layer that may lack columns of what came before its tail.

    Attributes:
        start: columns before the tail, stored or not.
    """

    # Tensors, once initialised.
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.start = 0

    @property
    def stored(self) -> int:
        """Columns in `keys`, padding included."""
        return 0 if self.keys is None or self.keys.ndim < 4 else int(self.keys.shape[2])

    # Columns in `keys` behind the first `start` that were seen: all, where a layer says no more.
    tail = stored

    def get_seq_length(self) -> int:
        """Columns seen, stored or not."""
        return self.start + self.tail

    def reset(self) -> None:
        """Forget everything."""
        self.start = 0
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the samples in another order; one may be taken several times."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        if self.get_seq_length():
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the samples at `indices`, in their order."""
        if not self.get_seq_length():
            return
        rows = self.rows_at(indices)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.take_samples(rows)

    def rows_at(self, indices: Tensor) -> Tensor:
        """[B'] int64 numbers of samples, given so or [B] bool."""
        rows = torch.as_tensor(indices, device=self.keys.device)
        return rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows

    def take_samples(self, rows: Tensor) -> None:
        """The same of what a layer holds besides; `rows` [B'] int64."""
