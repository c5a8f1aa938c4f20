"""One prompt under a method that drops rows between decoder layers: what it sees, what it chose."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.method import Method
from vlmprune.runtime.decoder import rows as ops
from vlmprune.runtime.decoder.rows import Going
from vlmprune.views import Ask, Rows, RowView


@dataclass
class Dropping:
    """A prompt whose visual tokens a method drops on the way through the decoder.

    Attributes:
        method: decides what goes on.
        asks: what it wants to see, by layer.
        positions: whether later layers renumber what goes on.
        real: [B, S] bool; columns of the prompt, those of a cache included, that are no padding.
        visual: [B, S] bool; the visual tokens that came with this prompt.
        lengths: visual tokens of each new image, row by row.
        numbers: for each new image, [n] the number of each of its visual tokens among those that
            it would have without any pruning.
        totals: for each new image, how many those are.
        kept: by layer at whose input rows were dropped, [B, S] bool; visual tokens that went on.
        into: by the same layers, where something was merged, [B, S] int64; the column that each
            visual token which did not go on went into, -1 for none.
        seconds: time that scores and choice took.
        done: whether the prompt is through.
    """

    method: Method
    asks: Mapping[int, Ask]
    positions: Literal["compact", "original"]
    real: Tensor
    visual: Tensor
    lengths: Sequence[Sequence[int]]
    numbers: Sequence[Tensor]
    totals: Sequence[int]
    kept: dict[int, Tensor] = field(default_factory=dict)
    into: dict[int, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    done: bool = False

    def stages(self) -> dict[int, list[Tensor]]:
        """By layer before which tokens were dropped, for each image which of them went on.

        Returns:
            [n] bools over the visual tokens that the image would have without any pruning.
        """
        out: dict[int, list[Tensor]] = {}
        for layer, kept in self.kept.items():
            goes = kept[self.visual].cpu()
            out[layer] = []
            lengths = [n for row in self.lengths for n in row]
            for numbers, part in zip(self.numbers, goes.split(lengths), strict=True):
                mask = torch.zeros(self.totals[len(out[layer])], dtype=torch.bool)
                mask[numbers] = part
                out[layer].append(mask)
        return out

    def members(self) -> list[Tensor]:
        """For each image where its visual tokens are in the end, as `Report.members` has it.

        Returns:
            [n] int64 over the visual tokens that the image would have without any pruning; no
            tensors where nothing was merged.
        """
        if not self.into:
            return []
        columns = torch.arange(self.visual.shape[1], device=self.visual.device)
        now = columns.expand(self.visual.shape)
        for layer in sorted(self.kept):
            into = self.into.get(layer)
            step = torch.where(self.kept[layer], columns, -1 if into is None else into)
            now = torch.where(now >= 0, step.gather(1, now.clamp(min=0)), -1)
        number = torch.full_like(now, -1)
        number[self.visual] = torch.cat(list(self.numbers)).to(number.device)
        found = torch.where(now >= 0, number.gather(1, now.clamp(min=0)), -1)[self.visual].cpu()
        out = []
        lengths = [n for row in self.lengths for n in row]
        parts = found.split(lengths)
        for numbers, part, total in zip(self.numbers, parts, self.totals, strict=True):
            out.append(torch.full((total,), -1).scatter(0, numbers.cpu(), part))
        return out


class PromptRows:
    """The new columns of a prompt while a forward runs over them.

    Attributes:
        length: columns of the forward; those behind the prompt are text that goes on.
        going: the rows that reach the present layer; None while all do.
        rate: [B, X] bool; the text tokens whose attention counts; None before they are known.
    """

    def __init__(self, dropping: Dropping, batch: int, length: int, start: int) -> None:
        """Prepare a forward.

        Args:
            dropping: the prompt.
            batch: rows of the forward, a multiple of the prompt's.
            length: its columns.
            start: columns that a cache holds before them.
        """
        self.dropping, self.length, self.start = dropping, length, start
        columns = dropping.real.shape[1] - start
        if not 0 < columns <= length:
            raise VlmpruneError(
                f"a prompt of {columns} new columns came in parts, of which {dropping.method!r} "
                "cannot make a choice; pass it whole."
            )
        self.times = batch // dropping.real.shape[0]
        self.real = self.aligned(dropping.real, True)
        images = self.aligned(ops.images_of(dropping.visual, dropping.lengths), -1)
        self.images = images
        self.prompt = self.real.clone()
        self.prompt[:, columns:] = False
        most = max((len(row) for row in dropping.lengths), default=0)
        self.before = ops.image_counts(images, most)
        self.longest = max(sum(row) for row in dropping.lengths)
        at = torch.arange(length, device=images.device)
        first = torch.where(images >= 0, at, length).amin(dim=1, keepdim=True)
        self.after = at > first
        # The prompt's last token, whose state makes the first new token.
        self.last = torch.where(self.prompt, at, -1).amax(dim=1, keepdim=True)
        self.words = int((self.prompt & (images < 0)).sum(dim=1).max())
        self.order = self.real.long().sort(dim=1, descending=True, stable=True).indices
        self.going: Going | None = None
        self.rate: Tensor | None = None

    def aligned(self, values: Tensor, fill: int | bool) -> Tensor:
        """[B, L] of the forward's columns, from values [B', S] of all of the prompt's."""
        more = self.length + self.start - values.shape[1]
        values = nn.functional.pad(values[:, self.start :], (0, more), value=fill)
        return values if self.times == 1 else values.repeat_interleave(self.times, dim=0)

    @property
    def source(self) -> Tensor:
        """[B, R] column of each row of the present layer."""
        if self.going is not None:
            return self.going.source
        at = torch.arange(self.length, device=self.real.device)
        return at.expand(self.real.shape)

    @property
    def reach(self) -> Tensor:
        """[B, R] bool; rows of the present layer that are no padding."""
        return self.real if self.going is None else self.going.real

    def of_rows(self, values: Tensor) -> Tensor:
        """[B, R] of [B, L]: what holds of the columns, for the rows of the present layer."""
        return values if self.going is None else values.gather(1, self.source)

    @property
    def seen(self) -> Tensor:
        """[B, R] image of each row, -1 where it is no visual token."""
        return self.of_rows(self.images).masked_fill(~self.reach, -1)

    @property
    def text(self) -> Tensor:
        """[B, R] bool; rows that are text of the prompt."""
        return self.of_rows(self.prompt) & self.reach & (self.seen < 0)

    def asked(self, ask: Ask) -> tuple[Tensor, Tensor]:
        """[B, n] rows whose attention is asked for, and which of them count."""
        if ask.queries == "raters":
            assert self.rate is not None
            places, there = ops.visual_places(self.text, self.words)
            return places, there & self.rate
        own = (self.source == self.last) & self.reach
        return own.long().argmax(dim=1, keepdim=True), own.any(dim=1, keepdim=True)

    def view(self, hidden: Tensor, attention: Tensor | None, keys: Tensor | None) -> RowView:
        """What the method sees.

        Args:
            hidden: [B, R, D] states of the present rows.
            attention: [B, R] that they receive, or None.
            keys: [B, H, R, D] or None.
        """
        images = self.seen
        most = self.before.shape[1]
        places, there = ops.visual_places(images >= 0, self.longest)
        words, text = ops.visual_places(self.text, self.words)
        flat = None if keys is None else keys.transpose(1, 2).flatten(2)
        seen = images.gather(1, places).masked_fill(~there, -1)
        return RowView(
            hidden=ops.gather_rows(hidden, places),
            images=seen,
            counts=ops.image_counts(seen, most),
            before=self.before,
            text_hidden=ops.gather_rows(hidden, words),
            text=text,
            after=self.of_rows(self.after).gather(1, words) & text,
            attention=None
            if attention is None
            else attention.gather(1, places).masked_fill(~there, 0.0),
            keys=None if flat is None else ops.gather_rows(flat, places),
            text_keys=None if flat is None else ops.gather_rows(flat, words),
        )

    def apply(self, layer: int, found: Rows | None, hidden: Tensor) -> tuple[Tensor, bool]:
        """Let go on what a method keeps.

        Args:
            layer: at whose input.
            found: the method's choice.
            hidden: [B, R, D] states of the present rows.

        Returns:
            The states of the rows that go on, and whether they are other rows than before.
        """
        if found is None:
            return hidden, False
        images = self.seen
        places, there = ops.visual_places(images >= 0, self.longest)
        kept = found.kept.to(places.device) & there
        # What makes the first new token must go all the way.
        kept |= there & (self.source == self.last).gather(1, places)
        keep = self.reach.clone()
        keep.scatter_(1, places, torch.where(there, kept, keep.gather(1, places)))
        if found.states is not None:
            hidden = _replaced(hidden, places, kept, found.states)
        if found.last is None and bool((keep == self.reach).all()):
            return hidden, False
        columns = self.source.gather(1, places)
        slot = self.source if self.going is None else self.going.slot
        going, order = ops.pack(self.source, slot, keep, self.length)
        if found.last is not None:
            last = torch.zeros_like(keep)
            last.scatter_(1, places, found.last.to(places.device) & kept)
            images = images.gather(1, order).masked_fill(~going.real, -1)
            moved = ops.behind(images, last.gather(1, order) & going.real)
            going, order = going.moved(moved, self.length), order.gather(1, moved)
        self.going = going
        if not self.dropping.done:
            self.dropping.kept[layer] = self.reached(going)
            if found.members is not None:
                self.dropping.into[layer] = self._joined(columns, found.members, there)
        return ops.gather_rows(hidden, order), True

    def renumbered(self, positions: Tensor, compact: bool) -> tuple[Tensor, Tensor | None]:
        """Positions of the rows of the present layer.

        Args:
            positions: [B or 1, L] as the host counts them.
            compact: whether row i takes the position of the i-th real column.

        Returns:
            [B, R], and [B] by how much later ones are lower from now on; None for not at all.
        """
        assert self.going is not None
        device = positions.device
        positions = positions.expand(self.real.shape)
        if not compact:
            return positions.gather(1, self.going.source.to(device)), None
        real, order = self.going.real.to(device), self.order.to(device)
        rank = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        new = positions.gather(1, order.gather(1, rank))
        total = self.real.to(device).sum(dim=1, keepdim=True)
        ends = [
            positions.gather(1, order.gather(1, (n - 1).clamp(min=0)))[:, 0]
            for n in (total, real.sum(dim=1, keepdim=True))
        ]
        return new, ends[0] - ends[1]

    def reached(self, going: Going) -> Tensor:
        """[B, S] bool; visual tokens among the columns of the prompt that go on."""
        reached = torch.zeros(self.real.numel(), dtype=torch.bool, device=self.real.device)
        reached[going.flat] = True
        reached = reached.view(self.real.shape) & (self.images >= 0)
        columns = self.dropping.real.shape[1] - self.start
        return nn.functional.pad(reached[:, :columns], (self.start, 0))[:: self.times]

    def _joined(self, columns: Tensor, members: Tensor, there: Tensor) -> Tensor:
        """[B, S] column that each visual token was merged into, -1 for none.

        Args:
            columns: [B, V] of the visual tokens, where `there`.
            members: [B, V] as in `Rows`.
            there: [B, V] bool.
        """
        members = members.to(columns.device)
        target = columns.gather(1, members.clamp(min=0))
        target = torch.where((members >= 0) & there, target + self.start, -1)
        # One more column at the end takes what is no visual token.
        into = torch.full((len(columns), self.length + 1), -1, device=columns.device)
        into.scatter_(1, torch.where(there, columns, self.length), target)
        new = self.dropping.real.shape[1] - self.start
        return nn.functional.pad(into[:, :new], (self.start, 0), value=-1)[:: self.times]


def _replaced(hidden: Tensor, places: Tensor, kept: Tensor, states: Tensor) -> Tensor:
    """States [B, R, D] with those of the kept visual tokens [B, V] replaced."""
    rows = torch.arange(hidden.shape[1], device=places.device).expand(hidden.shape[:2]).clone()
    count = hidden.shape[1]
    at = torch.arange(places.shape[1], device=places.device) + count
    rows.scatter_(1, places, torch.where(kept, at, places))
    return ops.gather_rows(torch.cat((hidden, states.to(hidden)), dim=1), rows)


class Timer:
    """Adds up the time that a block takes on a device."""

    def __init__(self, dropping: Dropping, like: Tensor) -> None:
        self.dropping, self.like = dropping, like

    def __enter__(self) -> None:
        _synchronize(self.like)
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        _synchronize(self.like)
        self.dropping.seconds += time.perf_counter() - self.begin


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
