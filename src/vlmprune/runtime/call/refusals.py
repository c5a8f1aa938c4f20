"""What a call may ask for that cannot be pruned: refused by name, before any work."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, decoder
from vlmprune.hosts.compiling import is_compiled
from vlmprune.hosts.release import chunks_hold_images, recomputes_hooks, version
from vlmprune.hosts.requests import (
    ASSISTANT,
    ASSISTING,
    FORWARD,
    ModelCall,
    Settings,
)
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.cache import gapped_layer
from vlmprune.runtime.cache.bound_cache import refusal
from vlmprune.runtime.decoder.missing_rows import lacking


def check_encoded(call: ModelCall) -> None:
    """Refuse images that were encoded before, which would go through whole."""
    if call.encoded:
        raise VlmpruneError(
            "mm_encoder_outputs cannot be pruned; pass pixel_values, or what `handle.encode` "
            "returns as vision."
        )


def check_common(call: ModelCall, ids: Tensor | None) -> None:
    """Refuse inputs that do not show where the images are."""
    if ids is None:
        raise VlmpruneError(
            "inputs_embeds cannot be pruned, for they do not show where the images are; pass "
            "input_ids and pixel_values."
        )
    if call.embeds is not None:
        raise VlmpruneError(
            "inputs_embeds came beside input_ids, and nothing says that they are the same; leave "
            "inputs_embeds out."
        )
    if call.mask is not None and not call.masks_columns:
        form = f"{call.mask.ndim} dimensions" if isinstance(call.mask, Tensor) else "several masks"
        raise VlmpruneError(
            f"attention_mask has {form}; vlmprune needs the plain [batch, length] mask."
        )


def check_newlines(attachment: Attachment, numbers: Iterable[int]) -> None:
    """Refuse to drop newline tokens that the host adds by itself.

    Args:
        attachment: of the method to the model.
        numbers: the modality of each item of the request.
    """
    if attachment.method.newlines == "keep":
        return
    for medium in (attachment.family.media[number] for number in sorted(set(numbers))):
        if medium.adds_newlines:
            raise VlmpruneError(
                f"newlines='drop' cannot be had for {medium.kind}s here, for transformers "
                f"{version()} adds the newline tokens of {type(attachment.model).__name__} in its "
                "forward; use "
                "newlines='keep', or a later release of Transformers."
            )


def check_positions(attachment: Attachment, given: Tensor) -> None:
    """Refuse positions of another kind than the model has."""
    if given.ndim > 2 and attachment.family.rope is None:
        raise VlmpruneError(
            f"position_ids have {given.ndim} dimensions, but a column of "
            f"{type(attachment.model).__name__} has one position; pass [batch, length], or leave "
            "them out."
        )


def check_placed(attachment: Attachment, call: ModelCall) -> None:
    """Refuse positions for a model of which placeholders alone are known, packed samples' too."""
    if call.positions is not None:
        raise VlmpruneError(
            f"position_ids of {type(attachment.model).__name__}, which is in no record, cannot be "
            "shortened; leave them out."
        )


def check_unpacked(call: ModelCall) -> None:
    """Refuse what says where packed samples lie, in a call that holds none."""
    for name in call.packing:
        raise VlmpruneError(
            f"{name} tells of packed samples, which can be pruned in a plain forward with "
            "position_ids that start anew, without attention_mask and with use_cache=False; leave "
            f"{name} out otherwise."
        )


def check_packable(attachment: Attachment) -> None:
    """Refuse packed samples under methods that act where only the host knows their borders."""
    method = attachment.method
    if method.cuts or attachment.asks or attachment.skips:
        raise VlmpruneError(
            f"{method!r} cannot tell packed samples apart inside the language model; pad them "
            "instead, or prune before the language model alone."
        )


def check_generate(call: ModelCall, ids: Tensor | None, setting: Settings) -> None:
    """Refuse what `generate` cannot do with fewer tokens."""
    check_common(call, ids)
    check_unpacked(call)
    if setting.assisted:
        raise VlmpruneError(
            f"vlmprune does not support assisted decoding; leave out {ASSISTANT}, "
            f"{', '.join(ASSISTING[:-1])} and {ASSISTING[-1]}."
        )
    if setting.chunked and not chunks_hold_images():
        raise VlmpruneError(
            "before 5.23 transformers loses images, and in some releases earlier turns, under "
            "prefill_chunk_size; leave it out, or upgrade transformers."
        )


