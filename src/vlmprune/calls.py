"""The host's `generate` and `forward` while a pruner is attached.

Each call is turned into a shorter but ordinary one, handed to the host's own method, and its
result put back into the form that the user would have got.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmprune import costs, families, reuse
from vlmprune.active import Active, active
from vlmprune.cache import adopt, attending, binding_of
from vlmprune.errors import VlmpruneError
from vlmprune.hosts.release import by_name, cache_given, cache_returned, with_cache
from vlmprune.refusals import (
    check_common,
    check_cutting,
    check_dropping,
    check_encoded,
    check_generate,
)
from vlmprune.request import handed, leave_deltas, mark, prepare, remember
from vlmprune.skipping import Skipping, reported, skipping_layers

if TYPE_CHECKING:
    from vlmprune.handle import Handle
    from vlmprune.reuse import Vision


def generate(handle: Handle, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` with fewer visual tokens; returns what the host would have returned."""
    vision = _vision(handle, kwargs)
    kwargs = by_name(original, *args, **kwargs)
    ids = kwargs.get("input_ids") if kwargs.get("inputs") is None else kwargs["inputs"]
    cache = cache_given(type(handle.model), kwargs)
    setting = _settings(handle.model, kwargs)
    check_encoded(kwargs)
    if vision is None and not _brings_items(handle, kwargs) and mark(cache) is None:
        handle.report_nothing()
        return original(**kwargs)
    # As the host's own `generate` runs, for what is recomputed depends on it.
    with torch.no_grad():
        check_generate(kwargs, ids, setting)
        if handle.pruner.cuts:
            check_cutting(handle, kwargs, setting)
        if handle.asks or handle.skips:
            check_dropping(handle, kwargs, setting)

    assert ids is not None
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = _mask_of(ids, setting("pad_token_id"), setting("eos_token_id"))
    with torch.no_grad():
        positions = kwargs.get("position_ids")
        prepared = prepare(handle, ids, mask, positions, cache, kwargs, False, vision=vision)
    if not prepared.state.items:
        handle.report_nothing()
    given = prepared.prompt.ids
    changed = _shorter_limits(handle.model, kwargs, mask.shape[1] - given.shape[1])
    if ids.shape[1] < mask.shape[1]:
        # Ids that came without the columns of the cache go on without them.
        given = given[:, prepared.known[1] :]
    changed |= {"attention_mask": prepared.prompt.mask, "position_ids": handed(prepared.prompt)}
    changed |= prepared.prompt.aligned
    if kwargs.get("streamer") is not None:
        changed["streamer"] = _FullPrompt(kwargs["streamer"], ids)
    old = {"inputs", "input_ids"} | {n for medium in handle.family.media for n in medium.inputs}
    given_positions = kwargs.get("position_ids")
    kwargs = {k: v for k, v in kwargs.items() if k not in old} | prepared.pixels | changed

    token = active.set(prepared.state)
    try:
        result = original(inputs=given, **kwargs)
    finally:
        active.reset(token)

    sequences = result if isinstance(result, Tensor) else result.sequences
    times = sequences.shape[0] // ids.shape[0]
    prompt = ids.repeat_interleave(times, 0).to(sequences.device)
    sequences = torch.cat((prompt, sequences[:, given.shape[1] :]), dim=1)
    beams = (setting("num_beams") or 1) > 1
    for holder in (cache, cache_returned(result)):
        remember(holder, prepared.prefix.repeat(times), "it comes from a beam search" * beams)
    leave_deltas(handle, prepared.prefix, given_positions)
    if isinstance(result, Tensor):
        return sequences
    result.sequences = sequences
    return result


