"""Attention masks in all their forms, restated key by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmprune import VlmpruneError
from vlmprune.hosts import masks

LEAST = torch.finfo(torch.float32).min


def forms(padding: Tensor, causal: bool, queries: int, room: int) -> dict[str, Any]:
    """Masks of every form that say the same of `padding` [B, C]; those of four with room behind."""
    columns = padding.shape[1]
    seen = padding[:, None, None].expand(-1, 1, queries, -1)
    if causal:
        seen = seen & torch.ones(queries, columns, dtype=torch.bool).tril(columns - queries)
    roomy = torch.nn.functional.pad(seen, (0, room))
    additive = torch.zeros(roomy.shape).masked_fill(~roomy, LEAST)
    return {
        "padding": torch.nn.functional.pad(padding.long(), (room, 0), value=1),
        "bool": roomy,
        "additive": additive,
        "half": additive.half().clamp(min=torch.finfo(torch.float16).min),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["padding", "bool", "additive", "half"])
def test_every_form_says_the_same(form: str, causal: bool) -> None:
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[1, :3] = False
    ahead = 2
    mask = forms(padding, causal, 5, 3)[form]
    rows, columns = torch.tensor([[0, 4], [3, 1]]), torch.tensor([[6, 0, 2], [1, 5, 4]])
    for given, numbers in ((7, torch.arange(7).expand(2, -1)), (columns, columns)):
        own = mask if given is not columns or mask.ndim == 4 else masks.last(mask, 7)
        found = masks.visible(masks.lines(own, rows, given, ahead if causal else None))
        for b in range(2):
            for i, row in enumerate(rows[b].tolist()):
                for j, column in enumerate(numbers[b].tolist()):
                    sees = bool(padding[b, column]) and (not causal or column <= row + ahead)
                    assert bool(found[b % len(found), 0, i, j]) == sees
    told = masks.seeing(mask, 5, 7, causal)
    assert told is not None
    first = [bool(padding[b, : row + ahead + 1].any()) for b in range(2) for row in range(5)]
    assert told.expand(2, 5).flatten().tolist() == (first if causal else [True] * 10)


def test_without_a_mask_only_later_keys_are_hidden() -> None:
    rows = torch.tensor([[1, 3]])
    assert masks.lines(None, rows, 5, 1)[0, 0].tolist() == [
        [True, True, True, False, False],
        [True] * 5,
    ]
    assert bool(masks.lines(None, rows, 5, None).all())
    assert masks.seeing(None, 4, 5, True) is None


def test_one_line_for_all_queries() -> None:
    line = torch.tensor([0.5, LEAST, 0.0])[None, None, None]
    assert torch.equal(masks.lines(line, torch.tensor([[2, 0]]), 3, None)[0, 0], line[0, 0, [0, 0]])


@pytest.mark.parametrize("form", ["padding", "bool", "additive"])
def test_weights_are_those_of_a_softmax_over_what_is_seen(form: str) -> None:
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, :4] = False
    mask = forms(padding, True, 6, 0)[form]
    scores = torch.randn(2, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    beside = torch.tensor([0.3, -torch.inf])[:, None, None].expand(2, 3, 2)
    # The second sample's first asked row is padding, and sees nothing.
    rows = torch.tensor([[1, 5], [2, 5]])
    lines = masks.lines(mask, rows, 6, 0)
    plain, shared = masks.weights(scores, lines), masks.weights(scores, lines, beside)
    for b, i in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own = [c for c in range(6) if padding[b, c] and c <= rows[b, i]]
        for h in range(3):
            parts = scores[b, h, i, own].double().exp()
            want, both = torch.zeros(2, 6, dtype=torch.double)
            if own:
                want[own] = parts / parts.sum()
                both[own] = parts / (parts.sum() + beside[b, h, i].double().exp())
            torch.testing.assert_close(plain[b, h, i].double(), want, rtol=0, atol=1e-6)
            torch.testing.assert_close(shared[b, h, i].double(), both, rtol=0, atol=1e-6)
    assert not plain[1, :, 0].any()


@pytest.mark.parametrize("queries", [1, 3])
def test_the_tails_mask_follows_what_the_model_was_told(queries: int) -> None:
    tail, columns, device = 5, 9, torch.device("cpu")
    causal = torch.ones(queries, tail, dtype=torch.bool).tril(tail - queries)
    plain = masks.spread(None, queries, tail, device)
    if queries == 1:
        assert plain is None
    else:
        assert plain is not None and torch.equal(plain[0, 0], causal)
    two = torch.ones(2, columns, dtype=torch.long)
    two[1, 5] = 0
    found = masks.spread(two, queries, tail, device)
    assert found is not None
    seen = torch.broadcast_to(found, (2, 1, queries, tail))
    assert torch.equal(seen[0, 0], causal)
    assert not seen[1, 0, :, 1].any() and torch.equal(seen[1, 0, :, 2:], causal[:, 2:])
    four = torch.randn(2, 1, queries, columns)
    kept = masks.spread(four, queries, tail, device)
    assert kept is not None and torch.equal(kept, four[..., 4:])
    with pytest.raises(VlmpruneError, match=r"of object cannot .* attn_implementation='sdpa'"):
        masks.readable(object(), "a cut cache")
