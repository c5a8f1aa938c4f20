"""Tokens that leave an encoder: where, how many, and what becomes of them, by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from plain_evit import left_each_time
from vlmprune.select import leaving


def test_layers_are_the_papers() -> None:
    assert leaving.spread(12) == (3, 6, 9)
    assert leaving.spread(23) == (5, 11, 17)
    assert leaving.spread(3) == (0, 1, 2) and leaving.spread(2) == (0, 1)
    assert leaving.spread(1) == (0,)


def test_numbers_are_the_papers() -> None:
    # DeiT's 196 patches at its keep rate of 0.7, after layers 3, 6 and 9: 138, 97 and 68, each
    # rounded up by itself there. Here the share is that of all three.
    assert leaving.leaves(196, 68, 3) == (58, 41, 29)
    assert leaving.leaves(256, 32, 3) == (128, 64, 32)
    assert leaving.leaves(16, 16, 3) == (0, 0, 0)
    assert leaving.leaves(16, 6, 1) == (10,)


@given(st.integers(1, 800), st.integers(1, 4), st.data())
def test_numbers(tokens: int, times: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    goes, left = leaving.leaves(tokens, keep, times), []
    for count in goes:
        tokens -= count
        left.append(tokens)
    assert left == left_each_time(tokens + sum(goes), keep, times)


def test_highest_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.2, 0.9, 0.0, 0.4, 0.4]])
    every = torch.arange(4)[None]
    members = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    # Means 0.3, 0.2, 0.45, 0.4.
    assert leaving.highest(scores, every, members, 2).tolist() == [[2, 3]]
    # Cell 2 left before, whatever its patches have.
    assert leaving.highest(scores, torch.tensor([[0, 1, 3]]), members, 2).tolist() == [[0, 3]]
    # Ties go to the lower one.
    assert leaving.highest(torch.ones(1, 8), every, members, 3).tolist() == [[0, 1, 2]]


def test_leaving_by_hand() -> None:
    states = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    scores = torch.tensor([[0.9, 0.2, 0.6, 0.3]])
    one = leaving.Leaving.of(scores, torch.tensor([[0, 2]]), fuse=True)
    mean = one.mean(states)
    # 2 · 0.2 + 8 · 0.3 = 2.8, not divided by 0.5.
    assert torch.allclose(one.before(states), torch.tensor([[[1.0], [4.0], [2.8]]]))
    added = torch.tensor([[[10.0], [20.0], [30.0]]])
    behind = states + one.back(added)
    assert torch.allclose(behind, torch.tensor([[[11.0], [32.0], [24.0], [38.0]]]))
    assert torch.allclose(one.after(behind, mean), torch.tensor([[[11.0], [24.0], [32.8]]]))
    gone = leaving.Leaving.of(scores, torch.tensor([[0, 2]]), fuse=False)
    assert gone.before(states).tolist() == [[[1.0], [4.0]]]
    assert gone.after(behind, gone.mean(states)).tolist() == [[[11.0], [24.0]]]