def forward(handle: Handle, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A plain forward with fewer visual tokens; logits are those of the shorter sequence."""
    state = active.get()
    if state is not None and state.handle is handle:
        kwargs = _inside(state, kwargs)
        state.running = kwargs["input_ids"].shape[0]
        for medium in handle.family.media:
            ahead = (kwargs.get("mm_encoder_outputs") or {}).get(medium.kind)
            if ahead is not None and medium.method in state.pruned:
                formed = state.pruned[medium.method].repeated(ahead, state.times)
                outputs = {**kwargs["mm_encoder_outputs"], medium.kind: formed}
                kwargs = kwargs | {"mm_encoder_outputs": outputs}
        with _inside_decoder(handle, state, kwargs):
            return original(*args, **kwargs)
    vision = _vision(handle, kwargs)
    kwargs = by_name(original, *args, **kwargs)
    cache = cache_given(type(handle.model), kwargs)
    check_encoded(kwargs)
    if vision is None and not _brings_items(handle, kwargs) and mark(cache) is None:
        return original(**kwargs)
    ids = kwargs.get("input_ids")
    check_common(kwargs, ids)
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise VlmpruneError(
            "logits_to_keep as a tensor counts columns that pruning removes; pass an int."
        )
    assert ids is not None
    caching = _caches(handle.model, kwargs)
    if handle.pruner.cuts and (caching or handle.pruner.probes is not None):
        check_cutting(handle, kwargs, lambda n: caching if n == "use_cache" else kwargs.get(n))
        if cache is None and (vision is not None or _brings_items(handle, kwargs)):
            cache = DynamicCache(config=handle.model.config)
            kwargs = with_cache(type(handle.model), kwargs, cache)
    if handle.asks or handle.skips:
        check_dropping(handle, kwargs, kwargs.get)
    prepared = prepare(
        handle,
        ids,
        kwargs.get("attention_mask"),
        kwargs.get("position_ids"),
        cache,
        kwargs,
        True,
        caching,
        vision,
    )
    given_positions = kwargs.get("position_ids")
    new = slice(prepared.known[1], None)
    old = {name for medium in handle.family.media for name in medium.inputs}
    kwargs = {k: v for k, v in kwargs.items() if k not in old}
    kwargs |= prepared.pixels | {
        "input_ids": prepared.prompt.ids[:, new],
        "attention_mask": prepared.prompt.mask,
        "position_ids": handed(prepared.prompt, new) + handle.family.first,
        **prepared.prompt.aligned,
    }
    prepared.state.running = prepared.prompt.ids.shape[0]
    token = active.set(prepared.state)
    try:
        with _inside_decoder(handle, prepared.state, kwargs):
            result = original(**kwargs)
    finally:
        active.reset(token)
    returned = cache_returned(result)
    after = cache if returned is None else returned
    leave_deltas(handle, prepared.prefix, given_positions)
    # Tokens without an image need no new record: the old one still says what was dropped.
    if prepared.state.items or mark(after) is None:
        remember(after, prepared.prefix, "")
    return result


def encode(handle: Handle, inputs: dict[str, Any]) -> Vision:
    """The images and videos of a request after pruning, for later requests."""
    reuse.check(handle)
    check_common(inputs, inputs.get("input_ids"))
    if not _brings_items(handle, inputs):
        raise VlmpruneError(
            "there is no image or video to encode; pass all that the model's processor returns."
        )
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"]
    prepared = prepare(handle, ids, mask, None, None, inputs, False, False)
    return prepared.vision()


def features(
    handle: Handle, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`get_image_features` and its like: pruned inside a pruned call, the host's own elsewhere."""
    state = active.get()
    if state is None or state.handle is not handle or name not in state.pruned:
        return original(*args, **kwargs)
    pruned = state.pruned[name]
    if state.running is None:
        # `generate` encodes ahead, and repeats the items by itself.
        return pruned.listed()
    return pruned.formed(state.times)


@contextmanager
def _inside_decoder(handle: Handle, state: Active, kwargs: dict[str, Any]) -> Iterator[None]:
    """Let a forward drop rows between layers, and cut or continue a cache."""
    cache, dropping = cache_given(type(handle.model), kwargs), state.dropping
    if dropping is not None and dropping.done and cache is not None:
        dropping = None
    wanted = kwargs.get("output_hidden_states")
    if wanted is None:
        # The host's decoder looks at its own config; others may look at the whole.
        config = handle.model.config
        both = (config, config.get_text_config(decoder=True))
        wanted = any(getattr(one, "output_hidden_states", False) for one in both)
    with (
        skipping_layers(handle.model, dropping, cache, bool(wanted)),
        _cutting(handle, state, cache),
    ):
        yield
    if dropping is None or dropping.done:
        return
    dropping.done = True
    if isinstance(dropping, Skipping) and state.report is not None:
        policy = handle.positions if handle.pruner.shortens else handle.inside
        config, dtype = handle.model.config, handle.model.dtype
        handle.report = reported(state.report, config, dropping, dtype, policy)
        return
    stages = dropping.stages()
    if stages and state.report is not None:
        positions: str = handle.inside
        if handle.pruner.shortens and positions != handle.positions:
            positions = f"{handle.positions}, inside the language model {positions}"
        handle.report = state.report.with_rows(
            handle.model.config,
            stages,
            [len(row) for row in dropping.lengths],
            handle.model.dtype,
            positions,
            dropping.seconds,
            dropping.members(),
        )


@contextmanager
def _cutting(handle: Handle, state: Active, cache: Any) -> Iterator[None]:
    """Let a forward attend to a cache that was cut, and cut what a prompt brings."""
    retaining = state.retaining
    if retaining is not None and retaining.done:
        retaining = None
    if retaining is not None and cache is not None:
        adopt(cache, handle.cuttable, len(families.decoder_layers(handle.model)))
    if binding_of(cache) is None:
        yield
        return
    with attending(cache, handle.attention, retaining):
        yield
    if retaining is not None and cache is not None and retaining.due(cache.get_seq_length()):
        retaining.done = True
        if state.report is not None:
            cached = costs.kv_layers(handle.model.config)
            handle.report = state.report.with_layers(
                retaining.layers, cached, retaining.seconds, state.numbers
            )


def _vision(handle: Handle, kwargs: dict[str, Any]) -> Vision | None:
    """Take the argument that is ours out of a call's."""
    vision = kwargs.pop("vision", None)
    if vision is None:
        return None
    reuse.check(handle, vision)
    return vision.to(handle.model.device)


def _brings_items(handle: Handle, kwargs: dict[str, Any]) -> bool:
    """Whether a call comes with images or videos."""
    for medium in handle.family.media:
        for name in medium.replaced:
            if kwargs.get(name) is not None:
                raise VlmpruneError(
                    f"{name} is called {medium.inputs[0]} in this release of transformers; pass "
                    "it under that name."
                )
    return any(kwargs.get(medium.inputs[0]) is not None for medium in handle.family.media)


def _caches(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a plain forward fills a cache."""
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = getattr(model.config.get_text_config(), "use_cache", True)
    return bool(wanted) and not families.recomputes(model)


def _inside(state: Active, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Mend what `generate` hands to the model: later positions, and gaps without a mask."""
    positions = kwargs.get("position_ids")
    if positions is None:
        return kwargs
    if state.drift is not None and state.drift.ndim == 2:
        cache = cache_given(type(state.handle.model), kwargs)
        start = cache.get_seq_length() if cache is not None else 0
        kwargs = kwargs | {"position_ids": state.drifted(positions, start)}
    elif state.drift is not None:
        times = positions.shape[-2] // state.drift.shape[0]
        last, drift = (
            t.repeat_interleave(times, 0)[:, None].to(positions.device)
            for t in (state.last, state.drift)
        )
        positions = torch.where(positions > last, positions + drift, positions)
        kwargs = kwargs | {"position_ids": positions}
    if state.gapped and kwargs.get("attention_mask") is None:
        cache = cache_given(type(state.handle.model), kwargs)
        if cache is None or cache.get_seq_length() == 0:
            # Without mask and cache, gaps in the positions would be read as packed sequences.
            kwargs = kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])}
    return kwargs


