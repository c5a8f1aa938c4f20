"""Cache layers that keep a prompt in a form of their own, and later tokens in a dense tail.

Such a layer starts as an ordinary dynamic one. At the end of a prompt its columns are put away as a
prefix, and from then on new tokens go into a tail behind it, which grows in steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.parallel import WHOLE, Sharing
from vlmprune.runtime.attention.interception import Proceed
from vlmprune.runtime.cache.binding import Binding, Cutter, Shown
from vlmprune.runtime.cache.short_layer import ShortLayer

# A tail grows by a share of its length at a time, so that growing costs little on the whole and
# at most that share lies idle.
GROWTH, LEAST_GROWTH = 8, 16
# What a mask is used with, in words.
USE = "a cut cache"


class TailLayer(ShortLayer):
    """A cache layer with a prefix and a dense tail; a plain one until there is a prefix.

    `keys` and `values` [B, H, T, D] are the dense part alone.

    Attributes:
        binding: shared by the layers of a cache.
        index: number of the decoder layer.
        prefix: what it holds of the prompts so far; None before the first was put away.
        stepped: whether a step was made over the prefix.
        sharing: the processes that have some of the heads each, as a prompt found them.
    """

    def __init__(self, binding: Binding, index: int) -> None:
        super().__init__()
        self.binding, self.index = binding, index
        self.prefix: Any = None
        self.stepped = False
        self.sharing: Sharing = WHOLE
        self._room: tuple[Tensor, Tensor] | None = None

    def attended(
        self, shown: Shown, call: AttentionCall, proceed: Proceed, cutter: Cutter | None
    ) -> Any:
        """Attention of a call to all that the layer holds, as the host's function returns it.

        Args:
            shown: what the layer returned for it.
            call: with the keys and values that were shown.
            proceed: the host's own attention.
            cutter: of the prompt that is read; None while decoding.
        """
        raise NotImplementedError

    def at_once(self, shown: Shown, query: Tensor, proceed: Callable[[], Any]) -> Any | None:
        """Attention of a call without a mask that needs nothing else of the call.

        Args:
            shown: what the layer returned for it.
            query: [B, Hq, Q, D].
            proceed: the host's function on it.

        Returns:
            As the host's function returns it; None where the whole call is asked for.
        """
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new columns; returns the dense part, for an attention call that knows the rest.

        Raises:
            VlmpruneError: there is a prefix, and no pruner is attached to attend to it.
        """
        binding = self.binding
        self.check_alone()
        if self.cut:
            shown = self._shown(key_states, value_states)
        else:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            if not binding.open or binding.cutter is None:
                return keys, values
            shown = Shown(self, None, keys, values)
        binding.check_attended()
        binding.waiting = shown
        return shown.keys, shown.values

    @property
    def cut(self) -> bool:
        """Whether there is a prefix."""
        return self.prefix is not None

    def _shown(self, key_states: Tensor, value_states: Tensor) -> Shown:
        """Add columns behind a prefix."""
        return Shown(self, self.prefix, *self._append(key_states, value_states))

    def check_alone(self) -> None:
        """Refuse to be attended to by a model that does not know of the prefix.

        Raises:
            VlmpruneError: there is one, and no pruned call is under way.
        """
        if self.cut and not self.binding.open:
            raise VlmpruneError(
                f"this cache {self.holds}; continue it with the pruner attached, or start with a "
                "fresh cache."
            )

    # What is the matter with a cache that has a prefix, in words.
    holds = ""

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        held, new = self.stored, key_states.shape[2]
        if torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            self._room = None
            self.keys = torch.cat((self.keys, key_states), dim=2)
            self.values = torch.cat((self.values, value_states), dim=2)
            return self.keys, self.values
        end = held + new
        if self._room is None or self._room[0].shape[2] < end:
            room = max(end, room_for(held))
            self._room = (
                _with_room(self.keys, key_states, room),
                _with_room(self.values, value_states, room),
            )
        keys, values = self._room
        # Plain views, for slices in brackets take twice the time, at each layer of each step.
        keys.narrow(2, held, new).copy_(key_states)
        values.narrow(2, held, new).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        return self.keys, self.values

    def nbytes(self) -> int:
        """Bytes of all tensors held, room to grow and bookkeeping included."""
        if self.keys is None:
            return 0
        dense = self._room if self._room is not None else (self.keys, self.values)
        return self.prefix_nbytes() + sum(int(tensor.nbytes) for tensor in dense)

    def prefix_nbytes(self) -> int:
        """Bytes of the prefix; 0 without one."""
        return 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns away, from the tail first and then from the prefix.

        Args:
            tokens_to_remove: minus their number.
        """
        if not self.cut:
            # A positive number means what the release says it does: a length, or an error.
            super().crop(tokens_to_remove)
            return
        if tokens_to_remove > 0:
            raise VlmpruneError(
                f"crop({tokens_to_remove}) on a cut cache is ambiguous; pass minus the number of "
                "columns to remove."
            )
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if length == 0:
            self.reset()
        elif length < self.start:
            self.crop_prefix(length)
        else:
            self.crop_tail(length - self.start)

    def crop_tail(self, length: int) -> None:
        """Keep the first columns of the tail alone."""
        left = self.stored - self.tail + length
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def crop_prefix(self, length: int) -> None:
        """Keep the columns of the prefix before `length` alone, and no tail."""
        raise NotImplementedError

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


def room_for(held: int) -> int:
    """Places to make for so many columns, with room to grow."""
    return held + max(LEAST_GROWTH, held // GROWTH)


def _with_room(old: Tensor, states: Tensor, room: int) -> Tensor:
    """A larger tensor that begins with `old`."""
    new = states.new_empty((*states.shape[:2], room, states.shape[3]))
    new[:, :, : old.shape[2]] = old
    return new
