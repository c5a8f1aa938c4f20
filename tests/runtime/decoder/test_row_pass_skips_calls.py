"""Calls whose tokens skip layers: what stays, what is refused, and nothing on the model after."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import StaticCache

from answers import DIFFERENT, distance
from deep import deep, generate, hooks
from sieve import Sieve
from stock import CACHE, cache_of
from tiny import Request, request
from vlmprune import PLPHP, VisPruner, VlmpruneError
from vlmprune.hosts.release import chunks_hold_images
from vlmprune.methods import FastV
from vlmprune.views import Ask, FrameView, Routed, Rows, RowView


def test_nothing_stays_on_the_model() -> None:
    """Neither after a call nor after a failure inside it; other threads run untouched."""
    built = deep()
    req = request(built, [2, 1])
    plain, before = generate(built, req.inputs), hooks(built)
    meanwhile: list[Any] = []

    class Failing(Sieve):
        def route(self, layer: int, view: FrameView) -> Routed:
            if layer == 3:
                raise RuntimeError("on purpose")
            # A text prompt of another thread, while this one is inside the decoder.
            words = {"input_ids": torch.tensor([[1, 7, 8]])}
            thread = threading.Thread(
                target=lambda: meanwhile.append(built.get_decoder()(**words).last_hidden_state)
            )
            thread.start()
            thread.join()
            return super().route(layer, view)

    alone = built.get_decoder()(input_ids=torch.tensor([[1, 7, 8]])).last_hidden_state
    for method, error in ((Sieve(), None), (Failing(), "on purpose")):
        handle = method.attach(built)
        if error is None:
            assert distance(generate(built, req.inputs), plain) > DIFFERENT
        else:
            with pytest.raises(RuntimeError, match=error):
                generate(built, req.inputs)
        handle.detach()
        assert hooks(built) == before
    assert meanwhile and torch.equal(meanwhile[0], alone)
    assert distance(generate(built, req.inputs), plain) == 0


def refusals(built: Any, req: Request, more: Mapping[str, Any], match: str) -> None:
    with pytest.raises(VlmpruneError, match=match):
        generate(built, req.inputs, **more)


class Both(Sieve):
    """Drops tokens, and lets them skip layers."""

    def asks(self, depth: int) -> Mapping[int, Ask]:
        return {2: Ask()}

    def drop(self, layer: int, view: RowView) -> Rows:
        return Rows(view.images >= 0)


def test_refusals() -> None:
    built = deep()
    req = request(built, [1])
    for layer in (0, 5):
        with pytest.raises(VlmpruneError, match=f"skip decoder layer {layer}, and .* 1 to 4"):
            Sieve(layers=(layer,)).attach(built)
    for chained, match in (
        ((Sieve(), Sieve()), "would both skip decoder layers; chain only one"),
        ((Sieve(), PLPHP()), "lets tokens skip decoder layers, whose caches .* cannot cut"),
        ((Sieve(), VisPruner(keep=4)), "inside the language model and must come last"),
        ((FastV(keep=4), Sieve()), "would both skip decoder layers"),
    ):
        with pytest.raises(VlmpruneError, match=match):
            chained[0] | chained[1]
    with pytest.raises(VlmpruneError, match=r"Both\(.* has both `drop` and `route`"):
        Both().attach(built)
    static = StaticCache(config=built.config, max_cache_len=64)
    with Sieve()(built):
        refusals(built, req, {CACHE: static}, "cannot leave columns out of a Static")
        refusals(built, req, {"cache_implementation": "static"}, "cache_implementation='static'")
        # Before 5.23 the host loses images under it, whatever the method.
        why = r"^Sieve\(.* chooses from the whole prompt; le"
        why = why if chunks_hold_images() else "transformers loses images"
        refusals(built, req, {"prefill_chunk_size": 8}, why)
        refusals(built, req, {"output_attentions": True}, "leave out output_attentions")
        cache = cache_of(built(**req.inputs))
    # The model alone would misread it.
    ids = torch.tensor([[7]])
    with pytest.raises(VlmpruneError, match="lacks columns"):
        built(input_ids=ids, **{CACHE: cache})


def test_layers_of_linear_attention_cannot_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    built = deep()
    kinds = ["full_attention", "linear_attention", "full_attention", "full_attention"] * 2
    monkeypatch.setattr("vlmprune.hosts.config.layer_kinds", lambda config: kinds)
    with pytest.raises(VlmpruneError, match=r"decoder layer 1 of .* has linear attention"):
        Sieve().attach(built)
    Sieve(layers=(2, 3)).attach(built).detach()
