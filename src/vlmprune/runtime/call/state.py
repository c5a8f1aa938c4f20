"""One call under way: what the host's own methods ask for meanwhile, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import caches, contract
from vlmprune.hosts.contract import broken, checks
from vlmprune.hosts.generation import WholePrompt
from vlmprune.hosts.requests import FORWARD, ModelCall
from vlmprune.report import Report
from vlmprune.runtime.decoder.missing_rows import MissingRows
from vlmprune.runtime.decoder.prompt_end import PromptEnd
from vlmprune.runtime.encoder.pruned import Pruned
from vlmprune.runtime.scope import Scope


@dataclass
class Progress:
    """How far a call has come.

    Attributes:
        positions: [B, S] or [3 or 4, B, S] of the prompt's new columns, as they were handed to the
            host; None where nothing is to be compared.
        following: [B] the position after the prompt, as the host's forward counts it, or [3, B].
        columns: of the prompt, those of a cache included.
        ids: [B, S] the prompt's new columns.
        taken: names of the host's methods whose pruned features were taken.
        cache: the cache that the prompt fills; None before it is known, and without one.
        length: columns that it has seen.
        begun: whether the prompt was run.
        ahead: [B, 1] how far a host that counts by itself is ahead of what is due, by padding.
    """

    positions: Tensor | None = None
    following: Tensor | None = None
    columns: int = 0
    ids: Tensor | None = None
    taken: set[str] = field(default_factory=set)
    cache: Any = None
    length: int = 0
    begun: bool = False
    ahead: Tensor | int = 0

    def is_own(self, call: ModelCall) -> bool:
        """Whether a forward is one of the call's, and not one that somebody makes meanwhile.

        A streamer, or a logits processor, may run the model on something else.
        """
        cache, ids = call.cache, call.ids
        if self.begun:
            # Without a cache each forward reads all anew, and nothing tells them apart.
            return self.cache is None or (
                cache is not None
                and (cache is self.cache or caches.length_of(cache) == self.length > 0)
            )
        if ids is None or self.ids is None:
            return True
        rows, width = ids.shape
        times = max(1, rows // len(self.ids))
        due = self.ids[:, :width].repeat_interleave(times, dim=0).to(ids.device)
        return due.shape == ids.shape and torch.equal(due, ids)

    def check_end(self, model: Any, columns: int) -> None:
        """Refuse an answer that was not made from the cache that the prompt filled.

        Args:
            model: the host.
            columns: of the prompt and the answer, less the last, which no step has read.

        Raises:
            ContractError: the cache was not continued.
        """
        if self.cache is None or not contract.checks():
            return
        if caches.counts_on_device(self.cache):
            self.length = caches.length_of(self.cache)
        if self.length < columns:
            raise broken(
                model,
                f"decoding left the cache that the prompt filled at {self.length} columns, where "
                f"{columns} are due",
            )


@dataclass
class Active(Scope):
    """One pruned call under way.

    Attributes:
        pruned: encoder outputs by the name of the host's method; empty where the host encodes.
        last: [B] position of each row's last prompt column, as the host's forward counts it.
        drift: [B] to add to later positions where a row's last columns were dropped, or [3, B]
            where the model has three positions a column; None if 0.
        gapped: whether positions have gaps, which must not be taken for packing.
        items: number of images and videos that are new in it.
        cut: what becomes of the cache at the prompt's end; None for nothing.
        numbers: for each row, the number of each kept visual token among all that it brought.
        batch: rows of the request.
        rows: of the forward that is under way; None before the first.
        columns: of the prompt, those of the cache included.
        missing: the rows that decoder layers are to lack; None for none.
        report: of the call so far; the attachment's may be another thread's by now.
        progress: how far it has come at the host.
        whole: the prompt as the user gave it, for what `generate` shows it to.
        entrance: what the language model is to begin with, where placeholders alone are known
            (`entrance.Entrance`); None where the host makes it.
    """

    pruned: dict[str, Pruned]
    last: Tensor
    drift: Tensor | None
    gapped: bool
    items: int = 0
    cut: PromptEnd | None = None
    numbers: list[Tensor] = field(default_factory=list)
    batch: int = 1
    rows: int | None = None
    columns: int = 0
    missing: MissingRows | None = None
    report: Report | None = None
    progress: Progress = field(default_factory=Progress)
    whole: WholePrompt | None = None
    entrance: Any = None

    def passes(self, shadow: Any) -> bool:
        """Whether it is the host's own call: of a method below one of the same name."""
        if shadow in self.under_way:
            return False
        return any(
            one.name == shadow.name and (shadow.inner or not one.inner) for one in self.under_way
        )

    @property
    def steps(self) -> bool:
        """Whether a forward for it would be a step of its own, as none is under way."""
        return not any(one.name == FORWARD for one in self.under_way)

    @property
    def times(self) -> int:
        """How often each row of the request stands in the forward that is under way."""
        return max(1, (self.rows or self.batch) // self.batch)

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
        unfinished = [one for one in (self.cut, self.missing) if one and not one.done]
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
