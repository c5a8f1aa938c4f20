"""Which tokens a step reads: numbers of them, what a choice goes by, and two ways to make it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.runtime.attention import recall_cpu
from vlmprune.select import recall
from vlmprune.select.recall import Groups


@st.composite
def cases(draw: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [B, H, V], with ties; images [B, V]; tokens and keep [B, I].

    Samples have images of unequal length and number; some stand in pieces, as later turns leave
    them, and some samples have none.
    """
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        lengths = [draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))] * batch
        together = True
    else:
        some = st.lists(st.integers(1, 9), max_size=3)
        lengths, together = [draw(some) for _ in range(batch)], draw(st.booleans())
        if not any(lengths):
            lengths[0] = [4]
    seed = draw(st.integers(0, 9999))
    generator = torch.Generator().manual_seed(seed)
    longest, most = max(map(sum, lengths)), max(map(len, lengths))
    images = torch.full((batch, longest), -1)
    tokens = torch.zeros(batch, most, dtype=torch.long)
    for row, own in enumerate(lengths):
        flat = torch.arange(len(own)).repeat_interleave(torch.tensor(own, dtype=torch.long))
        if not together:
            flat = flat[torch.randperm(len(flat), generator=generator)]
        images[row, : len(flat)] = flat
        tokens[row, : len(own)] = torch.tensor(own, dtype=torch.long)
    read = draw(st.sampled_from([1, 2, 5, 0.1, 0.5, 1.0]))
    keep = recall.counts(read, tokens, draw(st.sampled_from([0, 4])))
    levels = draw(st.sampled_from([3, 1000]))
    scores = torch.randint(-levels, levels, (batch, heads, longest), generator=generator) / 8
    return scores, images, tokens, keep


def marked(index: Tensor, seen: Tensor | None, shape: torch.Size) -> Tensor:
    """What was chosen as [B, H, V] bool."""
    out = torch.zeros(shape, dtype=torch.bool)
    for row, head in torch.cartesian_prod(*(torch.arange(n) for n in shape[:2])).tolist():
        own = index[row, head]
        out[row, head, own if seen is None else own[seen[row, 0]]] = True
    return out


@given(cases())
def test_chosen_are_the_best_of_each_image(case: tuple[Tensor, ...]) -> None:
    scores, images, _, keep = case
    kept = recall.chosen(scores, images, keep)
    for row, head in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:2])).tolist():
        wanted: set[int] = set()
        for image, count in enumerate(keep[row].tolist()):
            own = (images[row] == image).nonzero()[:, 0].tolist()
            # Ties go to the lower index.
            wanted |= set(sorted(own, key=lambda i: (-float(scores[row, head, i]), i))[:count])
        assert set(kept[row, head].nonzero()[:, 0].tolist()) == wanted


@pytest.mark.parametrize("largest", [None, recall_cpu.largest])
@given(case=cases())
def test_numbers_of_tokens_are_the_same_choice(largest: Any, case: tuple[Tensor, ...]) -> None:
    scores, images, tokens, keep = case
    index, seen = recall.best(scores, Groups.of(images, tokens, keep), largest)
    wanted = recall.chosen(scores, images, keep)
    assert torch.equal(marked(index, seen, scores.shape), wanted)
    # Each is named once.
    counted = torch.full(index.shape, True) if seen is None else seen.expand(index.shape)
    assert torch.equal(counted.sum(dim=2), wanted.sum(dim=2))
    # A control: other scores choose others, where not all are read.
    if bool((keep < tokens).any()):
        other = recall.best(
            -scores - torch.arange(scores.shape[2]), Groups.of(images, tokens, keep)
        )
        mixed = scores + torch.arange(scores.shape[2])
        same = recall.best(mixed, Groups.of(images, tokens, keep), largest)
        assert not torch.equal(marked(*other, scores.shape), marked(*same, scores.shape))


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[[0.0, 2, 1, 1, 1, 1, 0, 3]]])
    one = torch.zeros(1, 8, dtype=torch.long)
    tokens = torch.tensor([[8]])
    for keep, wanted in ((3, [1, 2, 7]), (4, [1, 2, 3, 7]), (7, [0, 1, 2, 3, 4, 5, 7])):
        groups = Groups.of(one, tokens, torch.tensor([[keep]]))
        for largest in (None, recall_cpu.largest):
            index, seen = recall.best(scores, groups, largest)
            assert sorted(index[0, 0].tolist()) == wanted and seen is None


