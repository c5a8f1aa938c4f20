"""Scores and regular grids: hand-made cases and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmprune.select import scoring


def everything(crops: int, cells: int) -> torch.Tensor:
    return torch.ones(crops, cells, dtype=torch.bool)


def test_layers_are_added_up() -> None:
    layers = [torch.tensor([[1, 2.0]]), torch.tensor([[0.5, 4.0]]), torch.tensor([[8.0, 0]])]
    assert scoring.summed(layers).tolist() == [[9.5, 6.0]]
    assert scoring.summed([layers[0].half()]).dtype == torch.float32


def test_of_two_maps_the_one_that_varies_more() -> None:
    received = torch.tensor([[1.0, 2, 3], [5, 5, 5], [0, 1, 9]])
    given_ = torch.tensor([[2.0, 2, 3], [4, 5, 6], [0, 4, 5]])
    got = scoring.most_varied(received, given_, everything(3, 3))
    assert got.tolist() == [[1, 2, 3], [4, 5, 6], [0, 1, 9]]
    # What the language model does not see has no part in the variance.
    seen = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    got = scoring.most_varied(received, given_, seen)
    assert got.tolist() == [[1, 2, 3], [4, 5, 6], [0, 4, 5]]
    # Of equals, attention received.
    assert scoring.most_varied(received, received.flip(1), everything(3, 3)).equal(received)


def test_whole_rows_of_grids_of_different_size() -> None:
    """Crop 0 is 3 × 2, crop 1 is 2 × 3 and without its middle column."""
    scores = torch.tensor([[1.0, 1, 5, 0, 2, 2], [3, 99, 3, 4, 99, 1]])
    seen = everything(2, 6)
    seen[1, 1] = seen[1, 4] = False
    columns = torch.tensor([2, 3])
    assert scoring.row_counts(seen, columns)[:, :3].tolist() == [[2, 2, 2], [2, 2, 0]]
    got = scoring.whole_rows(scores, seen, columns, torch.tensor([2, 1]))
    # Row sums 2, 5, 4 and 6, 5.
    assert got.long().tolist() == [[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0]]
    tie = scoring.whole_rows(torch.ones(1, 6), everything(1, 6), columns[:1], torch.tensor([1]))
    assert tie.long().tolist() == [[1, 1, 0, 0, 0, 0]]


def test_relevance_is_scaled_over_each_image() -> None:
    """Image 0 has two crops, from -0.5 to 0.5; of image 1 all tokens are alike."""
    cosine = torch.tensor([[0.5, 0.0], [-0.5, 9.0], [0.2, 0.2]])
    seen = torch.tensor([[True, True], [True, False], [True, True]])
    got = scoring.relevance(cosine, seen, torch.tensor([0, 0, 1]))
    assert torch.allclose(got, torch.tensor([[0.0, 0.5], [1.0, 0.0], [1.0, 1.0]]), atol=2e-6)
    # The least relevant token is above nothing, as in the authors' code.
    assert 0 < float(got[0, 0]) < 2e-6


def test_change_since_the_frame_before() -> None:
    """Two clips of two frames and one; turned by 60° a cell changes by 1 - 0.5."""
    turned = [math.cos(math.pi / 3), math.sin(math.pi / 3)]
    frames = torch.tensor(
        [[[1.0, 0], [1, 0]], [[2, 0], turned], [[0, 1], [0, 3]], [[0, -1], [1, 0]]]
    )
    got = scoring.change(frames, torch.tensor([0, 0, 1, 1]))
    assert got[0].tolist() == got[2].tolist() == [math.inf, math.inf]
    assert torch.allclose(got[[1, 3]], torch.tensor([[0.0, 0.5], [2.0, 1.0]]), atol=1e-6)


def test_random_scores_follow_content_and_seed() -> None:
    state = torch.get_rng_state()
    features = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    first = scoring.random_scores(features, seed=7)
    assert torch.equal(first, scoring.random_scores(features, seed=7))
    assert not torch.equal(first, scoring.random_scores(features, seed=8))
    # The same crop elsewhere in a batch, and after rounding, is given the same numbers.
    again = scoring.random_scores(features[[2, 0]] * (1 + 1e-6), seed=7)
    assert torch.equal(again, first[[2, 0]])
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert float(first.min()) >= 0 and float(first.max()) < 1
    # No place is favoured: the mean of 400 crops lies within five standard errors of a half.
    many = torch.randn(400, 8, 16, generator=torch.Generator().manual_seed(1))
    means = scoring.random_scores(many, seed=0).mean(dim=0)
    assert float((means - 0.5).abs().max()) < 5 * (1 / 12) ** 0.5 / 20
    assert torch.equal(state, torch.get_rng_state())


def test_shared_out_in_proportion() -> None:
    assert scoring.shared_out(10, [16, 16, 8]) == [4, 4, 2]
    # 3.33 each: the first gets what is left.
    assert scoring.shared_out(10, [5, 5, 5]) == [4, 3, 3]
    # 0.57, 0.29 and 1.14: the largest part that was cut off first.
    assert scoring.shared_out(2, [4, 2, 8]) == [1, 0, 1]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_shared_out_in_full(counts: list[int], data: st.DataObject) -> None:
    if not sum(counts):
        counts = [1]
    keep = data.draw(st.integers(1, sum(counts)))
    parts = scoring.shared_out(keep, counts)
    assert sum(parts) == keep
    assert all(0 <= part <= n for part, n in zip(parts, counts, strict=True))


def test_uniform_places_make_perfect_grids() -> None:
    four = [row * 8 + column for row in (2, 6) for column in (2, 6)]
    assert scoring.uniform_places(8, 8, 4) == four
    assert scoring.uniform_places(2, 2, 4) == [0, 1, 2, 3]
    assert scoring.uniform_places(4, 4, 1) == [2 * 4 + 2]
    # Five in two rows, two and three of them.
    assert scoring.uniform_places(4, 4, 5) == [4 + 1, 4 + 3, 12 + 0, 12 + 2, 12 + 3]
    # A grid of one row.
    assert scoring.uniform_places(1, 6, 3) == [1, 3, 5]


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_uniform_places_for_any_number(rows: int, columns: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, rows * columns))
    places = scoring.uniform_places(rows, columns, keep)
    assert len(places) == keep and places == sorted(set(places))
    assert all(0 <= place < rows * columns for place in places)
    # Rows that are used hold as many tokens, but for one.
    used = [sum(place // columns == row for place in places) for row in range(rows)]
    held = [n for n in used if n]
    assert not held or max(held) - min(held) <= 1


@pytest.mark.parametrize(
    ("rows", "columns", "keep", "expected"),
    [
        (24, 24, 64, (8, 8)),
        (16, 16, 64, (8, 8)),
        # 121 blocks of at most 3 cells a side; 8 × 16 would fill the budget with 3 × 2.
        (24, 24, 128, (11, 11)),
        (24, 24, 1, (1, 1)),
        (4, 4, 16, (4, 4)),
        # Blocks of 2 × 2 and one to spare, not of 1 × 4.
        (4, 4, 5, (2, 2)),
        (2, 8, 4, (1, 4)),
        (8, 2, 4, (4, 1)),
        (2, 6, 3, (1, 3)),
        (3, 1, 9, (3, 1)),
    ],
)
def test_blocks_are_as_small_as_the_budget_allows(
    rows: int, columns: int, keep: int, expected: tuple[int, int]
) -> None:
    assert scoring.pooled_grid(rows, columns, keep) == expected


@given(st.integers(1, 10), st.integers(1, 10), st.integers(1, 100))
def test_blocks_by_trying_all(rows: int, columns: int, keep: int) -> None:
    down, across = scoring.pooled_grid(rows, columns, keep)
    assert 1 <= down <= rows and 1 <= across <= columns and down * across <= keep
    for h in range(1, rows + 1):
        for w in range(1, columns + 1):
            if h * w <= keep:
                side, own = max(rows / h, columns / w), max(rows / down, columns / across)
                assert (own, -down * across) <= (side, -h * w)


def test_boxes_around_what_is_seen() -> None:
    """Crops of 3 × 4 and 2 × 5; of the first the lower right 2 × 3, of the third nothing."""
    seen = torch.zeros(3, 12, dtype=torch.bool)
    for row in (1, 2):
        for column in (1, 2, 3):
            seen[0, row * 4 + column] = True
    seen[1, :10] = True
    got = scoring.grid_boxes(seen, torch.tensor([4, 5, 4])).tolist()
    assert got[:2] == [[1, 1, 2, 3], [0, 0, 2, 5]] and got[2][2:] == [0, 0]
