"""The cache layer of which each decode step reads a part: all text, and a few visual tokens.

At the end of a prompt the visual tokens are put away (`Recalled`), where the device of the
computation or the host has them in full; text stays in the dense part, before the tail. So nothing
is lost: a pass of several tokens, such as a later turn, reads everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import contract, masks
from vlmprune.hosts.attention import AttentionCall
from vlmprune.report import Reading
from vlmprune.runtime.attention import ragged, recall
from vlmprune.runtime.attention.interception import Proceed
from vlmprune.runtime.attention.recall import Read
from vlmprune.runtime.attention.recalled import Recalled
from vlmprune.runtime.cache.binding import Binding, Cutter, Shown, prove_step
from vlmprune.runtime.cache.tail_layer import USE, TailLayer
from vlmprune.select import recall as rule


@dataclass(frozen=True, eq=False)
class Text:
    """The text of the prompts so far, which leads the dense part.

    Attributes:
        columns: [B, R] int64; the column of each place, -1 at padding, which comes first.
        real: [B, R] bool; where there is a token; None where everywhere.
    """

    columns: Tensor
    real: Tensor | None

    @property
    def length(self) -> int:
        """Places R."""
        return self.columns.shape[1]

    def select(self, rows: Tensor) -> Text:
        """The samples at `rows` [B'], in their order."""
        real = None if self.real is None else self.real[rows]
        return Text(self.columns[rows], real)

    def to(self, device: torch.device) -> Text:
        """The same on another device."""
        real = None if self.real is None else self.real.to(device)
        return Text(self.columns.to(device), real)


class RecallLayer(TailLayer):
    """A cache layer that holds everything and is read in part; a plain one until it is put away.

    `keys` and `values` [B, H, R + T, D] are those of text and of later tokens. `prefix` is the
    visual tokens (`Recalled`).

    Attributes:
        text: of the prompts so far; None before the first was put away.
        alike: [B] int64; samples that hold the same prompt (beams) have the same number.
    """

    holds = "has its visual tokens put away, where the model alone cannot read them"

    def __init__(self, binding: Binding, index: int) -> None:
        super().__init__(binding, index)
        self.text: Text | None = None
        self.alike: Tensor | None = None

    @property
    def tail(self) -> int:
        """Columns behind those of the prompts so far."""
        return self.stored - (0 if self.text is None else self.text.length)

    def attended(
        self, shown: Shown, call: AttentionCall, proceed: Proceed, cutter: Cutter | None
    ) -> Any:
        """Attention to text, later tokens, and all visual tokens or those that a step reads."""
        if shown.prefix is None or self.text is None:
            return contract.run(proceed, call, causal=True)
        call = call.with_mask(self._mask(call, self.text))
        out, read = recall.attend(call, shown.prefix, whole=cutter is not None)
        if call.query.shape[2] == 1:
            if not self.stepped:
                self.stepped = True
                keys, values = shown.prefix.store.whole()
                real = shown.prefix.real[0]
                prove_step(call, keys[0, 0, real], values[0, 0, real])
            if cutter is None and self.binding.reading is not None:
                self._note(self.binding.reading, call, shown.prefix, read)
        return out.transpose(1, 2).contiguous(), None

    def _mask(self, call: AttentionCall, text: Text) -> Tensor | None:
        """What queries see of the dense part: all text, and of the tail what the host says."""
        queries, tail = call.query.shape[2], call.key.shape[2] - text.length
        mask = masks.spread(masks.readable(call.mask, USE), queries, tail, call.query.device)
        if mask is None and text.real is None:
            return None
        if mask is None:
            mask = torch.ones(1, 1, 1, tail, dtype=torch.bool, device=call.query.device)
        real = text.real
        if real is None:
            real = torch.ones(1, text.length, dtype=torch.bool, device=mask.device)
        seen = real.to(mask.device)[:, None, None]
        if mask.dtype != torch.bool:
            seen = masks.added(seen, mask.dtype)
        batch = max(len(seen), len(mask))
        return torch.cat(
            [one.expand(batch, mask.shape[1], mask.shape[2], -1) for one in (seen, mask)], dim=-1
        )

    def _note(self, reading: Reading, call: AttentionCall, recalled: Recalled, read: Read) -> None:
        """Note what a step read."""
        step = reading.step_of(self.index)
        step.bytes_read += recalled.bytes_read
        step.bytes_fetched += recalled.bytes_fetched
        step.bytes_dense += recalled.bytes_dense
        if not reading.watch:
            return
        heads = call.key.shape[1]
        step.index[self.index] = read.places(recalled, heads).to("cpu", torch.int32)
        if reading.watch == "mass":
            beside = ragged.dense_partial(call.query, call.key, call.value, call.mask, call.scale)
            scores = rule.products(call.query[:, :, 0], recalled.store.whole()[0], call.scale)
            taken = read.mask(recalled, heads)
            share = rule.mass(scores, taken, recalled.real, beside[1][:, :, 0])
            step.mass[self.index] = share.mean(dim=1).tolist()

    def put_away(
        self, keys: Tensor, values: Tensor, text: Text, recalled: Recalled, columns: int
    ) -> None:
        """Hold a prompt otherwise.

        Args:
            keys: [B, H, R, D] of its text, and of the prompts' before it.
            values: [B, H, R, Dv] likewise.
            text: where these stand.
            recalled: the visual tokens.
            columns: of the prompts so far.
        """
        device = self.keys.device
        self.keys, self.values, self._room = keys.to(device), values.to(device), None
        self.text, self.prefix, self.start = text.to(device), recalled.to(device), columns

    def prefix_nbytes(self) -> int:
        """Bytes of visual tokens and sketches on the device, bookkeeping included."""
        if self.prefix is None or self.text is None:
            return 0
        small = (self.text.columns, self.text.real, self.alike)
        own = sum(int(one.nbytes) for one in small if one is not None)
        return own + int(self.prefix.device_bytes + self.prefix.small_bytes)

    def host_nbytes(self) -> int:
        """Bytes of visual tokens in host memory."""
        return 0 if self.prefix is None else int(self.prefix.host_bytes)

    def crop_prefix(self, length: int) -> None:
        """Keep of text and visual tokens what stands before a column."""
        assert self.text is not None
        stays = (self.text.columns >= 0) & (self.text.columns < length)
        most = int(stays.sum(dim=1).max())
        # What stays comes last, in its order.
        places = stays.long().sort(dim=1, stable=True).indices[:, stays.shape[1] - most :]
        real = stays.gather(1, places)
        at = places[:, None, :, None]
        self.put_away(
            self.keys[:, :, : self.text.length].gather(2, _wide(at, self.keys)),
            self.values[:, :, : self.text.length].gather(2, _wide(at, self.values)),
            Text(
                self.text.columns.gather(1, places).masked_fill(~real, -1),
                None if bool(real.all()) else real,
            ),
            self.prefix.before(length),
            length,
        )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.text = self.alike = None

    def take_samples(self, rows: Tensor) -> None:
        """Text and visual tokens of some samples."""
        self._room = None
        if self.text is None or self.prefix is None:
            return
        self.text = self.text.select(rows.to(self.text.columns.device))
        alike = self.alike
        if alike is not None:
            rows = rows.to(alike.device)
            self.alike = alike[rows]
            if torch.equal(self.alike, alike):
                # Beams of one sample changed places, all of which hold the same prompt.
                return
        self.prefix = self.prefix.select(rows)

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        if self.text is not None:
            self.text = self.text.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> RecallLayer:
        """A copy; what never changes is shared."""
        import copy

        out = type(self).__new__(type(self))
        memo[id(self)] = out
        shared = {"prefix", "text", "alike"}
        vars(out).update(
            {k: v if k in shared else copy.deepcopy(v, memo) for k, v in vars(self).items()}
        )
        return out


def _wide(at: Tensor, states: Tensor) -> Tensor:
    """An index [B, 1, n, 1] for all heads and channels of states [B, H, C, D]."""
    return at.expand(-1, states.shape[1], -1, states.shape[3])
