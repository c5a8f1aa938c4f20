"""The ragged KV-cache layer: of the prompt, every KV head holds what it kept; later tokens, all.

A layer starts as an ordinary dynamic one. When a prompt has passed through it under a pruner
that cuts caches, its columns are cut into a ragged prefix, and from then on new tokens go into a
small dense tail behind it. Attention reads both and merges them. The layer reports its logical
length, in columns seen, because masks and positions are counted in columns; `nbytes` tells what
is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.caches import GrowingLayer
from vlmprune.hosts.parallel import WHOLE, Sharing
from vlmprune.runtime.attention import ragged, subset
from vlmprune.runtime.attention.interception import GUEST
from vlmprune.runtime.attention.ragged_tokens import Ragged

# A tail grows by a share of its length at a time, so that growing costs little on the whole and
# at most that share lies idle.
GROWTH, LEAST_GROWTH = 8, 16


class Cutter(Protocol):
    """Decides what a layer keeps of a prompt."""

    def due(self, length: int) -> bool:
        """Whether a layer of that many columns has seen the whole prompt."""

    def attended(self, guest: RaggedGuest, query: Tensor, mask: Any, scale: float) -> Tensor | None:
        """[B, T] bool: the guest's columns among which its layer is to attend; None for all."""

    def cut(self, guest: RaggedGuest, query: Tensor, scale: float) -> None:
        """Cut the guest's layer, which is due; `query` [B, Hq, Q, D] holds its last queries."""


class Binding:
    """Ties the layers of one cache to the call that runs over them.

    Attributes:
        open: whether such a call is under way; only it can attend to ragged layers.
        cutter: of the prompt that it brings; None while decoding.
    """

    def __init__(self) -> None:
        self.open = False
        self.cutter: Cutter | None = None
        self.waiting: RaggedGuest | None = None
        # The attention module of a decoder layer, for error sentences.
        self.attention: Any = None

    def check_attended(self) -> None:
        """Refuse to go on where the layer before did not attend to its keys as their guest.

        Raises:
            ContractError: a layer's keys were left waiting.
        """
        if self.waiting is not None and contract.checks():
            raise contract.broken(
                self.attention,
                f"decoder layer {self.waiting.layer.index} does not attend through the attention "
                "registry to the keys that its cache returns",
            )


@dataclass
class RaggedGuest:
    """One attention call over a layer, with the tensors as they were when its keys were added.

    Attributes:
        layer: the layer.
        prefix: what it held of earlier prompts, on the device of the computation.
        keys: [B, H, T, D] dense tail.
        values: [B, H, T, Dv].
    """

    layer: RaggedLayer
    prefix: Ragged | None
    keys: Tensor
    values: Tensor

    def attend(self, function: Callable[..., Any], call: AttentionCall) -> Any:
        """Attend to the layer, then cut it if the prompt is complete."""
        binding = self.layer.binding
        binding.waiting = None
        _check_call(call)
        cutter = binding.cutter
        scale = call.scale
        if cutter is not None:
            self.layer.sharing = call.sharing
        chosen = None if cutter is None else cutter.attended(self, call.query, call.mask, scale)
        result: Any
        if chosen is not None:
            # Positions of all rows would not fit, and gaps in them look like packed sequences.
            plain = partial(_plain, function, call.without_positions())
            tensors = call.query, self.keys, self.values, _known(call.mask), chosen
            result = subset.attend(plain, *tensors, self.prefix, scale, call.flash), None
        elif self.prefix is None:
            own = replace(call, key=self.keys, value=self.values)
            result = contract.run(function, own, causal=True)
        else:
            mask = tail_mask(call.mask, call.query, call.key.shape[2])
            out = ragged.attend(call.query, self.prefix, self.keys, self.values, mask, scale)
            result = out.transpose(1, 2).contiguous(), None
            if not self.layer.stepped and call.query.shape[2] == 1:
                self.layer.stepped = True
                self._prove(function, call, mask)
        if cutter is not None and cutter.due(self.layer.get_seq_length()):
            cutter.cut(self, call.query, scale)
        return result

    def _prove(
        self, function: Callable[..., Any], call: AttentionCall, mask: Tensor | None
    ) -> None:
        """Hold the host's attention of a step against what is read of it, on one head's keys.

        Raises:
            ContractError: it attends otherwise than at the prompt.
        """
        key, own = contract.due(call, causal=False), contract.ledger.get()
        if key is None or own is None or self.prefix is None:
            return
        start, end = self.prefix.offsets[:2].tolist()
        group = call.query.shape[1] // self.keys.shape[1]
        few = replace(
            call.without_positions(),
            query=call.query[:1, :group],
            key=torch.cat((self.prefix.keys[start:end], self.keys[0, 0]))[None, None],
            value=torch.cat((self.prefix.values[start:end], self.values[0, 0]))[None, None],
            mask=None,
        )
        if mask is not None:
            # All of the prefix is seen.
            line = mask[:1, :1]
            seen = line.new_full((1, 1, 1, end - start), line.dtype == torch.bool)
            few = replace(few, mask=torch.cat((seen, line), dim=-1))
        if contract.check_rows(function, few, few.run(function)[0], causal=False):
            own.prove(*key)