def _settings(model: Any, kwargs: dict[str, Any]) -> Callable[[str], Any]:
    """Look a generation setting up as `generate` does: argument, given config, model's config."""
    given = kwargs.get("generation_config")

    def setting(name: str) -> Any:
        for source in (kwargs.get(name), getattr(given, name, None)):
            if source is not None:
                return source
        return getattr(model.generation_config, name, None)

    return setting


def _mask_of(ids: Tensor, pad: Any, eos: Any) -> Tensor:
    """The mask that `generate` infers: padding counts as such if its id is not an end token."""
    ends = eos if isinstance(eos, list | tuple) else [eos]
    pad = pad[0] if isinstance(pad, list | tuple) else pad
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).long()


def _shorter_limits(model: Any, kwargs: dict[str, Any], removed: int) -> dict[str, Any]:
    """Length limits that count the prompt, less the columns that went."""
    changed: dict[str, Any] = {}
    setting = _settings(model, kwargs)
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(name)
        if not value or setting(instead) is not None or removed == 0:
            continue
        config = changed.get("generation_config", kwargs.get("generation_config"))
        if kwargs.get(name) is None and config is not None:
            changed["generation_config"] = config = copy.deepcopy(config)
            setattr(config, name, max(0, value - removed))
        else:
            changed[name] = max(0, value - removed)
    return changed


class _FullPrompt:
    """A streamer's stand-in that shows it the prompt as the user gave it."""

    def __init__(self, streamer: Any, ids: Tensor) -> None:
        self.streamer, self.ids = streamer, ids
        self.first = True

    def put(self, value: Tensor) -> None:
        """Pass tokens on; the first are the prompt."""
        self.streamer.put(self.ids.cpu() if self.first else value)
        self.first = False

    def end(self) -> None:
        """Pass the end on."""
        self.streamer.end()
