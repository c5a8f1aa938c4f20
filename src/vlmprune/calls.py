"""The host's `generate` and `forward` while a pruner is attached.

Each call is turned into a shorter but ordinary one, handed to the host's own method, and its
result put back into the form that the user would have got.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmprune import costs, families
from vlmprune.cache import adopt, attending, binding_of, refusal
from vlmprune.errors import VlmpruneError
from vlmprune.request import Active, active, mark, prepare, remember

if TYPE_CHECKING:
    from vlmprune.pruner import Handle


def generate(handle: Handle, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` with fewer visual tokens; returns what the host would have returned."""
    bound = inspect.signature(original).bind(*args, **kwargs).arguments
    kwargs = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
    ids = kwargs.get("input_ids") if kwargs.get("inputs") is None else kwargs["inputs"]
    cache = kwargs.get("past_key_values")
    setting = _settings(handle.model, kwargs)
    has_images = kwargs.get("pixel_values") is not None
    if not has_images and mark(cache) is None:
        handle.report_nothing()
        return original(**kwargs)
    _check_generate(handle.model, kwargs, ids, setting)
    if handle.pruner.cuts:
        _check_cutting(handle, kwargs, setting)

    assert ids is not None
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = _mask_of(ids, setting("pad_token_id"), setting("eos_token_id"))
    with torch.no_grad():
        prepared = prepare(handle, ids, mask, kwargs.get("position_ids"), cache, kwargs, False)
    if not prepared.state.images:
        handle.report_nothing()
    given = prepared.prompt.ids
    changed = _shorter_limits(handle.model, kwargs, mask.shape[1] - given.shape[1])
    if ids.shape[1] < mask.shape[1]:
        # Ids that came without the columns of the cache go on without them.
        given = given[:, prepared.known[1] :]
    changed |= {"attention_mask": prepared.prompt.mask, "position_ids": prepared.prompt.positions}
    changed |= prepared.prompt.aligned
    if kwargs.get("streamer") is not None:
        changed["streamer"] = _FullPrompt(kwargs["streamer"], ids)
    old = ("inputs", "input_ids", *handle.family.pixel_inputs)
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
    for holder in (cache, getattr(result, "past_key_values", None)):
        remember(holder, prepared.prefix.repeat(times), "it comes from a beam search" * beams)
    if isinstance(result, Tensor):
        return sequences
    result.sequences = sequences
    return result


