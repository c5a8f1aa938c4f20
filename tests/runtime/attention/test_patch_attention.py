"""Attention among patches: in chunks, and in memory linear in tokens."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmprune.hosts.attention import read
from vlmprune.runtime.attention import taps


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.sampled_from([None, 0, -1]),
    st.integers(1, 4), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_patch_attention_in_chunks(
    batch: int, groups: int, length: int, cls: int | None, chunk: int, masked: bool, seed: int
) -> None:
    """Restated in plain float64 with the whole matrix, with grouped keys and padding."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 2 * groups, length, 5, generator=generator)
    key = torch.randn(batch, groups, length, 5, generator=generator)
    real = torch.rand(batch, length, generator=generator) > 0.3 if masked else None
    before = taps.CHUNK
    try:
        taps.CHUNK = chunk
        found = taps.patch_attention(read(nn.Identity(), query, key, 0.7, mask=real), cls)
    finally:
        taps.CHUNK = before
    scores = query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) * 0.7
    patches = list(range(length))
    if cls is not None:
        patches.pop(cls)
    for b in range(batch):
        sees = [j for j in range(length) if real is None or real[b, j]]
        weights = torch.zeros(length, length, dtype=torch.double)
        for i in sees:
            weights[i, sees] = scores[b, :, i, sees].softmax(dim=-1).mean(dim=0)
        among = [i for i in patches if i in sees]
        want = torch.zeros(length, 2, dtype=torch.double)
        for i in among:
            want[i, 0] = weights[among, i].mean()
            want[i, 1] = weights[i, among].mean()
        torch.testing.assert_close(found[b].double(), want, rtol=0, atol=1e-6)


def test_memory_is_linear_in_tokens() -> None:
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
            out = function(*args, **(kwargs or {}))
            largest.append(max(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)))
            return out

    query = torch.randn(1, 2, 1000, 4)
    with Sizes():
        taps.patch_attention(read(nn.Identity(), query, query, 0.5), 0)
    assert max(largest) == 2 * taps.CHUNK * 1000
