"""The host's `generate` and `forward` while a pruner is attached.

Each call is turned into a shorter but ordinary one, handed to the host's own method, and its
result put back into the form that the user would have got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmprune import costs
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches, contract, decoder, generation, outputs, release
from vlmprune.hosts.generation import ShownPrompt, WholePrompt
from vlmprune.hosts.requests import ModelCall, PlainSettings, Settings, deltas_kept, model_call
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.cache.ragged_cache import adopt, attending, binding_of
from vlmprune.runtime.call import progress
from vlmprune.runtime.call.prepare import handed, leave_deltas, prefix_of, prepare, remember
from vlmprune.runtime.call.refusals import (
    check_common,
    check_cutting,
    check_dropping,
    check_encoded,
    check_generate,
)
from vlmprune.runtime.call.state import Active
from vlmprune.runtime.decoder.row_pass import leaving_out
from vlmprune.runtime.encoder import visions
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.runtime.scope import active, outside, under
from vlmprune.runtime.shadows import Shadow


def generate(attachment: Attachment, shadow: Shadow, *args: Any, **kwargs: Any) -> Any:
    """`generate` with fewer visual tokens; returns what the host would have returned."""
    with _kept_or_given_back(attachment):
        return _generate(attachment, shadow, args, kwargs)


def _generate(
    attachment: Attachment, shadow: Shadow, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    call, given = model_call(attachment.model, shadow.original, args, kwargs)
    vision = _vision(attachment, given)
    ids, cache, setting = call.prompt, call.cache, Settings(call)
    check_encoded(call)
    if vision is None and not _brings_items(attachment, call) and prefix_of(cache) is None:
        attachment.report_nothing()
        with outside():
            return call.run(shadow.original)
    # As the host's own `generate` runs, for what is recomputed depends on it.
    with torch.no_grad():
        check_generate(call, ids, setting)
        if attachment.method.cuts:
            check_cutting(attachment, call, setting)
        if attachment.asks or attachment.skips:
            check_dropping(attachment, call, setting)

    assert ids is not None
    mask = _mask_of(ids, setting) if call.mask is None else call.mask
    given_positions = call.positions
    with torch.no_grad():
        prepared = prepare(
            attachment, ids, mask, given_positions, cache, call, False, vision=vision
        )
    state = prepared.state
    if not state.items:
        attachment.report_nothing()
    left = prepared.prompt.ids
    limits = setting.shorter(mask.shape[1] - left.shape[1])
    if ids.shape[1] < mask.shape[1]:
        # Ids that came without the columns of the cache go on without them.
        left = left[:, prepared.known[1] :]
    short = call.without(n for medium in attachment.family.media for n in medium.inputs)
    short = short.with_prompt(left).also(prepared.pixels | limits | prepared.prompt.aligned)
    short = short.with_(mask=prepared.prompt.mask, positions=handed(prepared.prompt))
    state.whole = WholePrompt(ids, left.shape[1], partial(_apart, attachment))
    if call.streamer is not None:
        short = short.with_(streamer=ShownPrompt(call.streamer, state.whole))

    with under(state), state.running(shadow):
        result = short.run(shadow.original)

    sequences = outputs.sequences_of(result)
    new = sequences.shape[1] - left.shape[1]
    state.check_end(attachment.model, prepared.prompt.ids.shape[1] + new - 1)
    times = sequences.shape[0] // ids.shape[0]
    for holder in (cache, state.progress.cache, release.cache_returned(result)):
        searched = "it comes from a beam search" * (setting.beams > 1)
        remember(holder, prepared.prefix.repeat(times), searched)
    leave_deltas(attachment, prepared.prefix, given_positions)
    if state.report is not None:
        # Calls that were made meanwhile reported theirs.
        attachment.report = state.report
    return outputs.with_sequences(result, state.whole.widened(sequences))


def forward(attachment: Attachment, shadow: Shadow, *args: Any, **kwargs: Any) -> Any:
    """A plain forward with fewer visual tokens.

    Of the model, logits are those of the shorter sequence. Of the one below its head, states stand
    at the user's own columns, so that labels and masks fit; where a visual token was dropped,
    there is the state of what stands before it, which foretells the same.
    """
    state = active.get()
    with _kept_or_given_back(attachment):
        if isinstance(state, Active) and state.attachment is attachment and state.steps:
            given = release.by_name(shadow.original, *args, **kwargs) if args else kwargs
            call = ModelCall(attachment.model, given)
            if state.progress.is_own(call):
                with state.running(shadow):
                    return _step(attachment, state, shadow.original, call)
        with outside():
            return _forward(attachment, shadow, args, kwargs)


def rules(attachment: Attachment, shadow: Shadow, *args: Any, **kwargs: Any) -> Any:
    """What `generate` makes to change scores, or to stop: shown the prompt as the user gave it."""
    state = active.get()
    if not isinstance(state, Active) or state.attachment is not attachment or not state.whole:
        return shadow.original(*args, **kwargs)
    make = generation.processors if shadow.name == generation.PROCESSORS else generation.criteria
    with state.running(shadow):
        return make(state.whole, shadow.original, args, kwargs)


@contextmanager
def _apart(attachment: Attachment) -> Iterator[None]:
    """Run something of the user's in the middle of a call: calls that it makes are its own."""
    with outside(), deltas_kept(attachment.model, attachment.family.rope is not None):
        yield