def forward(handle: Handle, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A plain forward with fewer visual tokens; logits are those of the shorter sequence."""
    state = active.get()
    if state is not None and state.handle is handle:
        kwargs = _inside(state, kwargs)
        with _cutting(handle, state, kwargs.get("past_key_values")):
            return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs).arguments
    kwargs = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
    cache = kwargs.get("past_key_values")
    if kwargs.get("pixel_values") is None and mark(cache) is None:
        return original(**kwargs)
    ids = kwargs.get("input_ids")
    _check_common(kwargs, ids)
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise VlmpruneError(
            "logits_to_keep as a tensor counts columns that pruning removes; pass an int."
        )
    assert ids is not None
    caching = _caches(handle.model, kwargs)
    if handle.pruner.cuts and caching:
        _check_cutting(handle, kwargs, lambda name: kwargs.get(name))
        if cache is None and kwargs.get("pixel_values") is not None:
            cache = kwargs["past_key_values"] = DynamicCache(config=handle.model.config)
    prepared = prepare(
        handle,
        ids,
        kwargs.get("attention_mask"),
        kwargs.get("position_ids"),
        cache,
        kwargs,
        True,
        caching,
    )
    new = slice(prepared.known[1], None)
    kwargs = {k: v for k, v in kwargs.items() if k not in handle.family.pixel_inputs}
    kwargs |= prepared.pixels | {
        "input_ids": prepared.prompt.ids[:, new],
        "attention_mask": prepared.prompt.mask,
        "position_ids": prepared.prompt.positions[:, new],
        **prepared.prompt.aligned,
    }
    token = active.set(prepared.state)
    try:
        with _cutting(handle, prepared.state, kwargs.get("past_key_values")):
            result = original(**kwargs)
    finally:
        active.reset(token)
    after = getattr(result, "past_key_values", None) or cache
    # Tokens without an image need no new record: the old one still says what was dropped.
    if prepared.state.images or mark(after) is None:
        remember(after, prepared.prefix, "")
    return result


def image_features(handle: Handle, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`get_image_features`: pruned features inside a pruned call, the host's own elsewhere."""
    state = active.get()
    if state is None or state.handle is not handle or state.output is None:
        return original(*args, **kwargs)
    pixels = inspect.signature(original).bind(*args, **kwargs).arguments["pixel_values"]
    return state.image_features(pixels.shape[0])


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
        if handle.report is not None:
            cached = costs.kv_layers(handle.model.config)
            handle.report = handle.report.with_layers(
                retaining.layers, cached, retaining.seconds, state.numbers
            )


def _caches(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a plain forward fills a cache."""
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = getattr(model.config.get_text_config(), "use_cache", True)
    return bool(wanted) and not (model.training and getattr(model, "is_gradient_checkpointing", 0))


def _inside(state: Active, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Mend what `generate` hands to the model: later positions, and gaps without a mask."""
    positions = kwargs.get("position_ids")
    if positions is None:
        return kwargs
    if state.drift is not None:
        times = positions.shape[0] // state.drift.shape[0]
        last, drift = (
            t.repeat_interleave(times, 0)[:, None].to(positions.device)
            for t in (state.last, state.drift)
        )
        positions = torch.where(positions > last, positions + drift, positions)
        kwargs = kwargs | {"position_ids": positions}
    if state.gapped and kwargs.get("attention_mask") is None:
        cache = kwargs.get("past_key_values")
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


def _check_common(kwargs: dict[str, Any], ids: Tensor | None) -> None:
    if ids is None:
        raise VlmpruneError(
            "inputs_embeds cannot be pruned, for they do not show where the images are; pass "
            "input_ids and pixel_values."
        )
    if kwargs.get("mm_encoder_outputs"):
        raise VlmpruneError("mm_encoder_outputs cannot be pruned; pass pixel_values.")
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise VlmpruneError(
            f"attention_mask has {mask.ndim} dimensions; vlmprune needs the plain [batch, length] "
            "mask."
        )


def _check_generate(
    model: Any, kwargs: dict[str, Any], ids: Tensor | None, setting: Callable[[str], Any]
) -> None:
    _check_common(kwargs, ids)
    lookup = setting("prompt_lookup_num_tokens") or setting("assistant_early_exit")
    if kwargs.get("assistant_model") is not None or lookup:
        raise VlmpruneError(
            "vlmprune does not support assisted decoding; leave out assistant_model, "
            "prompt_lookup_num_tokens and assistant_early_exit."
        )
    takes = inspect.signature(type(model).forward).parameters
    if setting("prefill_chunk_size") and "mm_encoder_outputs" not in takes:
        raise VlmpruneError(
            "this release of transformers loses images under prefill_chunk_size; leave it out, or "
            "upgrade transformers."
        )


def _check_cutting(handle: Handle, kwargs: dict[str, Any], setting: Callable[[str], Any]) -> None:
    """Refuse, before any work, what a method that cuts caches cannot do."""
    method = repr(handle.pruner)
    if setting("use_cache") is False:
        raise VlmpruneError(f"{method} cuts the KV cache and needs one; leave out use_cache=False.")
    config = handle.model.config.get_text_config()
    if setting("output_attentions") or getattr(config, "output_attentions", False):
        raise VlmpruneError(
            f"{method} has no full attention weights to return; leave out output_attentions."
        )
    kind = setting("cache_implementation")
    if kind not in (None, "dynamic", "dynamic_full", "offloaded"):
        raise VlmpruneError(
            f"{method} cannot cut a cache of cache_implementation={kind!r}; leave it out, for the "
            "dynamic cache."
        )
    if config._attn_implementation == "flex_attention":
        raise VlmpruneError(
            f"{method} does not work with flex_attention; load the model with "
            "attn_implementation='sdpa'."
        )
    cache = kwargs.get("past_key_values")
    why = None if cache is None else refusal(cache, handle.cuttable)
    if why is not None:
        raise VlmpruneError(f"{method} {why}")


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
