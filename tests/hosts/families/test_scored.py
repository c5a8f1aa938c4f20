"""The layer whose attention scores is the one that the report names."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vlmprune.runtime.family import family_of
from zoo import ZOO

NAMED = re.compile(r"(?:encoder layer|full-attention block) (\d+)")


@pytest.mark.parametrize("family", ZOO)
def test_the_layer_that_scores_is_the_one_that_is_named(family: str) -> None:
    entry = ZOO[family]
    model = entry.build()
    modality: Any = entry.modalities[0]
    inputs = entry.request(model, [[modality]], text=[3]).inputs
    found = 0
    for medium in family_of(model).media:
        if medium.unattended or not all(name in inputs for name in medium.inputs[:1]):
            continue
        own = {name: one for name, one in inputs.items() if name in medium.inputs}
        scored = medium.scored(model, own)
        number = NAMED.search(scored.words)
        if number is not None:
            encoder = medium.encoder(model, own)
            assert scored.layer is encoder.layers[int(number[1])]
            assert [one is scored.layer for one in encoder.layers].count(True) == 1
            found += 1
    assert found or all(one.unattended for one in family_of(model).media)
