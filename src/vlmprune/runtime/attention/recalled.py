"""The visual tokens that a layer reads a few of at each step: their store, and what is read by.

Keys and values lie on the device of the computation or in host memory: pinned where that is a GPU,
in a mapped file where it is the CPU. The sketch of the keys is on the device.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.select import recall
from vlmprune.select.recall import Groups
from vlmprune.select.sketch import BITS, Kind, Sketch
from vlmprune.views.settings import Place, Rest


@dataclass(frozen=True, eq=False)
class Store:
    """Keys and values in full, of which a few are fetched at a time.

    Attributes:
        keys: [B, H, V, D].
        values: [B, H, V, Dv].
        place: where they lie.
        device: where what is fetched is wanted.
    """

    keys: Tensor
    values: Tensor
    place: Place
    device: torch.device

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, place: Place, device: torch.device) -> Store:
        """Put keys and values where they are to lie.

        Raises:
            VlmpruneError: there is no room for a file.
        """
        if place == "host":
            keys, values = _on_host(keys, device), _on_host(values, device)
        return cls(keys, values, place, device)

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Some tokens of each head, on the device of the computation.

        Args:
            index: [B, H, k] int64.

        Returns:
            Keys [B, H, k, D] and values [B, H, k, Dv].
        """
        keys, values = self.rows(self.places(index))
        return keys.view(*index.shape, -1), values.view(*index.shape, -1)

    def places(self, index: Tensor) -> Tensor:
        """[B · H, k] int64: tokens [B, H, k] of each head as rows of all heads'."""
        count, tokens = index.shape[0] * index.shape[1], self.keys.shape[2]
        first = torch.arange(count, device=index.device)[:, None] * tokens
        return index.flatten(0, 1) + first

    def rows(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, k, D] and values [n, k, Dv] of rows [n, k], on the device of the computation."""
        flat = places.flatten().to(self.keys.device)

        def some(states: Tensor) -> Tensor:
            # What lies as it was filled is a matrix of rows; other states are copied whole first.
            found = states.reshape(-1, states.shape[3]).index_select(0, flat)
            return found.view(*places.shape, -1).to(self.device, non_blocking=True)

        return some(self.keys), some(self.values)

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values, on the device of the computation."""
        return (
            self.keys.to(self.device, non_blocking=True),
            self.values.to(self.device, non_blocking=True),
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        return (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return int(self.keys.nbytes + self.values.nbytes)

    def select(self, rows: Tensor) -> Store:
        """The samples at `rows` [B'], in their order."""
        at = rows.to(self.keys.device)
        keys, values = self.keys.index_select(0, at), self.values.index_select(0, at)
        return Store.of(keys, values, self.place, self.device)

    def to(self, device: torch.device, non_blocking: bool = False) -> Store:
        """The same, read from another device; what lies on the host stays there."""
        if self.place == "host":
            return replace(self, device=device)
        keys = self.keys.to(device, non_blocking=non_blocking)
        return Store(keys, self.values.to(device, non_blocking=non_blocking), self.place, device)

    def __reduce__(self) -> Any:
        # A copy of a mapped file would be memory like any other.
        return Store.of, (self.keys, self.values, self.place, self.device)


@dataclass(frozen=True, eq=False)
class Recalled:
    """The visual tokens of a layer's prompts.

    Attributes:
        store: their keys and values in full.
        sketch: of the keys; None where the keys themselves are scored, or nothing is.
        images: [B, V] int64; image of each token within its sample, -1 where a sample has fewer.
        columns: [B, V] int64; column of each token.
        tokens: [B, I] int64; visual tokens of each image.
        keep: [B, I] int64; how many of them each KV head reads at a step, unless all are read.
        aside: whether all are read, since to choose among so few would take longer.
        total: [B, H, Dv] float32; the sum of all values, for the mean of what a step does not read;
            None where nothing stands for that.
    """

    store: Store
    sketch: Sketch | None
    images: Tensor
    columns: Tensor
    tokens: Tensor
    keep: Tensor
    aside: bool = False
    total: Tensor | None = None

    @classmethod
    def of(
        cls,
        keys: Tensor,
        values: Tensor,
        images: Tensor,
        columns: Tensor,
        tokens: Tensor,
        keep: Tensor,
        kind: Kind,
        place: Place,
        rest: Rest = "none",
        may_step_aside: bool = False,
    ) -> Recalled:
        """Store and sketch keys [B, H, V, D] and values [B, H, V, Dv]; the rest as above.

        Args:
            keys: on the device of the computation, as the values are.
            values: likewise.
            images: as above.
            columns: as above.
            tokens: as above.
            keep: as above.
            kind: of the sketch.
            place: where keys and values are to lie.
            rest: what stands for tokens that a step does not read.
            may_step_aside: read all on the CPU where `recall.pays` says that it is faster.

        Raises:
            VlmpruneError: there is no room for a file.
        """
        device = keys.device
        sketch, aside = None, False
        choosing = bool((keep < tokens).any())
        if choosing and may_step_aside and device.type == "cpu":
            batch, heads, _, width = keys.shape
            given, read = (int(counted.sum()) / batch for counted in (tokens, keep))
            width += values.shape[3]
            aside = not recall.pays(given, read, batch * heads, width, recall.SCORING[kind])
        if kind != "exact" and choosing and not aside:
            sketch = Sketch.of(keys, images >= 0, BITS[kind]).to(device)
        stands = rest == "mean" and choosing and not aside
        total = _sum(values, images >= 0) if stands else None
        store = Store.of(keys.contiguous(), values.contiguous(), place, device)
        return cls(store, sketch, images, columns, tokens, keep, aside, total)

    @cached_property
    def real(self) -> Tensor:
        """[B, V] bool; where there is a token."""
        return self.images >= 0

    @cached_property
    def full(self) -> bool:
        """Whether there is a token everywhere."""
        return bool(self.real.all())

    @cached_property
    def all_read(self) -> bool:
        """Whether each step reads everything."""
        return self.aside or bool((self.keep == self.tokens).all())

    @cached_property
    def unread(self) -> Tensor:
        """[B] int64; visual tokens of a sample that a KV head does not read at a step."""
        return (self.tokens - self.keep).sum(dim=1)

    @cached_property
    def groups(self) -> Groups:
        """Where the tokens of each image stand, for a choice among each alone."""
        return Groups.of(self.images, self.tokens, self.keep)

    def scores(self, query: Tensor, scale: float) -> Tensor:
        """Guessed scaled products [B, Hq, V] float32 of a step's queries [B, Hq, D]."""
        if self.sketch is None:
            return recall.products(query, self.store.whole()[0], scale)
        return self.sketch.scores(query, scale)

    @property
    def device_bytes(self) -> int:
        """Bytes that lie on the device of the computation."""
        own = 0 if self.store.place == "host" else self.store.nbytes
        return own + self.scored_bytes

    @property
    def scored_bytes(self) -> int:
        """Bytes of the sketch and of the sum of values, where there are such."""
        parts = (self.sketch, self.total)
        return sum(int(one.nbytes) for one in parts if one is not None)

    @property
    def host_bytes(self) -> int:
        """Bytes that lie in host memory instead."""
        return self.store.nbytes if self.store.place == "host" else 0

    @property
    def small_bytes(self) -> int:
        """Bytes of what tells the tokens apart."""
        return sum(int(t.nbytes) for t in (self.images, self.columns, self.tokens, self.keep))

    @cached_property
    def bytes_dense(self) -> int:
        """Bytes of the keys and values of all tokens, padding left out."""
        return int(self.tokens.sum()) * self.store.keys.shape[1] * self.store.token_bytes

    @cached_property
    def bytes_read(self) -> int:
        """Bytes that a step reads: what is scored, and keys and values of what is chosen."""
        if self.all_read:
            return self.bytes_dense
        found = int(self.keep.sum()) * self.store.keys.shape[1] * self.store.token_bytes
        if self.sketch is None:
            found += int(self.store.keys.nbytes)
        return found + self.scored_bytes

    @cached_property
    def bytes_fetched(self) -> int:
        """Bytes that a step moves from host memory to the device of the computation."""
        if self.store.place == "device":
            return 0
        tokens = self.tokens if self.all_read else self.keep
        return int(tokens.sum()) * self.store.keys.shape[1] * self.store.token_bytes

    def before(self, column: int) -> Recalled:
        """The tokens that stand before a column; how many are read of an image is not more."""
        stays = self.real & (self.columns < column)
        images = self.images.masked_fill(~stays, -1)
        count = torch.arange(self.tokens.shape[1], device=images.device)
        tokens = (images[..., None] == count).sum(dim=1)
        keep = self.keep.minimum(tokens)
        total = None if self.total is None else _sum(self.store.whole()[1], stays)
        return replace(self, images=images, tokens=tokens, keep=keep, total=total)

    def select(self, rows: Tensor) -> Recalled:
        """The samples at `rows` [B'], in their order."""
        return self._each(lambda one: one.select(rows), lambda t: t[rows.to(t.device)])

    def to(self, device: torch.device, non_blocking: bool = False) -> Recalled:
        """The same, read from another device."""
        return self._each(
            lambda one: one.to(device, non_blocking),
            lambda t: t.to(device, non_blocking=non_blocking),
        )

    def _each(self, parts: Callable[[Any], Any], small: Callable[[Tensor], Tensor]) -> Recalled:
        return replace(
            self,
            store=parts(self.store),
            sketch=None if self.sketch is None else parts(self.sketch),
            images=small(self.images),
            columns=small(self.columns),
            tokens=small(self.tokens),
            keep=small(self.keep),
            total=None if self.total is None else small(self.total),
        )


def _sum(values: Tensor, real: Tensor) -> Tensor:
    """[B, H, Dv] float32; of values [B, H, V, Dv] where there is a token, by [B, V]."""
    return torch.einsum("bhvd,bv->bhd", values.float(), real.float())


def _on_host(states: Tensor, device: torch.device) -> Tensor:
    """A copy in host memory, from which the device reads."""
    if device.type != "cpu":
        out = torch.empty(states.shape, dtype=states.dtype, pin_memory=device.type == "cuda")
        return out.copy_(states)
    if not states.numel():
        return states
    try:
        with tempfile.NamedTemporaryFile(prefix="vlmprune-recall-") as file:
            # Room is made at once: a mapped page that finds none later ends the process.
            os.posix_fallocate(file.fileno(), 0, int(states.nbytes))
            flat = torch.from_file(file.name, shared=True, size=states.numel(), dtype=states.dtype)
    except OSError as error:
        raise VlmpruneError(
            f"keys and values of {states.nbytes} bytes find no room in {tempfile.gettempdir()!r} "
            f"({error.strerror}); make room there, name another folder with TMPDIR, or use "
            'store="device".'
        ) from error
    return flat.view(states.shape).copy_(states)
