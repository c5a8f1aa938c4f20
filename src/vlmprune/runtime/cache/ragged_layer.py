"""The ragged KV-cache layer: of the prompt, every KV head holds what it kept; later tokens, all.

When a prompt has passed through it under a pruner that cuts caches, its columns are cut into a
ragged prefix. Attention reads prefix and tail, and merges them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from vlmprune.hosts import contract, masks
from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import ragged, subset
from vlmprune.runtime.attention.interception import Proceed
from vlmprune.runtime.attention.ragged_tokens import Ragged
from vlmprune.runtime.cache.binding import Cutter, Shown, prove_step
from vlmprune.runtime.cache.tail_layer import USE, TailLayer


class RaggedLayer(TailLayer):
    """A cache layer with a ragged prefix and a dense tail; a plain one until it is cut.

    `keys` and `values` [B, H, T, D] are those of the tail alone: right after the prompt T is 0.
    What is held of the prompt is in `prefix` (`Ragged`), in which every head has another number.
    """

    holds = "was cut, and the model alone cannot attend to heads of unequal length"

    def attended(
        self, shown: Shown, call: AttentionCall, proceed: Proceed, cutter: Cutter | None
    ) -> Any:
        """Attention to the prefix and the tail, or among what a method chose before it."""
        chosen = None if cutter is None else cutter.attended(shown, call)
        if chosen is not None:
            masks.readable(call.mask, USE)
            proved = partial(contract.run, proceed, causal=True)
            return subset.attend(proved, call, chosen, shown.prefix), None
        if shown.prefix is None:
            return contract.run(proceed, call, causal=True)
        return self._attend(shown.prefix, call)

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
            start, end = prefix.offsets[:2].tolist()
            prove_step(call, prefix.keys[start:end], prefix.values[start:end])
        return out.transpose(1, 2).contiguous(), None

    def set_prefix(self, prefix: Ragged, columns: int) -> None:
        """Make `prefix` stand for the first `columns` columns, and the tail empty."""
        device = self.keys.device
        self.prefix, self.start, self._room = prefix.to(device), columns, None
        shape = (prefix.batch, prefix.heads, 0)
        self.keys = prefix.keys.new_empty((*shape, prefix.keys.shape[1])).to(device)
        self.values = prefix.values.new_empty((*shape, prefix.values.shape[1])).to(device)

    def prefix_nbytes(self) -> int:
        """Bytes of what the heads keep, bookkeeping included."""
        return 0 if self.prefix is None else self.prefix.nbytes

    def crop_prefix(self, length: int) -> None:
        """Keep of each head what stands before a column."""
        self.set_prefix(self.prefix.before(length), length)
