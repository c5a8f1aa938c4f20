"""Which rows are probes, and attention among chosen tokens: hand-made and plain restatements."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import subset
from vlmprune.runtime.attention.ragged import Ragged
from vlmprune.runtime.decoder.probe_rows import drawn
from vlmprune.views import Probes


def asking(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, flash: bool
) -> AttentionCall:
    module: Any = nn.Identity()
    module.config = SimpleNamespace(_attn_implementation="flash_attention_2" if flash else "sdpa")
    return AttentionCall(module, query, key, value, mask, {"scaling": scale})


def test_probes_do_not_depend_on_the_batch() -> None:
    mask = torch.zeros(3, 50, dtype=torch.bool)
    mask[0], mask[1, 20:], mask[2, :6] = True, True, True
    found = drawn(mask, Probes(4, 8, seed=1))
    rows = [[n for n in row if n >= 0] for row in found.tolist()]
    assert rows[0][-4:] == [46, 47, 48, 49] and rows[1][-4:] == [46, 47, 48, 49]
    assert rows[2] == [0, 1, 2, 3, 4, 5]
    for row, start in ((rows[0], 0), (rows[1], 20)):
        assert len(set(row)) == 12 and min(row) >= start and row == sorted(row)
    alone = drawn(mask[1:2, 20:], Probes(4, 8, seed=1))
    assert [n + 20 for n in alone[0].tolist()] == rows[1]
    assert drawn(mask[:1], Probes(4, 8, seed=2)).tolist() != drawn(mask[:1], Probes(4, 8)).tolist()


@pytest.mark.parametrize("rows", [[2, 2], [4, 1]])
def test_masks_of_flash_attention(rows: list[int]) -> None:
    """Where attention is causal by itself, masks tell padding alone, or are left out."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = torch.randn(3, 2, 1, 5, 4, generator=generator)
    chosen = torch.arange(5) >= 5 - torch.tensor(rows)[:, None]
    chosen[0, :2] = chosen[0, :2].flip(0)
    seen: list[Any] = []

    def plain(few: AttentionCall) -> tuple[Tensor]:
        seen.append(few.mask)
        visible = torch.ones(few.query.shape[2], few.key.shape[2], dtype=torch.bool).tril()
        if few.mask is not None:
            visible = visible & few.mask[:, None, None]
        scores = (few.query @ few.key.transpose(2, 3)).masked_fill(~visible, -torch.inf)
        return ((scores.softmax(-1).nan_to_num() @ few.value).transpose(1, 2),)

    calls = [
        subset.attend(plain, asking(query, keys, values, mask, 1.0, True), chosen, None)
        for mask in (None, torch.ones(2, 5, dtype=torch.long))
    ]
    assert (seen[0] is None) == (rows[0] == rows[1])
    for b in range(2):
        for i in range(5):
            own = [j for j in range(i + 1) if chosen[b, j]] if chosen[b, i] else []
            expected = torch.zeros(4)
            if own:
                expected = (keys[b, 0, own] @ query[b, 0, i]).softmax(0) @ values[b, 0, own]
            for out in calls:
                assert torch.allclose(out[b, i, 0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "padding", "bool", "additive", "one for all"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("ahead", [0, 3])
def test_every_kind_of_mask(kind: str, prefix: bool, ahead: int) -> None:
    """Attention restated row by row, with columns before the first row and a cut cache's prefix."""
    generator = torch.Generator().manual_seed(1)
    batch, heads, group, rows, width = 3, 2, 2, 6, 4
    total = ahead + rows
    query = torch.randn(batch, heads * group, rows, width, generator=generator)
    keys, values = torch.randn(2, batch, heads, total, width, generator=generator)
    real = torch.arange(total) >= torch.tensor([[0], [2], [1]])
    chosen = (torch.rand(batch, total, generator=generator) < 0.6) & real
    chosen[:, -1] = True
    chosen[2] = real[2]
    seen = torch.ones(batch, 1, rows, total, dtype=torch.bool).tril(ahead)
    if kind == "none":
        real[:] = True
    elif kind == "one for all":
        # As Transformers makes it without padding; here rows see all that is not after them by 2.
        seen = torch.ones(1, 1, rows, total, dtype=torch.bool).tril(ahead + 2)
        real[:] = True
    if kind != "one for all":
        seen = seen & real[:, None, None]
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    # Columns that a cut cache no longer has lie before.
    before = 2 * prefix
    masks: dict[str, Any] = {"none": None, "padding": real.long(), "bool": seen}
    masks |= {"additive": additive, "one for all": seen}
    mask = masks[kind]
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (before, 0), value=int(mask.dtype != torch.float32))
    held = torch.randn(2, batch, heads, 2, width, generator=generator)
    keep = torch.ones(batch, heads, 2, dtype=torch.bool)
    keep[0, 1, 0] = False
    cut = Ragged.cut(*held, keep) if prefix else None

    def plain(few: AttentionCall) -> tuple[Tensor]:
        q, given = few.query, few.mask
        k, v = few.key.repeat_interleave(group, 1), few.value.repeat_interleave(group, 1)
        if given is None:
            given = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        if given.ndim == 2 and kind == "padding":
            given = given[:, None, None] & torch.ones(q.shape[2], k.shape[2]).bool().tril(
                k.shape[2] - q.shape[2]
            )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, given)
        return (out.transpose(1, 2),)

    call = asking(query, keys, values, mask, width**-0.5, kind == "padding")
    out = subset.attend(plain, call, chosen, cut)
    for b in range(batch):
        for h in range(heads * group):
            own = h // group
            for i in range(rows):
                expected = torch.zeros(width)
                if chosen[b, ahead + i]:
                    sees = seen[b % len(seen), 0, i] & chosen[b]
                    k, v = keys[b, own, sees], values[b, own, sees]
                    if prefix:
                        k = torch.cat((held[0, b, own, keep[b, own]], k))
                        v = torch.cat((held[1, b, own, keep[b, own]], v))
                    expected = (k @ query[b, h, i] * width**-0.5).softmax(0) @ v
                assert torch.allclose(out[b, i, h], expected, atol=1e-5)
