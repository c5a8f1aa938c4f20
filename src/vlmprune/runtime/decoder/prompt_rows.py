"""The rows of one prompt while a forward runs over it: what a method sees, and which it keeps."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.runtime.decoder import rows as ops
from vlmprune.runtime.decoder.missing_rows import MissingRows
from vlmprune.runtime.decoder.rows import Going
from vlmprune.views import Ask, FrameView, Routed, Rows, RowView


class PromptRows:
    """The new columns of a prompt while a forward runs over them.

    Attributes:
        length: columns of the forward; those behind the prompt are text that goes on.
        going: the rows that reach the present layer; None while all do.
        rate: [B, X] bool; the text tokens whose attention counts; None before they are known.
    """

    def __init__(self, missing: MissingRows, batch: int, length: int, start: int) -> None:
        """Prepare a forward.

        Args:
            missing: the prompt.
            batch: rows of the forward, a multiple of the prompt's.
            length: its columns.
            start: columns that a cache holds before them.
        """
        self.missing, self.length, self.start = missing, length, start
        columns = missing.real.shape[1] - start
        if not 0 < columns <= length:
            raise VlmpruneError(
                f"a prompt of {columns} new columns came in parts, of which {missing.method!r} "
                "cannot make a choice; pass it whole."
            )
        self.times = batch // missing.real.shape[0]
        self.real = self.aligned(missing.real, True)
        self.images = images = self.aligned(missing.visual.images, -1)
        self.prompt = self.real.clone()
        self.prompt[:, columns:] = False
        self.before = missing.visual.counts.repeat_interleave(self.times, dim=0)
        self.longest = missing.visual.longest
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

    def view(
        self, hidden: Tensor, depth: int, attention: Tensor | None, keys: Tensor | None
    ) -> RowView:
        """What a method sees where tokens may leave.

        Args:
            hidden: [B, R, D] states of the present rows.
            depth: number of decoder layers.
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
            depth=depth,
        )

    def frame_view(self, hidden: Tensor) -> FrameView:
        """What a method sees of states [B, L, D] where tokens may skip a layer."""
        return FrameView(ops.gather_rows(hidden, self.frames.places), *self.frames.numbers)

    def leave(self, layer: int, found: Rows | None, hidden: Tensor) -> tuple[Tensor, bool]:
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
        if found.states is not None:
            hidden = _replaced(hidden, places, kept, found.states)
        packed = self._packed(places, there, kept, anew=found.last is not None)
        if packed is None:
            return hidden, False
        going, order = packed
        if found.last is not None:
            last = torch.zeros_like(self.reach)
            last.scatter_(1, places, found.last.to(places.device) & kept)
            images = images.gather(1, order).masked_fill(~going.real, -1)
            moved = ops.behind(images, last.gather(1, order) & going.real)
            going, order = going.moved(moved, self.length), order.gather(1, moved)
        columns = self.source.gather(1, places)
        self._go(layer, going)
        if found.members is not None and not self.missing.done:
            self.missing.into[layer] = self._joined(columns, found.members, there)
        return ops.gather_rows(hidden, order), True

    def skip(self, layer: int, found: Routed, hidden: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """Let a layer work on what a method keeps; all rows are there before it, and after.

        Args:
            layer: which.
            found: the method's choice.
            hidden: [B, L, D] states of all rows.

        Returns:
            The states of the rows that it works on; [B, R] factors of what it adds to them, not a
            number for text, or None for 1 everywhere; and whether they are not all rows.
        """
        frames = self.frames
        kept = found.kept.to(self.real.device) & frames.there
        weight = None if found.weight is None else frames.of_columns(found.weight)
        packed = self._packed(frames.places, frames.there, kept)
        if packed is None:
            return hidden, weight, False
        going, order = packed
        self._go(layer, going)
        if weight is not None:
            weight = weight.gather(1, order.to(weight.device))
        return ops.gather_rows(hidden, order), weight, True

    @cached_property
    def frames(self) -> FrameColumns:
        """The visual tokens by frame, the same for all layers."""
        return FrameColumns(self.aligned(self.missing.visual.frames, -1), self.longest)

    def _packed(
        self, places: Tensor, there: Tensor, kept: Tensor, anew: bool = False
    ) -> tuple[Going, Tensor] | None:
        """The rows of which a method keeps the visual tokens `kept`, as `ops.pack` returns them.

        Args:
            places: [B, V] present rows of the visual tokens, where `there`.
            there: [B, V] bool.
            kept: [B, V] bool.
            anew: whether they are wanted where none goes, too.

        Returns:
            None where none goes.
        """
        keep = self.reach.gather(1, places)
        keep = self.reach.scatter(1, places, torch.where(there, kept, keep))
        if not anew and bool((keep == self.reach).all()):
            return None
        slot = self.source if self.going is None else self.going.slot
        return ops.pack(self.source, slot, keep, self.length)

    def _go(self, layer: int, going: Going) -> None:
        """Note the rows that a layer works on."""
        self.going = going
        if not self.missing.done:
            self.missing.kept[layer] = self._reached(going)

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

    def _reached(self, going: Going) -> Tensor:
        """[B, S] bool; visual tokens among the columns of the prompt that go on."""
        reached = torch.zeros(self.real.numel(), dtype=torch.bool, device=self.real.device)
        reached[going.flat] = True
        reached = reached.view(self.real.shape) & (self.images >= 0)
        columns = self.missing.real.shape[1] - self.start
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
        new = self.missing.real.shape[1] - self.start
        return nn.functional.pad(into[:, :new], (self.start, 0), value=-1)[:: self.times]


class FrameColumns:
    """The visual tokens of a forward by frame.

    Attributes:
        places: [B, V] int64 columns of each sample's visual tokens, then of others.
        there: [B, V] bool; which of them are visual tokens.
        numbers: [B, V] int64 their frames, -1 where not `there`; and [B, F] int64 how many each
            frame has.
    """

    def __init__(self, frames: Tensor, longest: int) -> None:
        """Sort them.

        Args:
            frames: [B, L] int64 frame of each column, -1 where it is no visual token.
            longest: the largest number of visual tokens of a row.
        """
        self.places, self.there = ops.visual_places(frames >= 0, longest)
        found = frames.gather(1, self.places)
        self.numbers = found, ops.image_counts(found, int(frames.max()) + 1)
        self.shape = frames.shape

    def of_columns(self, weight: Tensor) -> Tensor:
        """[B, L] weights of all columns, from those [B, V] of the visual tokens.

        Text has not a number, which is told apart from every weight and never enters a sum.
        """
        there, places = self.there.to(weight.device), self.places.to(weight.device)
        text = weight.new_full(self.shape, torch.nan)
        return text.scatter(1, places, torch.where(there, weight, torch.nan))


def _replaced(hidden: Tensor, places: Tensor, kept: Tensor, states: Tensor) -> Tensor:
    """States [B, R, D] with those of the kept visual tokens [B, V] replaced."""
    rows = torch.arange(hidden.shape[1], device=places.device).expand(hidden.shape[:2]).clone()
    count = hidden.shape[1]
    at = torch.arange(places.shape[1], device=places.device) + count
    rows.scatter_(1, places, torch.where(kept, at, places))
    return ops.gather_rows(torch.cat((hidden, states.to(hidden)), dim=1), rows)
