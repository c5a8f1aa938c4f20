"""The three ways of thinning a list of tokens choose alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.select import duplicates


def exact(crops: int, tokens: int, kinds: int, seed: int) -> Tensor:
    """[B, N, 64] vectors of eights and their negatives, whose cosines no product rounds.

    Args:
        crops: B.
        tokens: N.
        kinds: how many differ; few make many ties.
        seed: of the draw.
    """
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (crops, kinds, 64), generator=draw) * 16.0 - 8
    which = torch.randint(0, kinds, (crops, tokens), generator=draw)
    return signs.gather(1, which[..., None].expand(-1, -1, 64))


def orders(crops: int, tokens: int, left: int) -> Tensor:
    """[B, R] of N tokens, in another order in each crop."""
    return torch.stack([torch.randperm(tokens)[:left] for _ in range(crops)])


@given(
    tokens=st.integers(2, 150),
    out=st.integers(0, 20),
    kinds=st.integers(1, 150),
    seed=st.integers(0, 999),
    data=st.data(),
)
@settings(max_examples=60)
def test_few_neighbours_and_all_similarities_choose_alike(
    tokens: int, out: int, kinds: int, seed: int, data: st.DataObject
) -> None:
    left = max(1, tokens - out)
    keep = data.draw(st.integers(1, left))
    features, order = exact(2, tokens, kinds, seed), orders(2, tokens, left)
    with pytest.MonkeyPatch.context() as patch:
        whole = duplicates.thinned(order, features, keep)
        # Not even one list's similarities fit, and a token's nearest are soon all gone.
        patch.setattr(duplicates, "BLOCK", 300)
        patch.setattr(duplicates, "NEAREST", 3)
        few = duplicates.thinned(order, features, keep)
    numbered = order.sort(dim=1, descending=True)
    given = features, numbered.values, numbered.indices.argsort(dim=1), keep
    anywhere = numbered.values.gather(1, duplicates._on_any_device(*given))
    # To the last place, for places decide what the next round compares.
    assert torch.equal(whole, few) and torch.equal(whole, anywhere)


def test_what_is_nearest_is_asked_anew_among_all_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: neighbours that are looked up once alone choose otherwise."""
    features, order = exact(1, 120, 120, 3), orders(1, 120, 120)
    whole = duplicates.thinned(order, features, 10)
    monkeypatch.setattr(duplicates, "BLOCK", 300)
    monkeypatch.setattr(duplicates, "NEAREST", 3)
    assert torch.equal(whole, duplicates.thinned(order, features, 10))
    first = duplicates._Nearest(duplicates.unit_rows(features[0], torch.arange(120)))

    class Stale(duplicates._Nearest):
        def __init__(self, unit: Tensor) -> None:
            self._similarity, self._places = first._similarity, first._places
            self._odd = first._odd

        def _found(self, rows: duplicates.Array, left: duplicates.Array) -> object:  # type: ignore[override]
            return iter([first._similarity[rows][:, :1].repeat(len(left), axis=1)])

    monkeypatch.setattr(duplicates, "_Nearest", Stale)
    assert not torch.equal(whole, duplicates.thinned(order, features, 10))


@pytest.mark.parametrize("block", [1 << 22, 300])
def test_features_of_no_length_are_like_nothing(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    features, order = exact(1, 60, 60, 5), orders(1, 60, 60)
    features[:, ::9] = 0
    # As long as the others, and square to them and to each other.
    apart = torch.cat((features, torch.zeros(1, 60, 7)), dim=2)
    apart[0, ::9, 64:] = 64 * torch.eye(7)
    kept = duplicates.thinned(order, features, 20)
    assert torch.equal(kept, duplicates.thinned(order, apart, 20))
    assert not torch.equal(kept, duplicates.thinned(order, features + 1, 20))


def test_a_long_list_holds_few_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    matmul = Tensor.__matmul__

    def counted(left: Tensor, right: Tensor) -> Tensor:
        product = matmul(left, right)
        made.append(product.numel())
        return product

    monkeypatch.setattr(Tensor, "__matmul__", counted)
    monkeypatch.setattr(duplicates, "BLOCK", 5000)
    duplicates.thinned(orders(1, 400, 400), torch.randn(1, 400, 16), 40)
    assert len(made) > 400 * 400 // 5000
    assert max(made) <= 5000
