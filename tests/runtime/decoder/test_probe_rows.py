"""What probe rows see of a layer, behind what an earlier turn left there and without a mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.parallel import WHOLE
from vlmprune.runtime.decoder.probe_rows import probed
from vlmprune.views import LayerView


@pytest.mark.parametrize("masked", [False, True], ids=["causal by itself", "a mask"])
@pytest.mark.parametrize("start", [0, 3])
def test_rows_see_the_columns_up_to_their_own(start: int, masked: bool) -> None:
    tail, heads, width, scale = 5, 4, 8, 0.3
    generator = torch.Generator().manual_seed(start)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query, keys = drawn(1, heads, tail, width), drawn(1, 2, tail, width)
    lines = torch.ones(tail, tail).tril().bool()[None, None] if masked else None
    call = AttentionCall(nn.Identity(), query, keys, keys, lines, {"scaling": scale})
    layer = SimpleNamespace(start=start, sharing=WHOLE)
    shown = SimpleNamespace(layer=layer, prefix=None, keys=keys, values=keys)
    nothing = torch.zeros(1, 0)
    view = LayerView(nothing, nothing, nothing, 2, nothing, 0)
    asked = [1, 2, 4]
    # A row that a sample lacks counts for nothing.
    columns = torch.tensor([[-1, *(start + row for row in asked)]])
    mask = torch.ones(1, start + tail, dtype=torch.bool)
    places = torch.tensor([[start, start + 2]])
    seen: Any = SimpleNamespace(shown=shown, times=1)
    found = probed(view, seen, call, columns, mask, places)

    sums, counts = torch.zeros(tail), torch.zeros(tail, dtype=torch.long)
    for row in asked:
        counts[: row + 1] += 1
        for head in range(heads):
            products = keys[0, head // 2, : row + 1] @ query[0, head, row] * scale
            sums[: row + 1] += products.softmax(dim=0) / heads
    assert found.sums is not None and torch.allclose(found.sums[0], sums, atol=1e-6)
    assert found.seen is not None and found.seen[0].tolist() == counts.tolist()
    assert found.places is not None and found.places.tolist() == [[0, 2]]
