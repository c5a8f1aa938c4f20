"""The ragged KV-cache layer: of the prompt, every KV head holds what it kept; later tokens, all.

A layer starts as an ordinary dynamic one. When a prompt has passed through it under a pruner
that cuts caches, its columns are cut into a ragged prefix, and from then on new tokens go into a
small dense tail behind it. Attention reads both and merges them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import contract, masks
from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.parallel import WHOLE, Sharing
from vlmprune.runtime.attention import ragged, subset
from vlmprune.runtime.attention.interception import Proceed
from vlmprune.runtime.attention.ragged_tokens import Ragged
from vlmprune.runtime.cache.short_layer import ShortLayer

# A tail grows by a share of its length at a time, so that growing costs little on the whole and
# at most that share lies idle.
GROWTH, LEAST_GROWTH = 8, 16
# What a mask is used with, in words.
_USE = "a cut cache"


class Cutter(Protocol):
    """Decides what a layer keeps of a prompt."""

    def due(self, length: int) -> bool:
        """Whether a layer of that many columns has seen the whole prompt."""

    def attended(self, shown: Shown, call: AttentionCall) -> Tensor | None:
        """[B, T] bool: the columns shown among which the layer is to attend; None for all."""

    def cut(self, shown: Shown, call: AttentionCall) -> None:
        """Cut the layer, which is due; the call brings its last queries."""


@dataclass
class Shown:
    """What a layer returned as keys were added, for the attention call that is to come.

    The layer itself may be on its way to another device by then.

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


class Binding:
    """Ties the layers of one cache to the call that runs over them.

    It stands around the attention of the decoder layers, and attends to what their cache holds.

    Attributes:
        open: whether such a call is under way; only it can attend to ragged layers.
        cutter: of the prompt that it brings; None while decoding.
        waiting: what the layer returned that runs, until its attention is called.
    """

    def __init__(self) -> None:
        self.open = False
        self.cutter: Cutter | None = None
        self.waiting: Shown | None = None
        # The attention module of a decoder layer, for error sentences.
        self.attention: Any = None

    def check_attended(self) -> None:
        """Refuse to go on where the layer before did not attend to the keys that it was given.

        Raises:
            ContractError: a layer's keys were left waiting.
        """
        if self.waiting is not None and contract.checks():
            raise contract.broken(
                self.attention,
                f"decoder layer {self.waiting.layer.index} does not attend through the attention "
                "registry to the keys that its cache returns",
            )

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        """Attend to the layer whose keys came, then cut it if the prompt is complete."""
        shown, cutter = self.waiting, self.cutter
        # Other keys are not a ragged layer's, or the host made something else of them.
        if shown is None or call.key is not shown.keys:
            return proceed(call)
        self.waiting = None
        if call.value is not shown.values:
            call = replace(call, value=shown.values)
        if call.uneven is not None:
            raise VlmpruneError(
                f"attention with {call.uneven} cannot be used with a cut cache; prune before the "
                "language model instead."
            )
        if cutter is not None:
            shown.layer.sharing = call.sharing
        chosen = None if cutter is None else cutter.attended(shown, call)
        result: Any
        if chosen is not None:
            masks.readable(call.mask, _USE)
            proved = partial(contract.run, proceed, causal=True)
            result = subset.attend(proved, call, chosen, shown.prefix), None
        elif shown.prefix is None:
            result = contract.run(proceed, call, causal=True)
        else:
            result = self._attend(shown, shown.prefix, call)
        if cutter is not None and cutter.due(shown.layer.get_seq_length()):
            cutter.cut(shown, call)
        return result

    def _attend(self, shown: Shown, prefix: Ragged, call: AttentionCall) -> tuple[Tensor, None]:
        """Attention to a prefix and the tail behind it."""
        queries, layer = call.query.shape[2], shown.layer
        mask = masks.readable(call.mask, _USE)
        if mask is not None or queries > 1:
            mask = masks.spread(mask, queries, call.key.shape[2], call.query.device)
            call = call.with_mask(mask)
        out = ragged.attend(call, prefix)
        if not layer.stepped and queries == 1:
            layer.stepped = True
            _prove(call, prefix)
        return out.transpose(1, 2).contiguous(), None


