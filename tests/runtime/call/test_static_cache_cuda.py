"""Compiled decoding on a GPU, where `generate` compiles the step by itself."""

from __future__ import annotations

import pytest
import torch

from answers import generate
from tiny import model, request
from vlmprune import VisPruner

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("images", [[1], [1, 2]], ids=["alone", "padded"])
def test_a_compiled_step_answers_as_a_plain_one(images: list[int]) -> None:
    built = model().cuda()
    inputs = {name: one.cuda() for name, one in request(built, images).inputs.items()}
    torch.compiler.reset()
    with VisPruner(keep=5)(built):
        wanted = generate(built, inputs)
        for _ in range(2):
            found = generate(built, inputs, cache_implementation="static")
            assert torch.equal(found.sequences, wanted.sequences)
    plain = generate(built, inputs)
    off = max(float((a - b).abs().max()) for a, b in zip(found.logits, wanted.logits, strict=True))
    control = max(
        float((a - b).abs().max()) for a, b in zip(plain.logits, wanted.logits, strict=True)
    )
    # A GPU may sum in another order, and round multiplications.
    assert off < 1e-2 < control
