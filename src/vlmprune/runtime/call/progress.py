"""How a pruned call goes on at the host: what it was handed, which cache it fills, what is due.

What costs nearly nothing is looked at in every call: that a prompt's features were taken, and that
decoding adds to the cache that the prompt filled. What needs tensors is looked at in an
attachment's first call alone: that the positions which are due reach the rotary angles, and that
the pruned features stand where the placeholders were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import caches, contract, decoder, release
from vlmprune.hosts.contract import broken
from vlmprune.hosts.requests import ModelCall
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.call.state import Active, Progress
from vlmprune.runtime.hooks import Hooks

# By what share an embedded visual token may differ from its feature, in float32 and in half
# precision, besides a factor that all of them have, as some hosts scale them.
_OFF = {True: 1e-4, False: 2e-2}
# Steps after the prompt whose positions are compared.
_STEPS = 2


@contextmanager
def following(attachment: Attachment, state: Active, call: ModelCall) -> Iterator[None]:
    """Follow one forward of a pruned call.

    Raises:
        ContractError: the host did not go on as is due.
    """
    progress, cache = state.progress, call.cache
    first, progress.begun = not progress.begun, True
    if not contract.checks():
        progress.cache = cache
        yield
        progress.length = caches.length_of(cache)
        return
    if first:
        progress.cache, progress.length = cache, caches.length_of(cache)
    elif cache is not progress.cache and caches.length_of(cache) == progress.length > 0:
        # A copy goes on as the original does; a nested call has a cache of another length.
        if not caches.alike(cache, progress.cache):
            raise broken(attachment.model, "a step reads another cache than the prompt filled")
        progress.cache = cache
    own = cache is not None and cache is progress.cache
    ahead = progress.length - progress.columns
    # Where it waits for a device the length is read in the first steps, and at the end.
    counted = own and (ahead < _STEPS or not caches.counts_on_device(cache))
    if counted and caches.length_of(cache) != progress.length:
        raise broken(
            attachment.model,
            f"a step begins at {caches.length_of(cache)} columns of a cache that was left at "
            f"{progress.length}",
        )
    with ExitStack() as stack:
        if first or (own and 0 <= ahead < _STEPS):
            stack.enter_context(_compared(attachment, state, call, first))
        try:
            yield
        except ValueError as error:
            # The host compares the number of features with that of placeholders.
            if first and state.pruned and release.miscounts(error):
                why = " ".join(str(error).split()).rstrip(".")
                raise broken(attachment.model, f"it refuses the shorter request ({why})") from error
            raise
    if first and not progress.taken.issuperset(state.pruned):
        left = ", ".join(sorted(state.pruned.keys() - progress.taken))
        raise broken(attachment.model, f"it makes its features otherwise than by {left}")
    if own:
        _check_grown(attachment, progress, call, counted)


def _check_grown(
    attachment: Attachment, progress: Progress, call: ModelCall, counted: bool
) -> None:
    """Refuse a cache that did not grow by a forward's columns; believed where it is not counted."""
    ids = call.ids
    assert ids is not None
    due = progress.length + ids.shape[1]
    progress.length = caches.length_of(progress.cache) if counted else due
    if progress.length != due:
        raise broken(
            attachment.model, f"its cache holds {progress.length} columns where {due} are due"
        )


