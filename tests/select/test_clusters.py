"""Rules that merge: hand-made cases, plain re-statements, bounds on memory."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plain_merging import Sums, by_prumerge, by_visionzip, cosine
from vlmprune import select
from vlmprune.select import clusters, rules, scoring


def sums(entries: clusters.Entries, n: int) -> list[Sums]:
    """For each crop: of each token made anew, the weight of each of its sources."""
    found: dict[int, Sums] = defaultdict(lambda: defaultdict(dict))
    for into, source, weight in zip(*(part.tolist() for part in entries), strict=True):
        assert into // n == source // n
        assert source % n not in found[into // n][into % n]
        found[into // n][into % n][source % n] = weight
    return [found[b] for b in range(max(found, default=-1) + 1)]


def near(left: Sums, right: Sums) -> bool:
    return left.keys() == right.keys() and all(
        left[i].keys() == right[i].keys()
        and all(math.isclose(left[i][j], right[i][j], rel_tol=1e-5) for j in left[i])
        for i in left
    )


def directions(degrees: list[float]) -> Tensor:
    """[1, n, 2] keys; the cosine of two is that of the angle between them, whatever the length."""
    turned = [math.radians(one) for one in degrees]
    lengths = [1.0 + i % 3 for i in range(len(degrees))]
    return torch.tensor(
        [[[s * math.cos(a), s * math.sin(a)] for a, s in zip(turned, lengths, strict=True)]]
    )


# VisionZip


def test_visionzip_on_eight_tokens() -> None:
    """Dominant 0 and 2; of the six others 1 and 5 are targets, three apart."""
    attention = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3, 0.15, 0.05, 0.25]])
    keys = directions([0, 10, 0, 80, 30, 100, 20, 130])
    plan = clusters.visionzip(attention, keys, keep=4, contextual=2)
    assert plan.dominant.tolist() == [[0, 2]] and plan.contextual.tolist() == [[1, 5]]
    # 30° and 20° lie nearer to 10° than to 100°, 80° and 130° the other way round.
    assert plan.owner.tolist() == [[0, 1, 2, 5, 1, 5, 1, 5]]
    (found,) = sums(plan.entries, 8)
    assert near(found, {1: {1: 1, 4: 0.5, 6: 0.5}, 5: {5: 1, 3: 0.5, 7: 0.5}})


def test_visionzip_without_contextual_tokens_loses_the_rest() -> None:
    attention = torch.tensor([[0.3, 0.2, 0.5, 0.1]])
    plan = clusters.visionzip(attention, directions([0, 1, 2, 3]), keep=2, contextual=0)
    assert plan.owner.tolist() == [[0, -1, 2, -1]] and not len(plan.entries.into)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(2, 14), st.integers(0, 999), st.data())
def test_visionzip_by_its_definition(crops: int, n: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, n))
    contextual = data.draw(st.integers(1, keep))
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(crops, n, generator=generator)
    keys = torch.randn(crops, n, 3, generator=generator)
    plan = clusters.visionzip(attention, keys, keep, contextual)
    found = sums(plan.entries, n)
    for b in range(crops):
        best, made = by_visionzip(attention[b].tolist(), keys[b].tolist(), keep, contextual)
        assert set(plan.dominant[b].tolist()) == best
        assert near(found[b], made)
        owned = {i: t for t, members in made.items() for i in members}
        assert plan.owner[b].tolist() == [i if i in best else owned[i] for i in range(n)]


# PruMerge


def test_outliers_by_the_quartiles() -> None:
    """Of 1 to 8 and 14: Q1 = 3, Q3 = 7, so that 13 is the limit; of 1 to 8 and 13 there is none."""
    score = torch.tensor([[1.0, 2, 3, 4, 14, 5, 6, 7, 8], [1.0, 2, 3, 4, 13, 5, 6, 7, 8]])
    assert scores_above(score, 13) == [[4], []]
    # The most attended one stands in where there is none.
    assert clusters.outliers(score).nonzero().tolist() == [[0, 4], [1, 4]]
    # The limit itself is not above it.
    two = torch.tensor([[1.0, 2, 3, 4, 20, 5, 6, 7, 13], [1.0, 2, 3, 4, 20, 5, 6, 7, 13.1]])
    assert clusters.outliers(two).nonzero().tolist() == [[0, 4], [1, 4], [1, 8]]
    # Quartiles between two scores are interpolated: 1.75 and 3.25 of 1 to 4, with the limit 5.5.
    four = torch.tensor([[1.0, 2, 3, 4]])
    assert clusters.outliers(four).nonzero().tolist() == [[0, 3]]
    twice = torch.tensor([[1.0, 1, 1, 1, 9, 1, 1, 1, 9]])
    assert clusters.outliers(twice).nonzero().tolist() == [[0, 4], [0, 8]]


def scores_above(score: Tensor, limit: float) -> list[list[int]]:
    return [[i for i, s in enumerate(row) if s > limit] for row in score.tolist()]


def test_prumerge_on_six_tokens() -> None:
    """Token 2 stands out; 1 and 4 are nearest to it; 5 is the most attended of the rest."""
    attention = torch.tensor([[0.01, 0.02, 0.8, 0.03, 0.04, 0.05]])
    keys = directions([90, 10, 0, 60, 20, 80])
    plan = clusters.prumerge(attention, keys, neighbours=2)
    assert plan.kept.nonzero()[:, 1].tolist() == [2, 5]
    assert plan.residual.nonzero()[:, 1].tolist() == [5]
    assert plan.owner.tolist() == [[5, 2, 2, 5, 2, 5]]
    (found,) = sums(plan.entries, 6)
    rest = {0: 0.01, 1: 0.02, 3: 0.03, 4: 0.04, 5: 0.05}
    assert near(found, {2: {2: 1, 1: 0.02, 4: 0.04}, 5: rest})


def test_prumerge_plus_samples_at_even_distances() -> None:
    """Two outliers among equals of 13 tokens: ⌊⌊13 / 2⌋ / 3⌋ = 2 apart, below the last place."""
    attention = torch.full((1, 13), 0.01)
    attention[0, 4], attention[0, 7] = 0.9, 0.011
    plan = clusters.prumerge(attention, directions(list(range(13))), plus=True)
    chosen = (plan.kept & ~plan.residual).nonzero()[:, 1].tolist()
    assert chosen == [0, 2, 4, 6, 7, 8, 10]
    assert plan.sampled.nonzero()[:, 1].tolist() == [0, 2, 6, 8, 10]


@settings(max_examples=40)
@given(st.integers(2, 14), st.integers(0, 999), st.booleans(), st.integers(0, 5), st.data())
def test_prumerge_by_its_definition(
    n: int, seed: int, plus: bool, neighbours: int, data: st.DataObject
) -> None:
    keep = data.draw(st.none() | st.integers(2, n - 1)) if n > 2 else None
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(3, n, generator=generator).mul(1.5).exp()
    keys = torch.randn(3, n, 3, generator=generator)
    plan = clusters.prumerge(attention, keys, keep, plus, neighbours)
    found = sums(plan.entries, n)
    for b in range(3):
        order = sorted(range(n), key=lambda i: -float(attention[b, i]))
        if keep is not None:
            assert int(plan.kept[b].sum()) == keep
            first = max(1, (keep - 1) // 4) if plus else keep - 1
            chosen = order[:first]
        else:
            values = sorted(attention[b].tolist())
            low, high = (
                values[math.floor(q * (n - 1))] * (1 - q * (n - 1) % 1)
                + values[math.ceil(q * (n - 1))] * (q * (n - 1) % 1)
                for q in (0.25, 0.75)
            )
            limit = high + 1.5 * (high - low)
            chosen = [i for i in range(n) if attention[b, i] > limit] or order[:1]
        got = (plan.kept & ~plan.residual)[b].nonzero()[:, 0].tolist()
        if plus:
            if keep is None:
                step = max(1, n // len(chosen) // 3)
                chosen = sorted({*chosen, *range(0, n - 1, step)})
            else:
                assert set(chosen) <= set(got) and len(got) == keep - 1
                chosen = got
        assert got == sorted(chosen)
        made, host = by_prumerge(attention[b].tolist(), keys[b].tolist(), chosen, neighbours)
        assert near(found[b], made)
        assert plan.residual[b].nonzero()[:, 0].tolist() == ([] if host is None else [host])
        for j in range(n):
            takers = [i for i in chosen if j in made[i]]
            if j in chosen or j == host:
                wanted = j
            elif not takers:
                wanted = host
            else:
                own = keys[b].tolist()
                wanted = max(takers, key=lambda i: cosine(own[i], own[j]))
            assert int(plan.owner[b, j]) == wanted


def test_prumerge_at_both_ends() -> None:
    attention = torch.tensor([[0.1, 0.5, 0.2, 0.2]])
    keys = directions([0, 30, 60, 90])
    one = clusters.prumerge(attention, keys, keep=1)
    assert one.kept.tolist() == [[False, True, False, False]] and not one.residual.any()
    everything = clusters.prumerge(attention, keys, keep=4)
    assert everything.kept.all() and not len(everything.entries.into)
    for keep in (0, 5):
        with pytest.raises(ValueError, match=f"keep={keep} is outside 1 to 4"):
            clusters.prumerge(attention, keys, keep=keep)
    with pytest.raises(ValueError, match="contextual=3 is outside 0 to 2"):
        clusters.visionzip(attention, keys, 2, 3)


# Average pooling


def pool(rows: int, columns: int, down: int, across: int, candidates: Tensor | None = None) -> Any:
    seen = torch.ones(1, rows * columns, dtype=torch.bool) if candidates is None else candidates
    wide = torch.tensor([columns])
    boxes = scoring.grid_boxes(seen, wide)
    block = clusters.blocks(seen, wide, boxes, torch.tensor([[down, across]]))
    return clusters.pooled(block, wide)


def test_pooling_four_by_four_into_two_by_two() -> None:
    owner, entries = pool(4, 4, 2, 2)
    # Of four cells that are equally near the middle, the lowest number.
    assert owner.view(4, 4).tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [8, 8, 10, 10], [8, 8, 10, 10]]
    (found,) = sums(entries, 16)
    assert found[2] == {2: 0.25, 3: 0.25, 6: 0.25, 7: 0.25} and len(found) == 4


def test_pooling_takes_the_middle_cell() -> None:
    owner, _ = pool(3, 6, 1, 2)
    assert set(owner[0].tolist()) == {7, 10}
    # Five columns into two: ⌊i · 2 / 5⌋ is 0 for three of them and 1 for two.
    owner, entries = pool(1, 5, 1, 2)
    assert owner.tolist() == [[1, 1, 1, 3, 3]]
    assert near(sums(entries, 5)[0], {1: dict.fromkeys((0, 1, 2), 1 / 3), 3: {3: 0.5, 4: 0.5}})


def test_pooling_averages_what_is_left_of_a_block() -> None:
    left = torch.tensor([[True, False, True, True, True, True]])
    owner, entries = pool(2, 3, 1, 2, left)
    # Left block: columns 0 and 1 without cell 1; right block: column 2.
    assert owner.tolist() == [[3, -1, 2, 3, 3, 2]]
    assert near(sums(entries, 6)[0], {3: dict.fromkeys((0, 3, 4), 1 / 3), 2: {2: 0.5, 5: 0.5}})


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_pooling_parts_the_grid(rows: int, columns: int, data: st.DataObject) -> None:
    down, across = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    owner, entries = pool(rows, columns, down, across)
    assert owner[0].unique().numel() == down * across
    owners = owner[0].tolist()
    assert all(owners[o] == o for o in owners)
    total = torch.zeros(rows * columns).index_add_(0, entries.into, entries.weight)
    made = entries.into.unique()
    torch.testing.assert_close(total[made], torch.ones(len(made)))


# Memory and waiting


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                # What an expanded tensor takes, not what it looks like.
                self.numel = max(self.numel, one.untyped_storage().nbytes() // one.element_size())
        return out


def choices(attention: Tensor, features: Tensor) -> dict[str, Any]:
    return {
        "farthest_point": lambda: select.farthest_point(features, 8),
        "conditional_dpp": lambda: select.conditional_dpp(features, attention, 8),
        "visionzip": lambda: clusters.visionzip(attention, features, 64, 10).owner,
        "prumerge": lambda: clusters.prumerge(attention, features, 64).owner,
    }


@pytest.mark.parametrize("name", ["farthest_point", "conditional_dpp", "visionzip", "prumerge"])
def test_no_square_matrix_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    attention, features = (
        torch.rand(1, 4096, generator=generator),
        torch.randn(1, 4096, 4, generator=generator),
    )
    monkeypatch.setattr(rules, "BLOCK", 1 << 17)
    monkeypatch.setattr(rules, "LEAST_ROWS", 16)
    with Largest() as seen:
        in_blocks = choices(attention, features)[name]()
    assert seen.numel <= 1 << 17
    # The blocks' size changes nothing, and the recorder sees a square where there is one.
    monkeypatch.setattr(rules, "BLOCK", 1 << 24)
    with Largest() as seen:
        assert torch.equal(choices(attention, features)[name](), in_blocks)
    assert (seen.numel >= 4096**2) == (name == "farthest_point")


def test_rules_do_not_wait_for_the_device() -> None:
    """Tensors without values: whoever asks for one fails."""
    attention = torch.empty(2, 50, device="meta")
    features = torch.empty(2, 50, 4, device="meta")
    found = choices(attention, features)
    assert found["farthest_point"]().shape == found["conditional_dpp"]().shape == (2, 8)
    plan = clusters.visionzip(attention, features, 16, 4)
    assert plan.dominant.shape == (2, 12) and plan.contextual.shape == (2, 4)
    with pytest.raises(RuntimeError):
        bool((attention > 0).any())


def test_a_cell_lies_in_a_block_or_in_none() -> None:
    """Of 2 x 3 cells pooled into one row of two blocks, one of them is no candidate."""
    candidates = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    boxes = torch.tensor([[0, 0, 2, 3]]).expand(2, -1)
    shape = torch.tensor([[1, 2], [0, 2]])
    found = clusters.blocks(candidates, torch.tensor([3, 3]), boxes, shape)
    assert found.tolist() == [[0, 0, 1, 0, 0, -1], [-1] * 6]
