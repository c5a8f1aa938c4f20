"""Windows of a grid and their middle cells, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plain import tiled
from vlmprune.select.windows import centres, windows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.integers(0, 99))
def test_windows_and_their_centres(rows: int, columns: int, side: int, seed: int) -> None:
    """Each cell is in one window; of a window that cell is kept which is nearest its middle."""
    tiles = windows((rows, columns), side)
    want = tiled(rows, columns, side)
    assert [[c for c in tile if c >= 0] for tile in tiles.tolist()] == [
        [cell for _, cell in window] for window in want
    ]
    assert sorted(c for c in tiles.flatten().tolist() if c >= 0) == list(range(rows * columns))
    seen = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = centres(tiles, (rows, columns), seen).tolist()
    for crop in range(2):
        for window, best in zip(want, found[crop], strict=True):
            ys, xs = ([c // columns for _, c in window], [c % columns for _, c in window])
            y, x = (min(ys) + max(ys)) / 2, (min(xs) + max(xs)) / 2
            away = {
                c: (c // columns - y) ** 2 + (c % columns - x) ** 2
                for _, c in window
                if seen[crop, c]
            }
            assert best == (min(away, key=lambda c: (away[c], c)) if away else -1)


@pytest.mark.parametrize(
    ("grid", "side", "count"),
    [(16, 4, 16), (16, 6, 9), (16, 12, 4), (16, 16, 1), (16, 24, 1), (24, 4, 36), (24, 6, 16),
     (24, 12, 4), (24, 24, 1)],
)  # fmt: skip
def test_the_papers_windows(grid: int, side: int, count: int) -> None:
    assert len(windows((grid, grid), side)) == count
