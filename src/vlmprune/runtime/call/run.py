"""The host's `generate` and `forward` while a pruner is attached: one flow, top to bottom.

    plan      which columns and images are new                       plan.py         Plan
    encode    the vision encoder, once, with taps                    choose.py       Encoded
    choose    the method's choice                                    choose.py       Choice
    shorten   ids, mask, positions, features                         short_request.py ShortRequest
    run       the host's own method on the shorter request           step.py, each forward
    restore   what the user would have got, and the cache's record   here, remembered.py
    report    what was kept and saved                                report/         Report

Each step hands a record on to the next. What is refused stands in `refusals.py`; packed samples are
taken apart before `plan` and put together after `shorten` (`packed.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches, contract, decoder, generation, outputs, parallel, release
from vlmprune.hosts.compiling import leave_out
from vlmprune.hosts.deltas import deltas_kept, remembers, set_deltas
from vlmprune.hosts.generation import ShownPrompt, WholePrompt
from vlmprune.hosts.requests import (
    ModelCall,
    PlainSettings,
    Settings,
    model_call,
    unknown_of,
)
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.call.choose import choose, encode, report_of
from vlmprune.runtime.call.full_logits import FullLogits, full_logits, tell_short
from vlmprune.runtime.call.packed import Packing, packing_of
from vlmprune.runtime.call.plan import Asked, planned
from vlmprune.runtime.call.refusals import (
    check_common,
    check_encoded,
    check_generate,
    check_inside,
    check_picks,
)
from vlmprune.runtime.call.remembered import filling, prefix_of, remember
from vlmprune.runtime.call.short_request import ShortRequest, handed, short_request
from vlmprune.runtime.call.shorten import silent_columns
from vlmprune.runtime.call.state import Active
from vlmprune.runtime.call.step import in_decoder, step
from vlmprune.runtime.encoder import visions
from vlmprune.runtime.encoder.pruned import as_shown
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.runtime.scope import active, outside, under
from vlmprune.runtime.shadows import Shadow


def shortened(attachment: Attachment, asked: Asked) -> ShortRequest:
    """Plan, encode, choose, shorten; the report so far is the attachment's."""
    plan = planned(attachment, asked)
    # `generate` and `handle.encode` come here outside of the model's forward, where FSDP has its
    # weights.
    choice = parallel.gathered(
        attachment.model, lambda: choose(attachment, plan, encode(attachment, plan))
    )
    report = None
    if plan.geometry.items:
        report = attachment.report = report_of(attachment, plan, choice)
    return short_request(attachment, plan, choice, report)


def generate(attachment: Attachment, shadow: Shadow, *args: Any, **kwargs: Any) -> Any:
    """`generate` with fewer visual tokens; returns what the host would have returned."""
    with _kept_or_given_back(attachment):
        call, vision = _taken_apart(attachment, shadow, args, kwargs)
        if not _concerns(attachment, call, vision):
            attachment.report_nothing()
            with outside():
                return call.run(shadow.original)
        setting, ids = Settings(call), call.prompt
        # As the host's own `generate` runs, for what is recomputed depends on it.
        with torch.no_grad():
            check_generate(call, ids, setting)
            check_inside(attachment, call, setting, True)
            leave_out(setting.compiles)
            assert ids is not None
            mask = _mask_of(ids, setting) if call.mask is None else call.mask
            asked = Asked(call, ids, mask, call.cache, plain=False, vision=vision)
            short = shortened(attachment, asked)
        if not short.state.items:
            attachment.report_nothing()
        result = _generated(attachment, shadow, short, setting)
        return _restored(attachment, short, result, setting)


def _generated(
    attachment: Attachment, shadow: Shadow, short: ShortRequest, setting: Settings
) -> Any:
    """What the host's own `generate` makes of the shorter request."""
    asked, state = short.plan.asked, short.state
    left = short.prompt.ids
    assert asked.mask is not None
    limits = setting.shorter(asked.mask.shape[1] - left.shape[1])
    if asked.ids.shape[1] < asked.mask.shape[1]:
        # Ids that came without the columns of the cache go on without them.
        left = left[:, short.plan.cached :]
    state.whole = WholePrompt(asked.ids, left.shape[1], partial(_apart, attachment))
    call = asked.call
    if not attachment.as_it_comes:
        call = _without_items(attachment, call)
        call = call.with_prompt(left).also(short.pixels | limits | short.prompt.aligned)
        call = call.with_(mask=short.prompt.mask)
        if not attachment.family.counted:
            call = call.with_(positions=handed(short.prompt))
    if call.streamer is not None:
        call = call.with_(streamer=ShownPrompt(call.streamer, state.whole))
    with (
        under(state),
        state.running(shadow),
        filling(state, asked.cache, short.prefix, _searched(setting)),
    ):
        return call.run(shadow.original)