@contextmanager
def _compared(
    attachment: Attachment, state: Active, call: ModelCall, first: bool
) -> Iterator[None]:
    """Compare tensors that reach the language model with those that are due, the first time."""
    progress, ledger, ids = state.progress, attachment.ledger, call.ids
    assert ids is not None
    start, several = caches.length_of(call.cache), ids.shape[0] > 1
    # Several rows may be told apart where one cannot, and so may the two modalities.
    ahead = None if first else start - progress.columns
    handed = ("positions", ahead, start > 0, several)
    inserted = ("embedded", *sorted(state.pruned), several)
    placed = ledger.due(*handed) and progress.positions is not None
    embedded = first and bool(state.pruned) and ledger.due(*inserted)
    if not placed and not embedded:
        yield
        return
    if placed:
        _check_handed(attachment, progress, call, first)
    seen = dict[str, Tensor]()

    def turned(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found = decoder.RotaryCall(module, args, kwargs, output).positions
        seen.setdefault("positions", found.detach())

    def entered(module: Any, args: Any, kwargs: Any) -> None:
        found = decoder.embeddings_of(kwargs)
        if found is not None:
            seen.setdefault("embedded", found.detach())

    with Hooks() as hooks:
        if placed:
            for module in decoder.rotary_modules(attachment.model):
                hooks.after(module, turned)
        if embedded:
            hooks.before(decoder.decoder_of(attachment.model), entered)
        yield
    if placed and "positions" in seen:
        _check_turned(attachment, call, seen["positions"], start)
    if embedded and "embedded" in seen:
        _check_embedded(attachment, state, call, seen["embedded"])
        ledger.prove(*inserted)
    # Positions that only count columns say nothing of a host that counts columns by itself.
    if placed and not _counts(call, start):
        ledger.prove(*handed)


def _check_handed(attachment: Attachment, progress: Progress, call: ModelCall, first: bool) -> None:
    """The positions that a forward is given are those that are due."""
    assert progress.positions is not None and progress.following is not None
    ids, given = call.ids, call.positions
    assert ids is not None
    rows, width = ids.shape
    start = caches.length_of(call.cache)
    # A prompt may be read in parts.
    ahead = start - progress.columns
    expected = progress.positions[..., :width]
    if not first:
        expected = progress.following[..., None] + ahead
    batch = expected.shape[-2]
    expected = expected.repeat_interleave(max(1, rows // batch), dim=expected.ndim - 2).cpu()
    if given is None:
        # The host counts by itself, the columns of its cache included, and padding before a row.
        # That moves all of the row, and where nothing is cached only how far columns are from each
        # other matters.
        found = (torch.arange(width) + start + attachment.family.first).expand(expected.shape)
        if first and not start:
            last = _real(call, start).long().cumsum(dim=1).argmax(dim=1)
            progress.ahead = (found - expected).gather(
                -1, last.expand(expected.shape[:-1])[..., None]
            )
        found = found - progress.ahead
    else:
        found = given[..., -width:].cpu()
    # Of four positions a column the first only tells packed samples apart.
    found, expected = (one[-3:] if one.ndim == 3 else one for one in (found, expected))
    if not bool(((found == expected) | ~_real(call, start)).all()):
        what = "its prompt" if first else "a step after it"
        raise broken(attachment.model, f"{what} does not come at the positions that are due")


def _real(call: ModelCall, start: int) -> Tensor:
    """[B, L] bool; the columns of a forward that are no padding, behind `start` of its cache."""
    mask, ids = call.mask, call.ids
    assert ids is not None
    if mask is None or not call.masks_columns:
        return torch.ones(ids.shape, dtype=torch.bool)
    width = ids.shape[1]
    own = mask[:, start : start + width] if mask.shape[1] > start else mask[:, -width:]
    return own.cpu() != 0


def _counts(call: ModelCall, start: int) -> bool:
    """Whether the positions that a forward is given only number its columns."""
    given, ids = call.positions, call.ids
    if given is None or ids is None:
        return True
    columns = torch.arange(ids.shape[1]) + start
    return bool((given[..., -ids.shape[1] :].cpu() == columns).all())


def _check_turned(attachment: Attachment, call: ModelCall, positions: Tensor, start: int) -> None:
    """The positions that a forward is given are those that its rotary angles are made for."""
    given, ids = call.positions, call.ids
    if given is None or ids is None:
        return
    given, positions = given[..., -ids.shape[1] :].cpu(), positions.cpu()
    given, positions = (one[-3:] if one.ndim == 3 else one for one in (given, positions))
    # Of indexed attention it makes angles for all columns that there are, each time anew.
    positions = positions[..., max(0, positions.shape[-1] - given.shape[-1]) :]
    same = given.shape[-1] == positions.shape[-1]
    if not same or not bool(((given == positions) | ~_real(call, start)).all()):
        raise broken(attachment.model, "its decoder turns by other positions than it is given")


def _check_embedded(
    attachment: Attachment, state: Active, call: ModelCall, embedded: Tensor
) -> None:
    """The pruned features stand where the placeholders were."""
    ids = call.ids
    assert ids is not None
    if embedded.shape[:2] != ids.shape:
        return
    for medium, token in zip(attachment.family.media, attachment.tokens, strict=True):
        pruned = state.pruned.get(medium.method)
        places = ids == token
        if pruned is None or not medium.entering or not bool(places.any()):
            continue
        found = embedded[places.to(embedded.device)]
        wanted = pruned.rows_of(state.times).detach().to(embedded.device)
        # A prompt may be read in parts.
        if found.shape != wanted.shape:
            continue
        exact = embedded.dtype == wanted.dtype == torch.float32
        if float(_off(found.float(), wanted.float()).max()) > _OFF[exact]:
            raise broken(
                attachment.model,
                f"the pruned features of {medium.kind}s do not stand in their places",
            )


def _off(a: Tensor, b: Tensor) -> Tensor:
    """[n] by what share of its size each row of `a` differs from that of `b`, but for a factor."""
    factor = (a * b).sum() / b.square().sum().clamp(min=1e-30)
    return (a - factor * b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-30)