def _prove(call: AttentionCall, prefix: Ragged) -> None:
    """Hold the host's attention of a step against what is read of it, on one head's keys.

    Args:
        call: on the tail.
        prefix: what comes before.

    Raises:
        ContractError: it attends otherwise than at the prompt.
    """
    key, own = contract.due(call, causal=False), contract.ledger.get()
    if key is None or own is None:
        return
    start, end = prefix.offsets[:2].tolist()
    group = call.query.shape[1] // call.key.shape[1]
    few = replace(
        call.without_positions(),
        query=call.query[:1, :group],
        key=torch.cat((prefix.keys[start:end], call.key[0, 0]))[None, None],
        value=torch.cat((prefix.values[start:end], call.value[0, 0]))[None, None],
    )
    if call.mask is not None:
        # All of the prefix is seen.
        line = call.mask[:1, :1]
        seen = line.new_full((1, 1, 1, end - start), line.dtype == torch.bool)
        few = replace(few, mask=torch.cat((seen, line), dim=-1))
    if contract.check_rows(few, few.run()[0], causal=False):
        own.prove(*key)


class RaggedLayer(ShortLayer):
    """A cache layer with a ragged prefix and a dense tail; a plain one until it is cut.

    `keys` and `values` [B, H, T, D] are those of the tail alone: right after the prompt T is 0.
    What is held of the prompt is in `prefix`, in which every head has another number.

    Attributes:
        binding: shared by the layers of a cache.
        index: number of the decoder layer.
        prefix: what the heads keep of the prompts so far, packed; None before the first cut.
        stepped: whether a step was made over the prefix.
        sharing: the processes that have some of the heads each, as a prompt found them.
    """

    def __init__(self, binding: Binding, index: int) -> None:
        super().__init__()
        self.binding, self.index = binding, index
        self.prefix: Ragged | None = None
        self.stepped = False
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
        self.check_alone()
        if self.prefix is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            if not binding.open or binding.cutter is None:
                return keys, values
        else:
            keys, values = self._append(key_states, value_states)
        binding.check_attended()
        binding.waiting = Shown(self, self.prefix, keys, values)
        return keys, values

    def check_alone(self) -> None:
        """Refuse to be attended to by a model that does not know of heads of unequal length.

        Raises:
            VlmpruneError: the layer is ragged, and no pruned call is under way.
        """
        if self.prefix is not None and not self.binding.open:
            raise VlmpruneError(
                "this cache was cut, and the model alone cannot attend to heads of unequal length; "
                "continue it with the pruner attached, or start with a fresh cache."
            )

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

    def set_prefix(self, prefix: Ragged, columns: int) -> None:
        """Make `prefix` stand for the first `columns` columns, and the tail empty."""
        device = self.keys.device
        self.prefix, self.start, self._room = prefix.to(device), columns, None
        shape = (prefix.batch, prefix.heads, 0)
        self.keys = prefix.keys.new_empty((*shape, prefix.keys.shape[1])).to(device)
        self.values = prefix.values.new_empty((*shape, prefix.values.shape[1])).to(device)

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
        if length == 0:
            self.reset()
        elif length < self.start:
            self.set_prefix(self.prefix.before(length), length)
        else:
            left = length - self.start
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.prefix = self._room = None
        self.stepped = False

    def take_samples(self, rows: Tensor) -> None:
        """The prefix of some samples."""
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


def _with_room(old: Tensor, states: Tensor, room: int) -> Tensor:
    """A larger tensor that begins with `old`."""
    new = states.new_empty((*states.shape[:2], room, states.shape[3]))
    new[:, :, : old.shape[2]] = old
    return new
