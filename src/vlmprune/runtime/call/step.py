"""One forward of a pruned call at the host: what it is given, and what happens between layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlmprune.hosts import caches, contract, decoder
from vlmprune.hosts.requests import ModelCall
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.cache.bound_cache import adopt, attending, binding_of, kind_of
from vlmprune.runtime.call import progress
from vlmprune.runtime.call.entrance import entering
from vlmprune.runtime.call.state import Active
from vlmprune.runtime.decoder.row_pass import leaving_out


def step(
    attachment: Attachment, state: Active, original: Callable[..., Any], call: ModelCall
) -> Any:
    """A forward that a pruned `generate` makes."""
    call, ids = _mended(state, call), call.ids
    if ids is None:
        raise contract.broken(attachment.model, "a forward within generate is given no input_ids")
    state.rows = ids.shape[0]
    ahead: dict[str, Any] = {
        medium.kind: state.pruned[medium.method].repeated(call.encoded[medium.kind], state.times)
        for medium in attachment.family.media
        if medium.kind in call.encoded and medium.method in state.pruned
    }
    if ahead:
        call = call.with_encoded(ahead)
        taken = [m.method for m in attachment.family.media if m.kind in ahead]
        state.progress.taken.update(taken)
    with in_decoder(attachment, state, call):
        return call.run(original)


@contextmanager
def in_decoder(attachment: Attachment, state: Active, call: ModelCall) -> Iterator[None]:
    """Let a forward drop rows between layers, and cut or continue a cache."""
    cache, missing = call.cache, state.missing
    if missing is not None and missing.done and cache is not None:
        missing = None
    with (
        progress.following(attachment, state, call),
        entering(attachment, state.entrance, call),
        leaving_out(attachment.model, missing, cache, call.states_wanted),
        _cutting(attachment, state, cache),
    ):
        yield
    if missing is not None and not missing.done:
        missing.done = True
        if state.report is not None:
            before = attachment.positions if attachment.method.shortens else ""
            attachment.report = state.report = missing.reported(
                state.report, attachment.model, before
            )


@contextmanager
def _cutting(attachment: Attachment, state: Active, cache: Any) -> Iterator[None]:
    """Let a forward attend to a cache that was cut, and cut what a prompt brings."""
    cut = state.cut
    if cut is not None and cut.done:
        cut = None
    if cut is not None and cache is not None:
        kind = kind_of(attachment.method)
        adopt(cache, attachment.cuttable, len(decoder.decoder_layers(attachment.model)), kind)
    if binding_of(cache) is None:
        yield
    else:
        with attending(cache, attachment.attentions, cut, attachment.borrowing):
            yield
    # A forward with its prompt in parts is done when the last has come.
    if cut is not None and (cache is None or cut.due(caches.length_of(cache))):
        cut.check_cut(attachment.model, attachment.cuttable)
        cut.done = True
        if state.report is not None:
            attachment.report = state.report = cut.reported(state.report, state.numbers)


def _mended(state: Active, call: ModelCall) -> ModelCall:
    """Mend what `generate` hands to the model: later positions, and gaps without a mask."""
    positions, ids = call.positions, call.ids
    if positions is None:
        return call
    if state.drift is not None and state.drift.ndim == 2:
        # Known without asking the cache, which may wait for a device.
        own = call.cache is not None and call.cache is state.progress.cache
        seen = state.progress.length if own else caches.length_of(call.cache)
        call = call.with_(positions=state.drifted(positions, seen))
    elif state.drift is not None:
        times = positions.shape[-2] // state.drift.shape[0]
        last, drift = (
            t.repeat_interleave(times, 0)[:, None].to(positions.device)
            for t in (state.last, state.drift)
        )
        moved = torch.where(positions > last, positions + drift, positions)
        call = call.with_(positions=moved)
    alone = state.gapped and call.mask is None and not caches.length_of(call.cache)
    if alone and ids is not None:
        # Without mask and cache, gaps in the positions would be read as packed sequences.
        call = call.with_(mask=torch.ones_like(ids))
    return call