class RaggedLayer(GrowingLayer):
    """A cache layer with a ragged prefix and a dense tail; a plain one until it is cut.

    Attributes:
        binding: shared by the layers of a cache.
        index: number of the decoder layer.
        prefix: what the heads keep of the prompts so far; None before the first cut.
        start: columns that the prefix stands for.
        stepped: whether a step was made over the prefix.
        sharing: the processes that have some of the heads each, as a prompt found them.
    """

    # Tensors, once initialised.
    keys: Any
    values: Any

    def __init__(self, binding: Binding, index: int) -> None:
        super().__init__()
        self.binding, self.index = binding, index
        self.prefix: Ragged | None = None
        self.start, self.stepped = 0, False
        self.sharing: Sharing = WHOLE
        self._room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new columns; returns the dense part, for an attention call that knows the rest.

        Raises:
            VlmpruneError: the layer is ragged and no pruner is attached to attend to it.
        """
        binding = self.binding
        if self.prefix is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            if not binding.open or binding.cutter is None:
                return keys, values
        elif binding.open:
            keys, values = self._append(key_states, value_states)
        else:
            raise VlmpruneError(
                "this cache was cut, and the model alone cannot attend to heads of unequal length; "
                "continue it with the pruner attached, or start with a fresh cache."
            )
        binding.check_attended()
        guest = binding.waiting = RaggedGuest(self, self.prefix, keys, values)
        # Not the layer's own tensor, which must not refer back to the layer.
        shown = keys.view_as(keys)
        setattr(shown, GUEST, guest)
        return shown, values

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        held, new = self.tail, key_states.shape[2]
        if torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            self._room = None
            self.keys = torch.cat((self.keys, key_states), dim=2)
            self.values = torch.cat((self.values, value_states), dim=2)
            return self.keys, self.values
        if self._room is None or self._room[0].shape[2] < held + new:
            room = held + max(new, LEAST_GROWTH, held // GROWTH)
            self._room = (
                _with_room(self.keys, key_states, room),
                _with_room(self.values, value_states, room),
            )
        keys, values = self._room
        keys[:, :, held : held + new] = key_states
        values[:, :, held : held + new] = value_states
        self.keys, self.values = keys[:, :, : held + new], values[:, :, : held + new]
        return self.keys, self.values

    @property
    def tail(self) -> int:
        """Columns in the dense part."""
        return 0 if self.keys is None or self.keys.ndim < 4 else self.keys.shape[2]

    def set_prefix(self, prefix: Ragged, columns: int) -> None:
        """Make `prefix` stand for the first `columns` columns, and the tail empty."""
        device = self.keys.device
        self.prefix, self.start, self._room = prefix.to(device), columns, None
        shape = (prefix.batch, prefix.heads, 0)
        self.keys = prefix.keys.new_empty((*shape, prefix.keys.shape[1])).to(device)
        self.values = prefix.values.new_empty((*shape, prefix.values.shape[1])).to(device)

    def get_seq_length(self) -> int:
        """Columns seen, stored or not."""
        return super().get_seq_length() if self.prefix is None else self.start + self.tail

    def nbytes(self) -> int:
        """Bytes of all tensors held, room to grow and bookkeeping included."""
        if self.keys is None:
            return 0
        dense = self._room if self._room is not None else (self.keys, self.values)
        prefix = 0 if self.prefix is None else self.prefix.nbytes
        return prefix + sum(int(tensor.nbytes) for tensor in dense)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns away, from the tail first and then from the prefix.

        Args:
            tokens_to_remove: minus their number.
        """
        if self.prefix is None or tokens_to_remove > 0:
            # A positive number means what the release says it does: a length, or an error.
            if self.prefix is None:
                super().crop(tokens_to_remove)
                return
            raise VlmpruneError(
                f"crop({tokens_to_remove}) on a cut cache is ambiguous; pass minus the number of "
                "columns to remove."
            )
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if length < self.start:
            self.set_prefix(self.prefix.before(length), length)
        else:
            left = length - self.start
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def reset(self) -> None:
        """Forget everything."""
        self.prefix, self.start, self._room = None, 0, None
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the samples in another order; one may be taken several times."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        if self.get_seq_length() > 0:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the samples at `indices`, in their order."""
        if self.get_seq_length() == 0:
            return
        rows = torch.as_tensor(indices, device=self.keys.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self._room = None
        if self.prefix is not None:
            self.prefix = self.prefix.select(rows)

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to the device of the computation."""
        if self.is_initialized and self.keys.device != self.device:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if not self.is_initialized:
            return
        self.keys = self.keys.to(device, non_blocking=True)
        self.values = self.values.to(device, non_blocking=True)
        if self._room is not None and self._room[0].device != device:
            self._room = None
        if self.prefix is not None:
            self.prefix = self.prefix.to(device, non_blocking=True)


def tail_mask(mask: Any, query: Tensor, tail: int) -> Tensor | None:
    """What each query sees of the last `tail` columns, the last of which are its own.

    Args:
        mask: as Transformers hands it to attention: None, [B, columns], or [B, 1 or Hq, Q,
            columns], bool or additive.
        query: [B, Hq, Q, D].
        tail: number T of columns.

    Returns:
        None (everything) or [B or 1, 1 or Hq, Q, T], bool or additive.

    Raises:
        VlmpruneError: another kind of mask.
    """
    mask = _known(mask)
    if mask is not None and mask.ndim == 4:
        return mask[..., mask.shape[-1] - tail :]
    queries = query.shape[2]
    seen = None
    if queries > 1:
        columns = torch.arange(tail, device=query.device)
        seen = (columns <= columns[tail - queries :, None])[None, None]
    if mask is not None:
        real = mask[:, None, None, mask.shape[-1] - tail :].bool()
        seen = real if seen is None else seen & real
    return seen


def _known(mask: Any) -> Tensor | None:
    if mask is None or (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        return mask
    raise VlmpruneError(
        f"attention masks of {type(mask).__name__} cannot be used with a cut cache; load the "
        "model with attn_implementation='sdpa'."
    )


def _plain(
    function: Callable[..., Any],
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Any:
    few = replace(call, query=query, key=key, value=value, mask=mask)
    return contract.run(function, few, causal=True)[0]


def _check_call(call: AttentionCall) -> None:
    """Refuse what changes attention in a way that the ragged part does not know."""
    if call.uneven is not None:
        raise VlmpruneError(
            f"attention with {call.uneven} cannot be used with a cut cache; prune before the "
            "language model instead."
        )


def _with_room(old: Tensor, states: Tensor, room: int) -> Tensor:
    """A larger tensor that begins with `old`."""
    new = states.new_empty((*states.shape[:2], room, states.shape[3]))
    new[:, :, : old.shape[2]] = old
    return new
