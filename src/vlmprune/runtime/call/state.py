"""One call under way: what the host's own methods ask for meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune.hosts import outputs
from vlmprune.hosts.contract import broken, checks
from vlmprune.hosts.families.media import Medium
from vlmprune.runtime.call.progress import Progress

if TYPE_CHECKING:
    from vlmprune.pruner.handle import Handle
    from vlmprune.report import Report
    from vlmprune.runtime.decoder.cache_cut import Retaining
    from vlmprune.runtime.decoder.dropping import Dropping


@dataclass(frozen=True)
class Pruned:
    """One modality's encoder output, with fewer visual tokens.

    Attributes:
        medium: the modality.
        output: what the host's own method returned, for its class and other fields; None where
            the features were stored.
        features: [k, D] kept visual tokens of each item, in the order of encoding.
        extra: the same for later layers, layer by layer.
        rows: items of each row of the batch.
        flat: whether the host has the items of `extra` as one tensor a layer.
        order: for each item, which of its kept tokens in their order stands at each place; None
            as they lie in it.
        cls: the class of outputs where the features were stored.
    """

    medium: Medium
    output: Any
    features: list[Tensor]
    extra: list[list[Tensor]]
    rows: list[int]
    flat: bool = False
    order: list[Tensor] | None = None
    cls: type = outputs.ENCODED

    def listed(self) -> Any:
        """The output with a list of items, which `generate` can repeat for beams."""
        return self._made(list(self.features), [list(layer) for layer in self.extra])

    def formed(self, times: int) -> Any:
        """The output as the host's forward wants it, each row's items `times` times."""
        order = self._repeated_items(times)
        features = [self.features[i] for i in order]
        extra = [[layer[i] for i in order] for layer in self.extra]
        return self.medium.form(self._made(features, extra, whole=True))

    def rows_of(self, times: int) -> Tensor:
        """[n, D] the visual tokens of all rows of a batch, each row `times` times."""
        return torch.cat([self.features[i] for i in self._repeated_items(times)])

    def _repeated_items(self, times: int) -> list[int]:
        """Numbers of the items, each row's `times` times."""
        order, start = list[int](), 0
        for count in self.rows:
            order += list(range(start, start + count)) * times
            start += count
        return order

    def repeated(self, ahead: Any, times: int) -> Any:
        """What `generate` made of `listed`, as the host's forward wants it.

        Some releases repeat the items of a row one by one where they should repeat the rows.

        Args:
            ahead: of it, all items, or those of a chunk of the prompt.
            times: how often each row stands in the batch.
        """
        held = outputs.tokens_of(ahead)
        whole = [len(one) for one in self.features] * times
        if times > 1 and isinstance(held, list | tuple) and sum(map(len, held)) == sum(whole):
            return self.formed(times)
        return self.medium.form(ahead)

    def _made(self, features: list[Tensor], extra: list[list[Tensor]], whole: bool = False) -> Any:
        # As the host has them: older releases do not part the items.
        deep: list[Any] = [torch.cat(e) for e in extra] if self.flat else extra
        return outputs.encoded(self.output, self.cls, features, deep, whole)


@dataclass
class Active:
    """One call under way.

    Attributes:
        handle: the attachment that made it.
        pruned: encoder outputs by the name of the host's method; empty where the host encodes.
        last: [B] position of each row's last prompt column, as the host's forward counts it.
        drift: [B] to add to later positions where a row's last columns were dropped, or [3, B]
            where the model has three positions a column; None if 0.
        gapped: whether positions have gaps, which must not be taken for packing.
        items: number of images and videos that are new in it.
        retaining: what is to be cut out of the cache; None for nothing.
        batch: rows of the request.
        running: rows of the forward that is under way; None before the first.
        numbers: for each row, the number of each kept visual token among all that it brought.
        columns: of the prompt, those of the cache included.
        dropping: what is to be dropped between decoder layers; None for nothing.
        report: of the call so far; the handle's may be another thread's by now.
        progress: how far it has come at the host.
    """

    handle: Handle
    pruned: dict[str, Pruned]
    last: Tensor
    drift: Tensor | None
    gapped: bool
    items: int = 0
    retaining: Retaining | None = None
    numbers: list[Tensor] = field(default_factory=list)
    batch: int = 1
    running: int | None = None
    columns: int = 0
    dropping: Dropping | None = None
    report: Report | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def times(self) -> int:
        """How often each row of the request stands in the forward that is under way."""
        return max(1, (self.running or self.batch) // self.batch)

    def check_end(self, model: Any, columns: int) -> None:
        """Refuse an answer whose prompt was not cut, or was not gone on from, as is due.

        Args:
            model: the host.
            columns: of the prompt and the answer, less the last, which no step has read.

        Raises:
            ContractError: it was not.
        """
        if not checks() or columns < self.progress.columns:
            return
        if not self.progress.begun:
            raise broken(model, "its generate never read the prompt that it was given")
        unfinished = [one for one in (self.retaining, self.dropping) if one and not one.done]
        if unfinished:
            raise broken(model, "its forward never read the whole prompt into its cache")
        self.progress.check_end(model, columns)

    def drifted(self, positions: Tensor, start: int) -> Tensor:
        """[3 or 4, B, L] positions with those behind the prompt moved.

        They need not be larger than the prompt's: a long video reaches further in time than the
        text behind it. So columns are counted.

        Args:
            positions: as the host hands them on.
            start: number of columns before them.
        """
        assert self.drift is not None
        columns = torch.arange(positions.shape[-1], device=positions.device) + start
        drift = self.drift.repeat_interleave(positions.shape[1] // self.drift.shape[1], dim=1)
        moved = positions.clone()
        moved[-3:] += drift[..., None].to(positions.device) * (columns >= self.columns)
        return moved


active: ContextVar[Active | None] = ContextVar("vlmprune_active", default=None)
# The report that this thread made last.
made: ContextVar[Report | None] = ContextVar("vlmprune_made", default=None)


@contextmanager
def outside() -> Iterator[None]:
    """Outside of any pruned call inside the block.

    A method of the host's may call another, whose shadow must not give what an outer call has
    pruned; and a call within a call is one of its own.
    """
    token = active.set(None)
    try:
        yield
    finally:
        active.reset(token)
