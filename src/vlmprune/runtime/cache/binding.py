"""What ties the layers of a cache to the call that runs over them, and attends to what they hold.

A layer that does not hand the host all that is to be attended to leaves word of what it returned,
and as the attention call with those keys comes, the layer attends by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, unmasked
from vlmprune.report import Reading
from vlmprune.runtime.attention.interception import Proceed

T = TypeVar("T")


class Cutter(Protocol):
    """Decides what becomes of a layer's cache at the end of a prompt."""

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
        layer: the layer (`tail_layer.TailLayer`).
        prefix: what it held of earlier prompts, on the device of the computation.
        keys: [B, H, T, D] dense part.
        values: [B, H, T, Dv].
    """

    layer: Any
    prefix: Any
    keys: Tensor
    values: Tensor


class Binding:
    """Ties the layers of one cache to the call that runs over them.

    It stands around the attention of the decoder layers, and lets each attend to what it holds.

    Attributes:
        open: whether such a call is under way; only it can attend to these layers.
        cutter: of the prompt that it brings; None while decoding.
        waiting: what the layer returned that runs, until its attention is called.
        attended: the keys of the last layer that was attended to.
        borrowing: by attention module that attends to an earlier layer's keys, that layer.
        lent: what those layers returned in this forward.
        reading: notes what steps read; None where nothing is read in part.
    """

    def __init__(self) -> None:
        self.open = False
        self.cutter: Cutter | None = None
        self.waiting: Shown | None = None
        self.attended: Tensor | None = None
        self.borrowing: Mapping[Any, int] = {}
        self.lent: dict[int, Shown] = {}
        self.reading: Reading | None = None
        # The attention module of a decoder layer, for error sentences.
        self.attention: Any = None
        # What several layers of a forward need alike; forgotten behind it.
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What several layers of a forward need alike, made once.

        Args:
            key: what it depends on. Of tensors their `id`, so what is made must hold on to them.
            make: makes it.
        """
        found: T | None = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    def begin(self, cutter: Cutter | None, attention: Any, borrowing: Mapping[Any, int]) -> None:
        """Open it for a forward of a call.

        Args:
            cutter: of the prompt that it brings; None while decoding.
            attention: the attention module of a decoder layer.
            borrowing: by attention module that attends to an earlier layer's keys, that layer.
        """
        self.open, self.cutter, self.attention = True, cutter, attention
        self.borrowing = borrowing

    def end(self) -> None:
        """Close it behind a forward."""
        self.open, self.cutter, self.waiting, self.attention = False, None, None, None
        self.attended, self.borrowing, self.lent = None, {}, {}
        self._made.clear()

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

    def at_once(self, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any | None:
        """Attend to the keys that came as they lie in a layer that is ready for it; else None."""
        shown, plain = self.waiting, unmasked(args)
        if shown is None or plain is None or self.cutter is not None or self.borrowing:
            return None
        query, key, value = plain
        if key is not shown.keys or value is not shown.values:
            return None
        found = shown.layer.at_once(shown, query, proceed)
        if found is not None:
            self.waiting, self.attended = None, shown.keys
        return found

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        """Attend to the layer whose keys came, then cut it if the prompt is complete."""
        if call.module in self.borrowing:
            return self._borrowed(call, proceed)
        shown, cutter = self.waiting, self.cutter
        # Other keys are not a layer's of ours, or the host made something else of them.
        if shown is None or call.key is not shown.keys:
            if self.attended is not None and call.key is self.attended and contract.checks():
                raise contract.broken(
                    call.module, "the keys that one cache layer returns are attended to twice"
                )
            return proceed(call)
        self.waiting, self.attended = None, shown.keys
        if shown.layer.index in self.borrowing.values():
            self.lent[shown.layer.index] = shown
        call = _fitting(shown, call)
        if cutter is not None:
            shown.layer.sharing = call.sharing
        result = shown.layer.attended(shown, call, proceed, cutter)
        if cutter is not None and cutter.due(shown.layer.get_seq_length()):
            cutter.cut(shown, call)
        return result

    def _borrowed(self, call: AttentionCall, proceed: Proceed) -> Any:
        """Attend to what an earlier layer held while it attended; a plain one as ever."""
        shown = self.lent.get(self.borrowing[call.module])
        if shown is None:
            return proceed(call)
        if call.key is not shown.keys and contract.checks():
            raise contract.broken(
                call.module, f"it attends to other keys than the cache of layer {shown.layer.index}"
            )
        return shown.layer.attended(shown, _fitting(shown, call), proceed, None)


def _fitting(shown: Shown, call: AttentionCall) -> AttentionCall:
    """A call on what a layer showed.

    Raises:
        VlmpruneError: it cannot be answered for a layer of ours.
    """
    if call.value is not shown.values:
        if call.value.shape != shown.values.shape:
            raise contract.broken(call.module, "it attends to a part of its values at a time")
        call = replace(call, value=shown.values)
    if call.uneven is not None:
        raise VlmpruneError(
            f"attention with {call.uneven} cannot be used with a cut cache; prune before the "
            "language model instead."
        )
    return call


def prove_step(call: AttentionCall, keys: Tensor, values: Tensor) -> None:
    """Hold the host's attention of a step against what is read of it, on one head's keys.

    Args:
        call: on the dense part.
        keys: [n, D] of the first sample's first KV head, what it holds besides.
        values: [n, Dv] likewise.

    Raises:
        ContractError: it attends otherwise than at the prompt.
    """
    key, own = contract.due(call, causal=False), contract.ledger.get()
    if key is None or own is None:
        return
    group = call.query.shape[1] // call.key.shape[1]
    few = replace(
        call.without_positions(),
        query=call.query[:1, :group],
        key=torch.cat((keys, call.key[0, 0]))[None, None],
        value=torch.cat((values, call.value[0, 0]))[None, None],
    )
    if call.mask is not None:
        # All that it holds besides is seen.
        line = call.mask[:1, :1]
        seen = line.new_full((1, 1, 1, len(keys)), line.dtype == torch.bool)
        few = replace(few, mask=torch.cat((seen, line), dim=-1))
    if contract.check_rows(few, few.run()[0], causal=False):
        own.prove(*key)
