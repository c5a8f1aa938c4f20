"""The language model of a pruned call is given what entered that of the whole request.

For models of which placeholders alone are known: the host runs on the shorter ids, without pixels,
and what its language model begins with is put right there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches, contract, decoder
from vlmprune.hosts.contract import broken
from vlmprune.hosts.entrance import EntranceCall, whole_forward
from vlmprune.hosts.requests import FORWARD, ModelCall
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.call.plan import Plan
from vlmprune.runtime.call.shorten import Prompt
from vlmprune.runtime.encoder.encode import Encoded
from vlmprune.runtime.encoder.entered import Entered, entered, view_of
from vlmprune.runtime.hooks import Hooks
from vlmprune.runtime.scope import Scope, under


@dataclass
class Entrance:
    """What the language model of a pruned call begins with.

    Attributes:
        before: columns that the cache held.
        real: [B, S] bool; new columns that are no padding.
        embedded: [B, S, D] of them; None where they hold no image.
        positions: [3 or more, B, S]; None where the model counts by itself.
        following: [3 or more, B] the position behind them; None likewise.
        whole: what the language model of the whole request was given; None without an image.
    """

    before: int
    real: Tensor
    embedded: Tensor | None
    positions: Tensor | None
    following: Tensor | None
    whole: EntranceCall | None

    def placed(self, own: Tensor | None, width: int, start: int, times: int) -> Tensor:
        """[3 or more, N, width] positions of a forward that begins at a column of the cache.

        Args:
            own: those that the host has for it. Before those of the axes it may have one more,
                which counts columns.
            width: columns.
            start: columns that the cache holds.
            times: how often each row stands in the batch.
        """
        assert self.positions is not None and self.following is not None
        columns = torch.arange(start - self.before, start - self.before + width)
        columns = columns.to(self.positions.device)
        length = self.positions.shape[-1]
        known = self.positions[..., columns.clamp(max=length - 1)]
        ahead = self.following[..., None] + (columns - length)
        due = torch.where(columns < length, known, ahead).repeat_interleave(times, dim=1)
        if own is not None and own.ndim == 3 and len(own) == len(due) + 1:
            return torch.cat((own[:1], due.to(own)))
        return due


def seen(attachment: Attachment, plan: Plan) -> Encoded:
    """What enters the language model of a whole request, as a method sees it.

    Raises:
        VlmpruneError: the request goes on from a cache.
    """
    call = plan.asked.call
    if plan.known:
        raise VlmpruneError(
            f"{type(attachment.model).__name__} is in no record, so images in a later turn cannot "
            "be told from those that the cache holds; pass the whole conversation without a cache."
        )
    whole = whole_forward(call, plan.new.ids, plan.new.mask)
    with under(Scope(attachment)):
        found = entered(attachment.model, attachment.originals[FORWARD], whole)
    return view_of(found, plan.geometry)


def entrance_of(
    attachment: Attachment, plan: Plan, found: Entered | None, dropped: Tensor, short: Prompt
) -> Entrance | None:
    """What the language model of a shorter request is to begin with; None for nothing of ours.

    Args:
        attachment: of the method to the model.
        plan: the whole request.
        found: what enters its language model; None where it brings no image.
        dropped: [B, L] bool, the columns that were taken out.
        short: what is left.
    """
    if not attachment.family.counted or not attachment.method.shortens:
        return None
    real, kept = short.mask != 0, (plan.new.mask != 0) & ~dropped
    if found is None:
        if not decoder.turns_in_three(attachment.model):
            return None
        # Text has one position in all three.
        text = short.positions.expand(3, -1, -1)
        return Entrance(plan.cached, real, None, text, _behind(text, real, plan), None)
    embedded = found.embedded.new_zeros((*real.shape, found.embedded.shape[-1]))
    embedded[real] = found.embedded[kept]
    if found.positions is None:
        return Entrance(plan.cached, real, embedded, None, None, found.call)
    positions = found.positions.new_zeros((len(found.positions), *real.shape))
    positions[:, real] = found.positions[:, kept]
    behind = _behind(found.positions, plan.new.mask != 0, plan)
    return Entrance(plan.cached, real, embedded, positions, behind, found.call)


def _behind(positions: Tensor, real: Tensor, plan: Plan) -> Tensor:
    """[A, B] positions [A, B, L] behind the last of each row's real columns."""
    numbers = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = numbers.masked_fill(~real, -1).amax(dim=1)
    found = positions.gather(-1, last.clamp(min=0).expand(len(positions), -1)[..., None])[..., 0]
    return torch.where(last >= 0, found + 1, plan.after)


@contextmanager
def entering(attachment: Attachment, entrance: Entrance | None, call: ModelCall) -> Iterator[None]:
    """Give the language model of a forward what is due.

    Raises:
        ContractError: the host calls it otherwise than that of the whole request.
    """
    if entrance is None:
        yield
        return
    model, start = attachment.model, caches.length_of(call.cache)
    first, columns = start == entrance.before, 0
    due = attachment.ledger.due("entrance", first) and entrance.positions is not None

    def enter(module: Any, args: Any, kwargs: Any) -> Any:
        nonlocal columns
        own = EntranceCall(kwargs)
        given = own.embedded
        if given is None:
            raise broken(model, "its language model is not given an embedded prompt")
        rows, columns = given.shape[:2]
        times = max(1, rows // len(entrance.real))
        if entrance.whole is not None and first:
            missing = entrance.whole.more_than(own)
            if missing is not None and contract.checks():
                raise broken(model, f"its language model is given {missing} of images as well")
        if entrance.embedded is not None:
            own = own.with_embedded(_put(entrance, given, start - entrance.before, times))
        if entrance.positions is not None:
            own = own.with_positions(entrance.placed(own.positions, columns, start, times))
        return args, dict(own.given)

    def turned(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if entrance.positions is None:
            return
        # Of indexed attention it makes angles for all columns that there are, each time anew.
        found = decoder.RotaryCall(module, args, kwargs, output).positions[..., -columns:]
        times = max(1, found.shape[-2] // len(entrance.real))
        wanted = entrance.placed(None, columns, start, times)
        if not torch.equal(found[-len(wanted) :], wanted.to(found)):
            raise broken(model, "its decoder turns by other positions than it is given")

    with Hooks() as hooks:
        hooks.before(decoder.decoder_of(model), enter)
        if due:
            for module in decoder.rotary_modules(model):
                hooks.after(module, turned)
        yield
    if not columns:
        raise broken(model, "its language model is not called where its layers are")
    if due:
        attachment.ledger.prove("entrance", first)


def _put(entrance: Entrance, own: Tensor, first: int, times: int) -> Tensor:
    """[N, W, D] what the host embedded, with what entered the whole request in its place."""
    assert entrance.embedded is not None
    end = min(first + own.shape[1], entrance.real.shape[1])
    if end <= first:
        return own
    embedded, real = (
        t[:, first:end].repeat_interleave(times, dim=0).to(own.device)
        for t in (entrance.embedded, entrance.real)
    )
    width = end - first
    due = torch.where(real[..., None], embedded.to(own.dtype), own[:, :width])
    return torch.cat((due, own[:, width:]), dim=1)
