"""What a call may ask for that cannot be pruned: refused by name, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmprune import families, short
from vlmprune.cache import refusal
from vlmprune.errors import VlmpruneError
from vlmprune.hosts.release import cache_given, chunks_hold_images

if TYPE_CHECKING:
    from vlmprune.handle import Handle


def check_encoded(kwargs: dict[str, Any]) -> None:
    """Refuse images that were encoded before, which would go through whole."""
    if kwargs.get("mm_encoder_outputs"):
        raise VlmpruneError(
            "mm_encoder_outputs cannot be pruned; pass pixel_values, or what `handle.encode` "
            "returns as vision."
        )


def check_common(kwargs: dict[str, Any], ids: Tensor | None) -> None:
    """Refuse inputs that do not show where the images are."""
    if ids is None:
        raise VlmpruneError(
            "inputs_embeds cannot be pruned, for they do not show where the images are; pass "
            "input_ids and pixel_values."
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise VlmpruneError(
            f"attention_mask has {mask.ndim} dimensions; vlmprune needs the plain [batch, length] "
            "mask."
        )


def check_generate(
    kwargs: dict[str, Any], ids: Tensor | None, setting: Callable[[str], Any]
) -> None:
    """Refuse what `generate` cannot do with fewer tokens."""
    check_common(kwargs, ids)
    assisting = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    if kwargs.get("assistant_model") is not None or any(setting(name) for name in assisting):
        raise VlmpruneError(
            "vlmprune does not support assisted decoding; leave out assistant_model, "
            f"{', '.join(assisting[:-1])} and {assisting[-1]}."
        )
    if setting("guidance_scale") not in (None, 1):
        raise VlmpruneError(
            f"guidance_scale={setting('guidance_scale')} runs the model a second time on another "
            "prompt within the call, which vlmprune does not support; leave it out."
        )
    if setting("prefill_chunk_size") and not chunks_hold_images():
        raise VlmpruneError(
            "before 5.23 transformers loses images, and in some releases earlier turns, under "
            "prefill_chunk_size; leave it out, or upgrade transformers."
        )


def check_cutting(handle: Handle, kwargs: dict[str, Any], setting: Callable[[str], Any]) -> None:
    """Refuse, before any work, what a method that cuts caches cannot do."""
    method = repr(handle.pruner)
    if setting("use_cache") is False:
        raise VlmpruneError(f"{method} cuts the KV cache and needs one; leave out use_cache=False.")
    _check_decoder(handle, setting, "cut")
    cache = cache_given(type(handle.model), kwargs)
    why = None if cache is None else refusal(cache, handle.cuttable)
    if why is not None:
        raise VlmpruneError(f"{method} {why}")


def check_dropping(handle: Handle, kwargs: dict[str, Any], setting: Callable[[str], Any]) -> None:
    """Refuse, before any work, what a method whose layers lack rows cannot do."""
    method = repr(handle.pruner)
    model = handle.model
    _check_decoder(handle, setting, "drop tokens from")
    if setting("prefill_chunk_size"):
        raise VlmpruneError(
            f"{method} chooses from the whole prompt; leave out prefill_chunk_size."
        )
    if families.recomputes(model):
        raise VlmpruneError(
            f"{method} cannot drop tokens from layers that run twice; turn gradient checkpointing "
            "off."
        )
    config = model.config.get_text_config(decoder=True)
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    columns = max(t.shape[1] for t in (mask, ids) if t is not None) if ids is not None else 0
    if getattr(config, "attn_temperature_tuning", False) and columns >= config.floor_scale:
        raise VlmpruneError(
            f"{type(model).__name__} scales queries by their number from token "
            f"{config.floor_scale} on, which dropping tokens in its layers would change, and this "
            f"prompt has {columns}; shorten it, or prune before the language model."
        )
    cache = cache_given(type(handle.model), kwargs)
    layers = handle.skips or range(min(handle.asks), config.num_hidden_layers)
    why = None if cache is None else short.refusal(cache, layers)
    if why is not None:
        raise VlmpruneError(f"{method} {why}")


def _check_decoder(handle: Handle, setting: Callable[[str], Any], does: str) -> None:
    """Refuse what changes caches and attention inside the language model cannot go with.

    Args:
        handle: the attachment.
        setting: looks a setting of the call up.
        does: what the method does to caches.
    """
    method = repr(handle.pruner)
    config = handle.model.config.get_text_config()
    if setting("output_attentions") or getattr(config, "output_attentions", False):
        raise VlmpruneError(
            f"{method} has no full attention weights to return; leave out output_attentions."
        )
    kind = setting("cache_implementation")
    if kind not in (None, "dynamic", "dynamic_full", "offloaded"):
        raise VlmpruneError(
            f"{method} cannot {does} a cache of cache_implementation={kind!r}; leave it out, for "
            "the dynamic cache."
        )
    if config._attn_implementation == "flex_attention":
        raise VlmpruneError(
            f"{method} does not work with flex_attention; load the model with "
            "attn_implementation='sdpa'."
        )
    if is_compiled(handle):
        raise VlmpruneError(
            f"{method} does not work with a compiled model, whose graphs pass its cache by; use "
            "the model as it is, or prune before the language model alone."
        )


def is_compiled(handle: Handle) -> bool:
    """Whether the model, or a module of it, was given to `torch.compile`."""
    mark = "_torchdynamo_orig_callable"
    if hasattr(handle.host.original("forward"), mark):
        return True
    return any(
        hasattr(vars(module).get("forward"), mark)
        or type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in handle.model.modules()
    )
