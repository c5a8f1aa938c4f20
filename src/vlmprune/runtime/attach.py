"""From a method and a model to an attachment's data, once it is sure that they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import (
    attention,
    caches,
    config,
    contract,
    decoder,
    deltas,
    families,
    generation,
    release,
    requests,
)
from vlmprune.hosts.attention_registry import check_tappable
from vlmprune.hosts.families import Family
from vlmprune.method import Method
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.cache.bound_cache import kind_of
from vlmprune.runtime.cache.gapped_layer import GappedLayer
from vlmprune.runtime.decoder import checks
from vlmprune.runtime.encoder import acting, reads
from vlmprune.runtime.family import family_of


def attachment_of(method: Method, model: nn.Module) -> Attachment:
    """What an attachment of a method to a model knows.

    Raises:
        VlmpruneError: they do not fit, or the release of Transformers does not; one sentence says
            why.
    """
    release.check_release()
    model = families.unwrapped(model)
    family = family_of(model, method)
    release.check_class(model, family.fails)
    reads.check(model, family, method)
    if contract.checks():
        _check_contract(model, family, method)
    acting.check(model, family, method)
    positions = checks.entering_positions(model, family, method)
    cuttable = decoder.full_attention_layers(model, _lends(method)) if method.cuts else []
    if method.cuts:
        _check_decoder(model, method, cuttable)
    asks, skips = checks.missing(model, family, method)
    decoder_positions = checks.resolve_positions(model, family, method)
    if method.drops:
        found = f"the schedule of {method!r} was found on"
        way = "run `vlmprune search` on this one"
        _check_origin(model, method.dropper.calibrated_on, found, way)
    said: Any = model.config
    return Attachment(
        method,
        model,
        family,
        positions,
        [config.placeholder(said, medium.token) for medium in family.media],
        config.pad_id(said),
        cuttable,
        asks,
        skips,
        decoder_positions,
    )


def _check_contract(model: Any, family: Family, method: Method) -> None:
    """Refuse what the release does otherwise, by signatures alone."""
    requests.check_model(model, [medium.inputs[0] for medium in family.media], not family.counted)
    generation.check_made(model)
    if family.rope is not None:
        deltas.deltas_of(model)
    if method.shortens and method.attends:
        for medium in family.media:
            layers = {type(one): one for one in medium.encoder(model, {}).layers}
            for layer in layers.values():
                check_tappable(layer, "use a method that does not look at attention")
    if method.drops or method.routes or method.cuts:
        decoder.check_counted(model)
    if method.drops or method.routes:
        decoder.check_layers(model)
        caches.check_layers(caches.GrowingLayer, GappedLayer)
    if method.cuts:
        caches.check_layers(caches.GrowingLayer, kind_of(method))
        own = decoder.full_attention_layers(model, _lends(method))
        for index in (*own, *decoder.borrowing_layers(model)):
            layer = decoder.decoder_layers(model)[index]
            check_tappable(layer, "prune before the language model")
    if method.drops or method.routes or method.cuts:
        caches.check_made(model)


def _lends(method: Method) -> bool:
    """Whether a layer that a method acts on may be one that later layers attend to.

    What is cut after prefill is gone for all of them alike; what one reads at a step, or attends to
    while a prompt is read, was chosen by its own queries.
    """
    return not method.recalls and method.probes is None


def _check_decoder(model: Any, method: Method, cuttable: Sequence[int]) -> None:
    does = "read in part" if method.recalls else "cut"
    way = "run `vlmprune calibrate` on it, or give alpha and beta yourself"
    _check_origin(model, method.calibrated_on, "the thresholds were calibrated on", way)
    if config.is_latent(model.config):
        raise VlmpruneError(
            f"{type(model).__name__} has a language model that caches a latent (multi-head latent "
            f"attention), which {method!r} cannot {does}; prune before the language model."
        )
    if config.is_capped(model.config):
        raise VlmpruneError(
            f"{type(model).__name__} has a language model whose attention is capped "
            f"(attn_logit_softcapping), which {method!r} cannot {does}; prune before the "
            "language model."
        )
    if not cuttable:
        kinds = sorted({kind.replace("_", " ") for kind in config.layer_kinds(model.config)})
        borrow, lend = config.sharing_layers(model.config)
        shares = ", some sharing keys and values" * bool(borrow | lend)
        raise VlmpruneError(
            f"{type(model).__name__} has layers of {', '.join(kinds)}{shares}, all of which "
            f"{method!r} leaves whole; prune before the language model."
        )
    layers = decoder.decoder_layers(model)
    for index in cuttable:
        decoder.check_attended(model, index, cut=True)
        if index >= len(layers) or attention.attentions_in(layers[index]) > 1:
            raise VlmpruneError(
                f"the decoder layers of {type(model).__name__} attend several times each, whose "
                f"caches {method!r} cannot {does}; prune before the language model."
            )
        if attention.sinks_of(attention.attention_of(layers[index])):
            raise VlmpruneError(
                f"{type(model).__name__} has a language model with attention sinks, which take a "
                f"share of attention that {method!r} does not follow; prune before the language "
                "model."
            )


def _check_origin(model: Any, origin: str | None, found: str, way: str) -> None:
    """Refuse settings that were measured on another architecture than the model's."""
    here = families.architecture(model)
    if origin is not None and origin != here:
        raise VlmpruneError(f"{found} another model ({origin}) than this ({here}); {way}.")
