"""Merge plans: their sums, and what they may merge into."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.runtime.encoder import merging as library
from vlmprune.views import Merge
from vlmprune.views.layout import Layout


def test_a_plan_must_merge_into_what_is_kept() -> None:
    layout = Layout(torch.arange(4), 1, (2, 2))
    merge = Merge(torch.tensor([1]), torch.tensor([0]), torch.ones(1))
    kept = torch.tensor([[True, False, True, True]])
    with pytest.raises(ValueError, match="not kept"):
        library.merged(
            merge, kept, [layout], torch.ones(1, 4, 2), [torch.ones(4, 2)], [lambda f: f]
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 99))
def test_sums(cells: int, entries: int, seed: int) -> None:
    """Any plan, restated in plain Python; the order of entries of a sum is kept."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(cells, 3, generator=generator)
    into, source = (torch.randint(cells, (entries,), generator=generator) for _ in range(2))
    merge = Merge(into, source, torch.randn(entries, generator=generator))
    found, places = library.targets(merge)
    sums = library.summed(values, merge, places, len(found))
    assert found.tolist() == sorted(set(into.tolist()))
    for cell, got in zip(found.tolist(), sums, strict=True):
        want = torch.zeros(3)
        for i, s, w in zip(into.tolist(), source.tolist(), merge.weight.tolist(), strict=True):
            want = want + (values[s] * w if i == cell else 0)
        torch.testing.assert_close(got, want)


def test_a_cell_has_a_token_or_none() -> None:
    """Of two crops, some of whose cells the host cuts away, and a newline."""
    layout = Layout(torch.tensor([3, 0, -1, 5]), 2, (1, 4))
    assert library.places_of(layout).tolist() == [1, -1, -1, 0, -1, 3, -1, -1]
    tokens = torch.arange(1.0, 9).view(4, 2)
    every = library.per_cell(layout, tokens)
    assert torch.equal(every[[3, 0, 5]], tokens[[0, 1, 3]])
    assert not every[[1, 2, 4, 6, 7]].any()
