"""What a decoder cannot is told at attach, before any call."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tiny import model
from vlmprune import PLPHP, Recall, VisPruner, VlmpruneError
from zoo import ZOO

CACHING = [(PLPHP(), "cut"), (Recall(), "read in part")]


@pytest.mark.skipif("mistral_large4" not in ZOO, reason="this release has no such decoder")
@pytest.mark.parametrize(("pruner", "does"), CACHING, ids=repr)
def test_a_cache_of_latents_stays_whole(pruner: Any, does: str) -> None:
    built = ZOO["mistral_large4"].build()
    said = (
        f"^{type(built).__name__} has a language model that caches a latent .multi-head latent "
        f"attention., which {type(pruner).__name__}.* cannot {does}; prune before the language"
    )
    with pytest.raises(VlmpruneError, match=said):
        pruner.attach(built)
    VisPruner(keep=4).attach(built).detach()


@pytest.mark.parametrize(("pruner", "does"), CACHING, ids=repr)
def test_layers_that_attend_several_times_keep_their_caches(pruner: Any, does: str) -> None:
    built = model()
    layer = built.model.language_model.layers[1]
    pruner.attach(built).detach()
    layer.cross_attn = copy.deepcopy(layer.self_attn)
    said = (
        f"^the decoder layers of Llava.* attend several times each, whose caches .* cannot {does};"
    )
    with pytest.raises(VlmpruneError, match=said):
        pruner.attach(built)
    VisPruner(keep=4).attach(built).detach()
