"""Rules that choose for diversity: the golden masks, and plain re-statements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from repository import ROOT
from vlmprune import select

GOLDEN = load_file(ROOT / "tests" / "golden" / "selection.safetensors")


def mask(indices: Tensor, n: int) -> Tensor:
    return torch.zeros(len(indices), n, dtype=torch.bool).scatter_(1, indices, True)


def golden_relevance() -> Tensor:
    """[2, 576] negated mean cosine to the texts, min-max per crop, as the golden README says."""
    images, texts = (
        torch.nn.functional.normalize(GOLDEN[f"cdpruner.{name}_embeds"], dim=-1)
        for name in ("image", "text")
    )
    score = -(images @ texts.T).mean(-1)
    low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
    return (score - low + 1e-6) / (high - low)


def test_farthest_point_equals_divprune() -> None:
    expected = GOLDEN["divprune.keep57"]
    got = mask(select.farthest_point(GOLDEN["features"], 57), 576)
    assert torch.equal(got, expected)
    other = mask(select.farthest_point(GOLDEN["features"].flip(0), 57), 576)
    assert not torch.equal(other, expected)


def test_conditional_dpp_equals_cdpruner() -> None:
    expected = GOLDEN["cdpruner.keep64"]
    relevance = golden_relevance()
    got = mask(select.conditional_dpp(GOLDEN["features"], relevance, 64), 576)
    assert torch.equal(got, expected)
    flat = torch.ones_like(relevance)
    assert not torch.equal(
        mask(select.conditional_dpp(GOLDEN["features"], flat, 64), 576), expected
    )


shapes = st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(2, 6), st.integers(0, 999))


@given(shapes, st.data())
def test_farthest_point_by_its_definition(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    B, N, C, seed = shape
    keep = data.draw(st.integers(1, N))
    features = torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed)).double()
    got = select.farthest_point(features, keep)
    for b in range(B):
        unit = torch.nn.functional.normalize(features[b], dim=-1)
        assert tuple(got[b].tolist()) in greedy_choices(1 - unit @ unit.T, keep)


def greedy_choices(distance: Tensor, keep: int) -> set[tuple[int, ...]]:
    """All choices by the definition, for tokens may be equally far to the last bit of float32.

    The first is, for two that are each other's nearest are equally far from their nearest.
    """
    every = range(len(distance))

    def best(worth: dict[int, float]) -> list[int]:
        most = max(worth.values())
        return [i for i, value in worth.items() if value > most - 1e-6]

    lonely = {i: min((float(distance[i, j]) for j in every if j != i), default=0.0) for i in every}
    chosen = {(i,) for i in best(lonely)}
    for _ in range(keep - 1):
        chosen = {
            tuple(sorted((*one, i)))
            for one in chosen
            for i in best(
                {i: min(float(distance[i, j]) for j in one) for i in every if i not in one}
            )
        }
    return chosen


@given(shapes, st.data())
def test_conditional_dpp_is_greedy_on_determinants(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    B, N, C, seed = shape
    # Beyond C tokens every determinant is zero and the choice is rounding's.
    keep = data.draw(st.integers(1, min(N, C)))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, N, C, generator=generator)
    relevance = torch.rand(B, N, generator=generator) + 0.1
    got = select.conditional_dpp(features, relevance, keep)
    for b in range(B):
        unit = torch.nn.functional.normalize(features[b].double(), dim=-1)
        weight = relevance[b].double()
        kernel = weight[:, None] * (unit @ unit.T) * weight
        chosen: list[int] = []
        while len(chosen) < keep:
            volumes = {
                i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))
                for i in range(N)
                if i not in chosen
            }
            chosen.append(max(volumes, key=lambda i: volumes[i]))
        ours = got[b].tolist()
        volume = [float(torch.linalg.det(kernel[s][:, s])) for s in (ours, chosen)]
        assert ours == sorted(chosen) or volume[0] == pytest.approx(volume[1], rel=1e-3, abs=1e-9)


@given(shapes, st.data())
def test_every_budget_gives_that_many(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    B, N, C, seed = shape
    keep = data.draw(st.integers(1, N))
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that duplicates and zero vectors come up.
    features = torch.randint(-1, 2, (B, N, C), generator=generator).float()
    relevance = torch.randint(0, 2, (B, N), generator=generator).float()
    for got in (
        select.farthest_point(features, keep),
        select.conditional_dpp(features, relevance, keep),
    ):
        assert got.shape == (B, keep)
        assert bool((got[:, 1:] > got[:, :-1]).all())
        assert int(got.min()) >= 0 and int(got.max()) < N


def test_ties_go_to_the_lower_index() -> None:
    same = torch.ones(2, 5, 3)
    assert select.farthest_point(same, 3).tolist() == [[0, 1, 2]] * 2
    assert select.conditional_dpp(torch.eye(4)[None], torch.ones(1, 4), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("keep", [0, 6])
def test_wrong_budgets_are_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep={keep} is outside 1 to 5"):
        select.farthest_point(torch.ones(1, 5, 3), keep)
    with pytest.raises(ValueError, match=f"keep={keep} is outside 1 to 5"):
        select.conditional_dpp(torch.ones(1, 5, 3), torch.ones(1, 5), keep)
    with pytest.raises(ValueError, match="do not fit"):
        select.conditional_dpp(torch.ones(1, 4, 3), torch.ones(1, 5), 2)


def test_dpp_chooses_no_token_twice_when_nothing_is_left_to_explain() -> None:
    """Features of rank three, some without relevance: rounding errors alone decide the rest."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randint(-1, 2, (2, 11, 3), generator=generator).float()
        relevance = torch.randint(0, 2, (2, 11), generator=generator).float()
        chosen = select.conditional_dpp(features, relevance, 11)
        assert chosen.tolist() == [list(range(11))] * 2