def check_cutting(attachment: Attachment, call: ModelCall, setting: Settings) -> None:
    """Refuse, before any work, what a method that cuts caches cannot do."""
    method = repr(attachment.method)
    if not setting.caches:
        does = "reads the KV cache in part" if attachment.method.recalls else "cuts the KV cache"
        raise VlmpruneError(f"{method} {does} and needs one; leave out use_cache=False.")
    _check_decoder(attachment, setting, "read a part of" if attachment.method.recalls else "cut")
    cache = call.cache
    why = None if cache is None else refusal(cache, attachment.cuttable, attachment.method)
    if why is not None:
        raise VlmpruneError(f"{method} {why}")


def check_dropping(attachment: Attachment, call: ModelCall, setting: Settings) -> None:
    """Refuse, before any work, what a method whose layers lack rows cannot do."""
    method = repr(attachment.method)
    model = attachment.model
    _check_decoder(attachment, setting, "drop tokens from")
    if setting.chunked:
        raise VlmpruneError(
            f"{method} chooses from the whole prompt; leave out prefill_chunk_size."
        )
    if decoder.recomputes(model) and recomputes_hooks():
        raise VlmpruneError(
            f"{method} cannot drop tokens from layers that run twice, for transformers {version()} "
            "runs them without what drops the tokens; turn gradient checkpointing off, or upgrade "
            "transformers."
        )
    mask, ids, tempered = call.mask, call.ids, config.tempered_from(model.config)
    columns = max(t.shape[1] for t in (mask, ids) if t is not None) if ids is not None else 0
    if tempered is not None and columns >= tempered:
        raise VlmpruneError(
            f"{type(model).__name__} scales queries by their number from token {tempered} on, "
            "which dropping tokens in its layers would change, and this prompt has "
            f"{columns}; shorten it, or prune before the language model."
        )
    cache = call.cache
    layers = lacking(attachment.asks, attachment.skips, len(decoder.decoder_layers(model)))
    why = None if cache is None else gapped_layer.refusal(cache, layers)
    if why is not None:
        raise VlmpruneError(f"{method} {why}")


def _check_decoder(attachment: Attachment, setting: Settings, does: str) -> None:
    """Refuse what changes caches and attention inside the language model cannot go with.

    Args:
        attachment: of the method to the model.
        setting: settings of the call.
        does: what the method does to caches.
    """
    method = repr(attachment.method)
    if setting.attentions:
        raise VlmpruneError(
            f"{method} has no full attention weights to return; leave out output_attentions."
        )
    if setting.cache_kind is not None:
        raise VlmpruneError(
            f"{method} cannot {does} a cache of cache_implementation={setting.cache_kind!r}; leave "
            "it out, for the dynamic cache."
        )
    text = config.of_text(attachment.model.config)
    if config.attention_implementation(text) == "flex_attention":
        raise VlmpruneError(
            f"{method} does not work with flex_attention; load the model with "
            "attn_implementation='sdpa'."
        )
    if is_compiled(attachment.model, attachment.originals[FORWARD]):
        raise VlmpruneError(
            f"{method} does not work with a compiled model, whose graphs pass its cache by; use "
            "the model as it is, or prune before the language model alone."
        )


def check_flash(attachment: Attachment, ids: Tensor) -> None:
    """Refuse gaps in the positions where flash attention takes them for packed samples."""
    kind = config.attention_implementation(config.of_text(attachment.model.config))
    gaps = attachment.positions == "original" and attachment.family.rope is None
    if "flash" in kind and gaps and ids.shape[0] == 1:
        raise VlmpruneError(
            f"positions='original' leaves gaps that {kind} takes for packed sequences at batch 1; "
            "load the model with attn_implementation='sdpa', or use positions='compact'."
        )


def check_picks(attachment: Attachment, call: ModelCall) -> None:
    """Refuse a plain forward that asks for the logits of single columns, unless it has its own."""
    if isinstance(call.picks, Tensor) and attachment.logits != "full":
        raise VlmpruneError(
            "logits_to_keep as a tensor counts columns that pruning removes; pass an int, or "
            "attach with logits='full'."
        )


def check_inside(attachment: Attachment, call: ModelCall, setting: Settings, caching: bool) -> None:
    """Refuse, before any work, what a method inside the language model cannot do.

    Args:
        attachment: of the method to the model.
        call: the call.
        setting: its settings.
        caching: whether it fills a cache.
    """
    method = attachment.method
    if method.cuts and (caching or method.probes is not None):
        check_cutting(attachment, call, setting)
        if not caching and decoder.recomputes(attachment.model):
            raise VlmpruneError(
                f"{method!r} takes part in attention, which is computed twice here, and cuts a "
                "cache, which is not there; turn gradient checkpointing off."
            )
    if attachment.asks or attachment.skips:
        check_dropping(attachment, call, setting)
