"""What a decoder cannot is told at attach, before any call."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tiny import model
from vlmprune import PLPHP, Recall, VisPruner, VlmpruneError


@pytest.mark.parametrize(
    ("pruner", "does"), [(PLPHP(), "cut"), (Recall(), "read in part")], ids=repr
)
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