def _step(
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
    with _in_decoder(attachment, state, call):
        return call.run(original)


def _forward(
    attachment: Attachment, shadow: Shadow, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    call, given = model_call(attachment.model, shadow.original, args, kwargs)
    vision = _vision(attachment, given)
    cache, ids = call.cache, call.ids
    check_encoded(call)
    brings = vision is not None or _brings_items(attachment, call)
    if not brings and prefix_of(cache) is None:
        return call.run(shadow.original)
    check_common(call, ids)
    if call.picks_logits:
        raise VlmpruneError(
            "logits_to_keep as a tensor counts columns that pruning removes; pass an int."
        )
    assert ids is not None
    caching, settings = _caches(call), PlainSettings(call)
    if attachment.method.cuts and (caching or attachment.method.probes is not None):
        check_cutting(attachment, call, settings)
        if cache is None and brings:
            cache = caches.new_cache(attachment.model)
            call = call.with_cache(cache)
    if attachment.asks or attachment.skips:
        check_dropping(attachment, call, settings)
    given_positions = call.positions
    prepared = prepare(
        attachment, ids, call.mask, given_positions, cache, call, True, caching, vision
    )
    new = slice(prepared.known[1], None)
    short = call.without(name for medium in attachment.family.media for name in medium.inputs)
    short = short.also(prepared.pixels).also(prepared.prompt.aligned)
    short = short.with_(
        ids=prepared.prompt.ids[:, new],
        mask=prepared.prompt.mask,
        positions=handed(prepared.prompt, new) + attachment.family.first,
    )
    state = prepared.state
    state.rows = prepared.prompt.ids.shape[0]
    with under(state), state.running(shadow), _in_decoder(attachment, state, short):
        result = short.run(shadow.original)
    returned = release.cache_returned(result)
    filled = state.progress.cache
    after = next((one for one in (returned, cache, filled) if one is not None), None)
    if after is None and caching and contract.checks():
        raise contract.broken(result, "it holds no KV cache where one was filled")
    leave_deltas(attachment, prepared.prefix, given_positions)
    # Tokens without an image need no new record: the old one still says what was dropped.
    if state.items or prefix_of(after) is None:
        remember(after, prepared.prefix, "")
    return outputs.at_columns(result, prepared.columns) if shadow.inner else result


def encode(attachment: Attachment, inputs: dict[str, Any]) -> Vision:
    """The images and videos of a request after pruning, for later requests."""
    visions.check(attachment)
    call = ModelCall(attachment.model, inputs)
    check_common(call, call.ids)
    if not _brings_items(attachment, call):
        raise VlmpruneError(
            "there is no image or video to encode; pass all that the model's processor returns."
        )
    assert call.ids is not None
    with _kept_or_given_back(attachment):
        prepared = prepare(attachment, call.ids, call.mask, None, None, call, False, False)
    return prepared.vision()


def features(attachment: Attachment, shadow: Shadow, *args: Any, **kwargs: Any) -> Any:
    """`get_image_features` and its like: pruned inside a pruned call, the host's own elsewhere."""
    state = active.get()
    if (
        not isinstance(state, Active)
        or state.attachment is not attachment
        or shadow.name not in state.pruned
    ):
        return shadow.original(*args, **kwargs)
    pruned = state.pruned[shadow.name]
    state.progress.taken.add(shadow.name)
    if state.rows is None:
        # `generate` encodes ahead, and repeats the items by itself.
        return pruned.listed()
    return pruned.formed(state.times)


@contextmanager
def _kept_or_given_back(attachment: Attachment) -> Iterator[None]:
    """Prove the contract inside the block; where it does not hold, give the model back."""
    try:
        with contract.proving(attachment.ledger):
            yield
    except contract.ContractError:
        attachment.leave()
        raise


@contextmanager
def _in_decoder(attachment: Attachment, state: Active, call: ModelCall) -> Iterator[None]:
    """Let a forward drop rows between layers, and cut or continue a cache."""
    cache, dropping = call.cache, state.dropping
    if dropping is not None and dropping.done and cache is not None:
        dropping = None
    with (
        progress.following(attachment, state, call),
        leaving_out(attachment.model, dropping, cache, call.states_wanted),
        _cutting(attachment, state, cache),
    ):
        yield
    if dropping is None or dropping.done:
        return
    dropping.done = True
    if state.report is not None:
        before = attachment.positions if attachment.method.shortens else ""
        attachment.report = state.report = dropping.reported(state.report, attachment.model, before)


@contextmanager
def _cutting(attachment: Attachment, state: Active, cache: Any) -> Iterator[None]:
    """Let a forward attend to a cache that was cut, and cut what a prompt brings."""
    cut = state.cut
    if cut is not None and cut.done:
        cut = None
    if cut is not None and cache is not None:
        adopt(cache, attachment.cuttable, len(decoder.decoder_layers(attachment.model)))
    if binding_of(cache) is None:
        yield
    else:
        with attending(cache, attachment.attention, cut):
            yield
    # A forward with its prompt in parts is done when the last has come.
    if cut is not None and (cache is None or cut.due(caches.length_of(cache))):
        cut.check_cut(attachment.model, attachment.cuttable)
        cut.done = True
        if state.report is not None:
            cached = costs.kv_layers(attachment.model.config)
            attachment.report = state.report = state.report.with_layers(
                cut.layers, cached, cut.seconds, state.numbers
            )


def _vision(attachment: Attachment, vision: Any) -> Vision | None:
    """The argument that is ours, once it is sure that it fits."""
    if vision is None:
        return None
    visions.check(attachment, vision)
    found: Vision = vision.to(attachment.model.device)
    return found


def _brings_items(attachment: Attachment, call: ModelCall) -> bool:
    """Whether a call comes with images or videos."""
    for medium in attachment.family.media:
        for name in medium.replaced:
            if call.brings(name):
                raise VlmpruneError(
                    f"{name} is called {medium.inputs[0]} in this release of transformers; pass "
                    "it under that name."
                )
    return any(call.brings(medium.inputs[0]) for medium in attachment.family.media)


def _caches(call: ModelCall) -> bool:
    """Whether a plain forward fills a cache."""
    return call.caches and not decoder.recomputes(call.model)


def _mended(state: Active, call: ModelCall) -> ModelCall:
    """Mend what `generate` hands to the model: later positions, and gaps without a mask."""
    positions, ids = call.positions, call.ids
    if positions is None:
        return call
    if state.drift is not None and state.drift.ndim == 2:
        seen = caches.length_of(call.cache)
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


def _mask_of(ids: Tensor, setting: Settings) -> Tensor:
    """The mask that `generate` infers: padding counts as such if its id is not an end token."""
    if setting.pad is None or setting.pad in setting.ends:
        return torch.ones_like(ids)
    return (ids != setting.pad).long()
