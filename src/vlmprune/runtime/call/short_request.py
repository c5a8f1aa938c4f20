"""The shorter request that the host is given instead, and what is due while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts.requests import ALIGNED
from vlmprune.report import Report
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.call.choose import Choice
from vlmprune.runtime.call.entrance import entrance_of
from vlmprune.runtime.call.plan import Plan
from vlmprune.runtime.call.shorten import (
    Prefix,
    Prompt,
    dropped_columns,
    join,
    latest,
    shorten,
    stands_for,
)
from vlmprune.runtime.call.state import Active, Progress
from vlmprune.runtime.decoder.cache_cut import CacheCut
from vlmprune.runtime.decoder.cache_recall import CacheRecall
from vlmprune.runtime.decoder.missing_rows import MissingRows
from vlmprune.runtime.geometry import VisualColumns


@dataclass(frozen=True)
class ShortRequest:
    """A request made shorter.

    Attributes:
        plan: what it was made of.
        choice: what was kept.
        prompt: [B, S] columns, those of the cache included.
        new: its new columns.
        pixels: the inputs that hold images, without those that the cache holds.
        prefix: to be remembered with the cache.
        state: for the host's callbacks.
        columns: [B, L] which of the new columns stands for each that the user gave; None where
            they are the same.
        dropped: [B, L] bool; of these, those that were taken out.
    """

    plan: Plan
    choice: Choice
    prompt: Prompt
    new: Prompt
    pixels: dict[str, Any]
    prefix: Prefix
    state: Active
    columns: Tensor | None = None
    dropped: Tensor | None = None


def short_request(
    attachment: Attachment, plan: Plan, choice: Choice, report: Report | None
) -> ShortRequest:
    """Take the columns of what was not kept out of a request.

    Args:
        attachment: of the method to the model.
        plan: what there is.
        choice: what is kept of it.
        report: of the call so far; None for one that brings no image.
    """
    spans = [item.span for item in plan.geometry.items]
    dropped = dropped_columns(plan.new.ids, spans, choice.kept)
    short, following = shorten(plan.new, dropped, attachment.positions, attachment.pad_id)
    entrance = entrance_of(attachment, plan, choice.entered, dropped, short)
    if entrance is not None and entrance.following is not None:
        following = entrance.following.amax(dim=0).to(following)
    # A row that brings padding alone stays where it was.
    following = torch.where((plan.new.mask != 0).any(dim=1), following, plan.after)
    prompt = join(plan.already, short)
    for name, values in short.aligned.items():
        if plan.asked.call.given[name].shape[1] == plan.known + plan.new.ids.shape[1]:
            # It came for all columns, and the host looks values up by column. Of earlier columns
            # none can matter any more.
            before = prompt.ids.shape[1] - values.shape[1]
            prompt.aligned[name] = nn.functional.pad(values, (before, 0), value=ALIGNED[name])
    prefix = plan.prefix
    shift = prefix.shift
    if attachment.positions == "compact":
        shift = shift + dropped.sum(dim=1)
    counts = tuple(
        before + len(plan.geometry.of(number)) for number, before in enumerate(prefix.items)
    )
    filled = Prefix(
        torch.cat((plan.seen, plan.new.ids), dim=1),
        prompt,
        following,
        counts,
        shift,
        whole=prefix.whole and not bool(dropped.any()),
    )
    state = _state(attachment, plan, choice, report, prompt, short, following, bool(dropped.any()))
    state.entrance = entrance
    pixels = _pixels(attachment, plan, choice)
    columns = stands_for(plan.new, dropped)
    return ShortRequest(plan, choice, prompt, short, pixels, filled, state, columns, dropped)


def handed(prompt: Prompt, columns: slice = slice(None)) -> Tensor:
    """Positions as the host takes them.

    Models with three positions a column take a fourth first, which only tells where packed
    sequences begin; it counts columns, for gaps would look like a beginning.
    """
    if prompt.positions.ndim == 2:
        return prompt.positions[:, columns]
    plain = (prompt.mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return torch.cat((plain[None], prompt.positions))[..., columns]


def _state(
    attachment: Attachment,
    plan: Plan,
    choice: Choice,
    report: Report | None,
    prompt: Prompt,
    short: Prompt,
    following: Tensor,
    gaps: bool,
) -> Active:
    """What the call knows while it runs at the host."""
    rope, first = attachment.family.rope is not None, attachment.family.first
    counted = attachment.family.counted
    last = latest(prompt)
    drift, due = following - last - 1, following
    if rope:
        # The host counts on from the last column, in each of the three by itself.
        drift = plan.new.positions[..., -1] - short.positions[..., -1]
        due = plan.new.positions[..., -1] + 1
    cut, numbers, missing = None, list[Tensor](), None
    lacking = bool(attachment.asks or attachment.skips) and bool(plan.geometry.items)
    if plan.cuts or lacking:
        columns = columns_of(attachment, plan, choice, prompt, short)
    if plan.cuts:
        act = CacheRecall if attachment.method.recalls else CacheCut
        cut, numbers = act(attachment.method, prompt.mask, columns), columns.row_numbers
    if lacking:
        missing = MissingRows(
            attachment.method.dropper,
            attachment.asks,
            attachment.skips,
            attachment.decoder_positions,
            prompt.mask != 0,
            columns,
        )
    return Active(
        attachment,
        choice.pruned,
        last + first,
        None if counted or not bool((drift != 0).any()) else drift,
        attachment.positions == "original" and not rope and gaps,
        len(plan.geometry.items),
        cut,
        numbers,
        plan.batch,
        columns=prompt.ids.shape[1],
        missing=missing,
        report=report,
        progress=Progress(
            None if counted else handed(prompt, slice(plan.cached, None)) + first,
            None if counted else due + first,
            prompt.ids.shape[1],
            prompt.ids[:, plan.cached :],
        ),
    )


def columns_of(
    attachment: Attachment, plan: Plan, choice: Choice, prompt: Prompt, short: Prompt
) -> VisualColumns:
    """The new visual tokens as the language model gets them.

    Args:
        attachment: of the method to the model.
        plan: what there was.
        choice: what is kept of it.
        prompt: all columns after pruning, those of the cache included.
        short: its new columns.
    """
    geometry, pruned = plan.geometry, choice.pruned
    # Placeholders without pixels are text to the host.
    tokens = [token for n, token in enumerate(attachment.tokens) if geometry.of(n)]
    visual = torch.zeros_like(prompt.mask, dtype=torch.bool)
    new = torch.stack([short.ids == token for token in tokens]).any(dim=0)
    visual[:, prompt.mask.shape[1] - short.mask.shape[1] :] = new & (short.mask != 0)
    numbers = [stays.nonzero()[:, 0].cpu() for stays in choice.kept]
    for number, medium in enumerate(attachment.family.media):
        order = pruned[medium.method].order if medium.method in pruned else None
        for i, places in zip(geometry.of(number), order or (), strict=bool(order)):
            numbers[i] = numbers[i][places.cpu()]
    return VisualColumns.of(geometry, visual, numbers)


def _pixels(attachment: Attachment, plan: Plan, choice: Choice) -> dict[str, Any]:
    """The inputs that hold new items, as the host is given them."""
    geometry, out = plan.geometry, dict[str, Any]()
    if attachment.family.counted:
        return out
    for number, (medium, brought) in enumerate(
        zip(attachment.family.media, plan.brought, strict=True)
    ):
        given = dict(brought)
        if given and medium.method in choice.pruned:
            own = geometry.of(number)
            layouts = [geometry.items[i].layout for i in own]
            given |= medium.left(given, layouts, [choice.kept[i] for i in own])
        out |= {name: given[name] for name in medium.inputs if name in given}
    return out
