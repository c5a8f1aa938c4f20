"""SparseVLM: how many tokens its stages leave, and where they stand."""

from __future__ import annotations

import pytest
import torch

from vlmprune.methods.sparsevlm import left_of, stages

RELEASED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


@pytest.mark.parametrize(("keep", "expected"), RELEASED.items())
def test_sparsevlm_leaves_what_the_release_does(keep: int, expected: tuple[int, ...]) -> None:
    before = torch.tensor([[576, 0, 576]])
    for stage, count in enumerate(expected):
        assert left_of(keep, stage, before).tolist() == [[count, 0, count]]
        assert left_of(keep / 576, stage, before).tolist() == [[count, 0, count]]
    # Five times the image, five times the tokens.
    assert left_of(5 * keep, 0, 5 * before).tolist() == [[5 * expected[0], 0, 5 * expected[0]]]


def test_other_budgets_of_sparsevlm() -> None:
    before = torch.tensor([[576]])
    last = (0, 0, 0)
    for keep in range(1, 577):
        now = tuple(int(left_of(keep, stage, before)) for stage in range(3))
        # What is left nests from stage to stage.
        assert 576 >= now[0] >= now[1] >= now[2] >= 1
        if keep >= 64:
            # As the authors count: two layers whole, then four, ten and sixteen.
            mean = (2 * 576 + 4 * now[0] + 10 * now[1] + 16 * now[2]) / 32
            assert abs(mean - keep) < 3
        assert now[2] >= last[2]
        last = now
    assert last == (576, 576, 576)
    # Half of 64 leaves half of what 64 does.
    assert [int(left_of(32, stage, before)) for stage in range(3)] == [33, 15, 9]
    assert int(left_of(192, 0, torch.tensor([[100]]))) == 100


@pytest.mark.parametrize(
    ("depth", "expected"), [(40, [4, 9, 20]), (28, [3, 6, 14]), (5, [1, 2, 3]), (3, [1, 2])]
)
def test_stages_of_other_depths(depth: int, expected: list[int]) -> None:
    assert stages(depth) == expected
