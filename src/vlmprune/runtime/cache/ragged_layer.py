"""The ragged KV-cache layer: of the prompt, every KV head holds what it kept; later tokens, all.

When a prompt has passed through it under a pruner that cuts caches, its columns are cut into a
ragged prefix. Steps lay prefix and tail in one piece where that wastes little (`one_piece`), and
the host's own attention reads it; elsewhere attention reads both, and merges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import contract, masks
from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import ragged, subset
from vlmprune.runtime.attention.interception import Proceed
from vlmprune.runtime.attention.ragged_tokens import Ragged
from vlmprune.runtime.cache import one_piece
from vlmprune.runtime.cache.binding import Binding, Cutter, Shown, prove_step
from vlmprune.runtime.cache.one_piece import OnePiece
from vlmprune.runtime.cache.tail_layer import USE, TailLayer


class RaggedLayer(TailLayer):
    """A cache layer with a ragged prefix and a dense tail; a plain one until it is cut.

    `keys` and `values` [B, H, T, D] are those of the tail alone: right after the prompt T is 0.
    What is held of the prompt is in `prefix` (`Ragged`), in which every head has another number.

    Attributes:
        piece: prefix and tail in one piece, of which `prefix` is then a copy, and `keys` and
            `values` are views; None where they lie apart, or there is no prefix.
    """

    holds = "was cut, and the model alone cannot attend to heads of unequal length"

    def __init__(self, binding: Binding, index: int) -> None:
        self.piece: OnePiece | None = None
        # Whether the prefix may be laid so; None where that is not known yet.
        self._serves: bool | None = None
        # Factor of the dot products, from the first step over a prefix on.
        self._scale: float | None = None
        # Where they lie apart.
        self._prefix: Any = None
        self._keys: Any = None
        self._values: Any = None
        super().__init__(binding, index)

    @property
    def prefix(self) -> Any:
        """What it holds of the prompts so far; None before the first was cut."""
        return self._prefix if self.piece is None else self.piece.prefix

    @prefix.setter
    def prefix(self, prefix: Ragged | None) -> None:
        self._take_apart()
        self._prefix, self._serves, self._scale = prefix, None, None

    @property
    def keys(self) -> Any:
        """[B, H, T, D] of the tail."""
        return self._keys if self.piece is None else self.piece.tails[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._take_apart()
        self._keys = keys

    @property
    def values(self) -> Any:
        """[B, H, T, Dv] of the tail."""
        return self._values if self.piece is None else self.piece.tails[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._take_apart()
        self._values = values

    @property
    def numbers(self) -> Ragged | None:
        """The prefix, of which keys and values may be left out; None without one."""
        return self._prefix if self.piece is None else self.piece.rest

    def _take_apart(self) -> None:
        """Let prefix and tail lie apart."""
        piece, self.piece = self.piece, None
        if piece is not None:
            self._prefix, self._room = piece.prefix, None
            self._keys, self._values = piece.tails

    @property
    def stored(self) -> int:
        """Columns in `keys`."""
        if self.piece is not None:
            return self.piece.tail
        return 0 if self._keys is None or self._keys.ndim < 4 else int(self._keys.shape[2])

    tail = stored

    @property
    def cut(self) -> bool:
        """Whether there is a prefix."""
        return self.piece is not None or self._prefix is not None

    def _shown(self, key_states: Tensor, value_states: Tensor) -> Shown:
        """Add columns behind a prefix, in one piece where nothing else is asked."""
        plain = self.binding.cutter is None and not (
            torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad)
        )
        if not plain:
            self._take_apart()
            return super()._shown(key_states, value_states)
        if self.piece is None:
            if self._serves is None:
                self._serves = one_piece.serves(self._prefix)
            if not self._serves:
                return super()._shown(key_states, value_states)
            piece = OnePiece.of(self._prefix, self._keys, self._values)
            self._prefix = self._keys = self._values = self._room = None
            self.piece = piece
        return Shown(self, self.piece, *self.piece.append(key_states, value_states))

    def at_once(self, shown: Shown, query: Tensor, proceed: Callable[[], Any]) -> Any | None:
        """A later step over a prefix and a tail in one piece."""
        piece = shown.prefix
        if self._scale is None or query.shape[2] != 1 or not isinstance(piece, OnePiece):
            return None
        if piece.seen is None:
            return proceed()
        return ragged.step(query, shown.keys, shown.values, self._scale, piece.added()), None

    def attended(
        self, shown: Shown, call: AttentionCall, proceed: Proceed, cutter: Cutter | None
    ) -> Any:
        """Attention to the prefix and the tail, or among what a method chose before it."""
        if isinstance(shown.prefix, OnePiece):
            return self._attend_piece(shown.prefix, call, proceed)
        chosen = None if cutter is None else cutter.attended(shown, call)
        if chosen is not None:
            masks.readable(call.mask, USE)
            proved = partial(contract.run, proceed, causal=True)
            return subset.attend(proved, call, chosen, shown.prefix), None
        if shown.prefix is None:
            return contract.run(proceed, call, causal=True)
        return self._attend(shown.prefix, call)

    def _attend_piece(self, piece: OnePiece, call: AttentionCall, proceed: Proceed) -> Any:
        """Attention to prefix and tail in one piece, by the host where that copies no keys."""
        queries, given = call.query.shape[2], masks.readable(call.mask, USE)
        first, self.stepped = not self.stepped and queries == 1, self.stepped or queries == 1
        if queries == 1:
            self._scale = call.scale
        if given is None and queries == 1 and piece.seen is not None:
            if first:
                self._prove(piece.prefix, replace(call, key=piece.tails[0], value=piece.tails[1]))
            added = piece.added()
            return ragged.step(call.query, call.key, call.value, call.scale, added), None
        if given is not None or queries > 1:
            # The same for all layers of a device whose prefixes have as many places.
            device = piece.keys.device
            mask, *_ = self.binding.once(
                (id(given), id(piece.seen), piece.lead, piece.tail, queries, device),
                lambda: (piece.mask(given, queries, call.query.shape[1]), given, piece.seen),
            )
            if mask is not None and not call.takes(mask):
                plain = call.query, call.key, call.value, mask, call.scale
                return ragged.dense_partial(*plain)[0].transpose(1, 2).contiguous(), None
            call = call.with_mask(mask)
        return contract.run(proceed, call, causal=False) if first else proceed(call)

    def _prove(self, prefix: Ragged, call: AttentionCall) -> None:
        """Hold the host's attention against ours, on the keys of a first head and its tail."""
        start, end = prefix.offsets[:2].tolist()
        prove_step(call, prefix.keys[start:end], prefix.values[start:end])

    def _attend(self, prefix: Ragged, call: AttentionCall) -> tuple[Tensor, None]:
        """Attention to a prefix and the tail behind it."""
        queries = call.query.shape[2]
        mask = masks.readable(call.mask, USE)
        if mask is not None or queries > 1:
            mask = masks.spread(mask, queries, call.key.shape[2], call.query.device)
            call = call.with_mask(mask)
        out = ragged.attend(call, prefix)
        if not self.stepped and queries == 1:
            self.stepped = True
            self._prove(prefix, call)
        return out.transpose(1, 2).contiguous(), None

    def set_prefix(self, prefix: Ragged, columns: int) -> None:
        """Make `prefix` stand for the first `columns` columns, and the tail empty."""
        device = self.keys.device
        if prefix.keys.device != device:
            prefix = prefix.to(device)
        self.prefix, self.start, self._room = prefix, columns, None
        shape = (prefix.batch, prefix.heads, 0)
        self.keys = prefix.keys.new_empty((*shape, prefix.keys.shape[1]))
        self.values = prefix.values.new_empty((*shape, prefix.values.shape[1]))

    def prefix_nbytes(self) -> int:
        """Bytes of what the heads keep, bookkeeping included."""
        return 0 if self._prefix is None else self._prefix.nbytes

    def nbytes(self) -> int:
        """Bytes of all tensors held, room to grow and bookkeeping included."""
        return super().nbytes() if self.piece is None else self.piece.nbytes

    def crop_prefix(self, length: int) -> None:
        """Keep of each head what stands before a column."""
        self.set_prefix(self.prefix.before(length), length)

    def crop_tail(self, length: int) -> None:
        """Keep the first columns of the tail alone."""
        if self.piece is None:
            super().crop_tail(length)
        else:
            self.piece.tail = length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the samples at `indices`, in their order."""
        if self.piece is None:
            super().batch_select_indices(indices)
        else:
            self.piece = self.piece.select(self.rows_at(indices))

    def _move(self, device: torch.device) -> None:
        if self.piece is None:
            super()._move(device)
        else:
            self.piece = self.piece.to(device, non_blocking=True)