def test_what_ties_in_order_is_taken_by_its_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ties NumPy's choice stands; with one at the border the plain way decides."""
    asked: list[int] = []
    plain = recall.in_order

    def noted(rows: Tensor, groups: Groups) -> Tensor:
        asked.append(1)
        return plain(rows, groups)

    monkeypatch.setattr(recall, "in_order", noted)
    one, tokens = torch.zeros(1, 50, dtype=torch.long), torch.tensor([[50]])
    groups = Groups.of(one, tokens, torch.tensor([[5]]))
    scores = torch.randperm(50, generator=torch.Generator().manual_seed(0)).float()[None, None]
    recall.best(scores, groups, recall_cpu.largest)
    assert not asked
    recall.best(scores.clamp(max=40.0), groups, recall_cpu.largest)
    assert asked


def test_counts() -> None:
    tokens = torch.tensor([[2880, 256, 63, 64, 8, 0]])
    assert recall.counts(0.0625, tokens, 64).tolist() == [[180, 16, 63, 4, 8, 0]]
    assert recall.counts(0.0625, tokens, 0).tolist() == [[180, 16, 4, 4, 1, 0]]
    # Half is rounded up; a number is a number, and no more than there are.
    assert recall.counts(0.1, torch.tensor([[25, 24, 5]]), 0).tolist() == [[3, 2, 1]]
    assert recall.counts(100, tokens, 0).tolist() == [[100, 100, 63, 64, 8, 0]]
    assert recall.counts(1.0, tokens, 0).tolist() == tokens.tolist()


@given(st.integers(0, 9999), st.integers(1, 4), st.booleans(), st.booleans())
def test_weights_are_shares_of_all_that_is_seen(
    seed: int, group: int, text: bool, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3 * group, 7, generator=generator, dtype=torch.float64) * 5
    real = torch.rand(2, 7, generator=generator) < 0.7 if padded else None
    beside = torch.randn(2, 3 * group, generator=generator, dtype=torch.float64) * 5
    found = recall.weights(scores, real, 3, beside if text else None)
    there = torch.ones(2, 7) if real is None else real.float()
    parts = scores.exp() * there[:, None]
    total = parts.sum(dim=2) + (beside.exp() if text else 0.0)
    wanted = (parts / total[..., None]).nan_to_num().unflatten(1, (3, group)).mean(dim=2)
    torch.testing.assert_close(found, wanted)


def test_what_a_head_sees_besides_changes_a_groups_choice() -> None:
    """A query head that looks at text alone has no say; without its text it would have half."""
    scores = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]])
    real = torch.ones(1, 3, dtype=torch.bool)
    beside = torch.tensor([[-9.0, 20.0]])
    assert int(recall.standing(scores, real, 1, beside)[0][0, 0].argmax()) == 0
    assert int(recall.weights(scores, real, 1, None)[0, 0].argmax()) == 1
    # A query head of its own chooses by its scores.
    assert torch.equal(recall.standing(scores, real, 2, beside)[0], scores)
    assert recall.standing(scores, real, 2, beside, totals=False)[1] is None


@given(st.integers(0, 9999), st.integers(1, 3))
def test_standing_has_the_order_of_weights(seed: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, heads, 9, generator=generator)
    beside = torch.randn(1, heads, generator=generator)
    weights = recall.weights(scores, None, heads, beside)
    by_scores, total = recall.standing(scores, None, heads, beside)
    assert torch.equal(weights.argsort(dim=2), by_scores.argsort(dim=2))
    torch.testing.assert_close(total, scores.logsumexp(dim=2))
    grouped, same = recall.standing(scores, None, 1, beside)
    torch.testing.assert_close(same, total)
    wanted = scores if heads == 1 else recall.weights(scores, None, 1, beside)
    torch.testing.assert_close(grouped, wanted)


def test_mass_is_what_was_read_of_all() -> None:
    scores = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]])
    real = torch.tensor([[True, True, False]])
    read = torch.tensor([[[True, False, False]]])
    beside = torch.tensor([[0.0, -torch.inf]])
    e = float(torch.tensor(1.0).exp())
    wanted = torch.tensor([[2 / (2 + e), 0.5]])
    torch.testing.assert_close(recall.mass(scores, read, real, beside), wanted)
    everything = recall.mass(scores, real[:, None], real, beside)
    torch.testing.assert_close(everything, torch.ones(1, 2))


def test_choosing_pays_for_many_tokens_of_many_heads() -> None:
    def pays(tokens: int, rows: int, read: float = 0.0625, width: int = 256) -> bool:
        return recall.pays(tokens, read * tokens, rows, width, recall.SCORING["int4"])

    assert pays(2880, 128) and pays(8192, 32)
    # Few tokens, few heads, narrow heads, and much that is read: each alone decides.
    assert not pays(256, 128)
    assert not pays(2880, 2)
    assert pays(1152, 128) and not pays(1152, 128, width=96)
    assert not pays(2880, 128, read=0.5)