def _restored(attachment: Attachment, short: ShortRequest, result: Any, setting: Settings) -> Any:
    """What `generate` returned with the user's prompt, and its cache with a record of it."""
    asked, state = short.plan.asked, short.state
    assert state.whole is not None
    found = outputs.sequences_of(result)
    new = found.shape[1] - state.whole.short
    state.check_end(attachment.model, short.prompt.ids.shape[1] + new - 1)
    sequences = state.whole.widened(found)
    filled = short.prefix.repeat(len(found) // len(asked.ids))
    filled = replace(filled, answer=sequences[:, asked.ids.shape[1] :])
    for holder in (asked.cache, state.progress.cache, release.cache_returned(result)):
        remember(holder, filled, _searched(setting))
    _leave_deltas(attachment, short)
    if state.report is not None:
        # Calls that were made meanwhile reported theirs.
        attachment.report = state.report
    return outputs.with_sequences(result, sequences)


def forward(attachment: Attachment, shadow: Shadow, *args: Any, **kwargs: Any) -> Any:
    """A plain forward with fewer visual tokens.

    Of the model, logits are those of the shorter sequence, or at the user's own columns where the
    attachment says so. Of the one below its head, states stand at the user's own columns, so that
    labels and masks fit; where a visual token was dropped, there is the state of what stands before
    it, which foretells the same.
    """
    state = active.get()
    with _kept_or_given_back(attachment):
        if isinstance(state, Active) and state.attachment is attachment and state.steps:
            given = release.by_name(shadow.original, *args, **kwargs) if args else kwargs
            call = ModelCall(attachment.model, given)
            if state.progress.is_own(call):
                with state.running(shadow):
                    return step(attachment, state, shadow.original, call)
        with outside():
            return _forward(attachment, shadow, args, kwargs)


def _forward(
    attachment: Attachment, shadow: Shadow, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A plain forward that is a call of its own."""
    call, vision = _taken_apart(attachment, shadow, args, kwargs)
    if not _concerns(attachment, call, vision):
        return call.run(shadow.original)
    check_common(call, call.ids)
    check_picks(attachment, call)
    caching = call.caches and not decoder.recomputes(call.model)
    check_inside(attachment, call, PlainSettings(call), caching)
    brings = vision is not None or _brings_items(attachment, call)
    probes = attachment.method.probes is not None
    if attachment.method.cuts and (caching or probes) and call.cache is None and brings:
        call = call.with_cache(caches.new_cache(attachment.model))
    packing = packing_of(attachment, call, caching)
    whole = call if packing is None else packing.apart(attachment, call)
    assert whole.ids is not None
    asked = Asked(whole, whole.ids, whole.mask, call.cache, True, caching, vision)
    short = shortened(attachment, asked)

    new, state, pruned = slice(short.plan.cached, None), short.state, short.state.pruned
    shorter = call
    if not attachment.as_it_comes:
        shorter = _without_items(attachment, call)
        shorter = shorter.also(short.pixels).also(short.prompt.aligned)
        shorter = shorter.with_(ids=short.prompt.ids[:, new], mask=short.prompt.mask)
        if not attachment.family.counted:
            shorter = shorter.with_(positions=handed(short.prompt, new) + attachment.family.first)
    # The host may return what it remembers.
    _leave_deltas(attachment, short)
    state.rows, columns = short.prompt.ids.shape[0], short.columns
    if packing is not None:
        columns = packing.columns(columns, short.new.mask)
        shorter = packing.together(attachment, shorter, state)
    full = None
    if columns is not None and not shadow.inner:
        full = _at_own_columns(attachment, call, short, columns, shorter, packing)
        shorter = shorter if full is None else full.asked(shorter)
    with (
        under(state),
        state.running(shadow),
        filling(state, asked.cache, short.prefix),
        in_decoder(attachment, state, shorter),
    ):
        result = as_shown(shorter.run(shadow.original), pruned.values())

    holders = (release.cache_returned(result), asked.cache, state.progress.cache)
    after = next((one for one in holders if one is not None), None)
    if after is None and caching and contract.checks():
        raise contract.broken(result, "it holds no KV cache where one was filled")
    _leave_deltas(attachment, short)
    # Tokens without an image need no new record: the old one still says what was dropped.
    if state.items or prefix_of(after) is None:
        remember(after, short.prefix)
    if shadow.inner:
        return outputs.at_columns(result, columns)
    return result if full is None else full.put(result)


def _at_own_columns(
    attachment: Attachment,
    call: ModelCall,
    short: ShortRequest,
    columns: Tensor,
    shorter: ModelCall,
    packing: Packing | None,
) -> FullLogits | None:
    """Where the logits that the user wants are among those of a shorter request, if at all."""
    assert short.dropped is not None and shorter.ids is not None
    length = shorter.ids.shape[1]
    if attachment.logits != "full":
        tell_short(attachment, call, columns, length)
        return None
    silent = silent_columns(short.plan.new, short.dropped)
    if packing is not None:
        silent = packing.rows(silent)
    return full_logits(call, columns, silent, length)


def encoded(attachment: Attachment, inputs: dict[str, Any]) -> Vision:
    """The images and videos of a request after pruning, for later requests."""
    visions.check(attachment)
    call = ModelCall(attachment.model, inputs).renamed(attachment.family.former)
    check_common(call, call.ids)
    if not _brings_items(attachment, call):
        raise VlmpruneError(
            "there is no image or video to encode; pass all that the model's processor returns."
        )
    assert call.ids is not None
    with _kept_or_given_back(attachment):
        bare = call.with_(positions=None)
        short = shortened(attachment, Asked(bare, call.ids, call.mask, None, False, False))
    plan, choice, report = short.plan, short.choice, short.state.report
    assert report is not None
    return visions.gather(
        attachment, plan.geometry, plan.brought, choice.kept, choice.pruned, report
    )


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
    return pruned.formed(state.times, outputs.more_wanted(kwargs))


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


@contextmanager
def _kept_or_given_back(attachment: Attachment) -> Iterator[None]:
    """Prove the contract inside the block; where it does not hold, give the model back."""
    try:
        with contract.proving(attachment.ledger):
            yield
    except contract.ContractError:
        attachment.leave()
        raise


def _taken_apart(
    attachment: Attachment, shadow: Shadow, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ModelCall, Vision | None]:
    """A call by name, and the argument that is ours, once it is sure that it fits."""
    call, given = model_call(attachment.model, shadow.original, args, kwargs)
    call = call.renamed(attachment.family.former)
    check_encoded(call)
    if given is None:
        return call, None
    visions.check(attachment, given)
    return call, given.to(attachment.model.device)


def _concerns(attachment: Attachment, call: ModelCall, vision: Vision | None) -> bool:
    """Whether there is anything to prune, or a cache to go on with that was."""
    brings = vision is not None or _brings_items(attachment, call)
    return brings or prefix_of(call.cache) is not None


def _brings_items(attachment: Attachment, call: ModelCall) -> bool:
    """Whether a call comes with images or videos."""
    return any(call.brings(medium.inputs[0]) for medium in attachment.family.media)


def _without_items(attachment: Attachment, call: ModelCall) -> ModelCall:
    """A call without what holds images and videos, which the host does not see again."""
    if attachment.family.counted:
        return call.without(unknown_of(call))
    return call.without(n for medium in attachment.family.media for n in medium.inputs)


def _searched(setting: Settings) -> str:
    """Why the cache of a `generate` cannot be continued; empty where it can."""
    return "it comes from a beam search" * (setting.beams > 1)


def _leave_deltas(attachment: Attachment, short: ShortRequest) -> None:
    """Let the host count on by itself, as it may after a call that was given no positions.

    A model with three positions a column keeps, from one call to the next, how far they are from
    the number of its columns, of which there are fewer now.
    """
    plan = short.plan
    entrance = short.state.entrance
    entered = entrance is not None and entrance.positions is not None
    three = attachment.family.rope or (entered and remembers(attachment.model))
    if three and plan.asked.call.positions is None and not plan.texts:
        filled = short.prefix
        ahead = filled.next_position - (filled.prompt.mask != 0).sum(dim=1)
        set_deltas(attachment.model, ahead[:, None])


def _mask_of(ids: Tensor, setting: Settings) -> Tensor:
    """The mask that `generate` infers: padding counts as such if its id is not an end token."""
    if setting.pad is None or setting.pad in setting.ends:
        return torch.ones_like(ids)
    return (ids != setting.pad).long()
