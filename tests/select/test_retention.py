"""What each head keeps of each image: against plain restatements, and PLPHP's own settings."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from tiny import model, request
from vlmprune import PLPHP, VisPruner, VlmpruneError
from vlmprune.select import retention
from vlmprune.views import LayerView


@jaxtyped(typechecker=beartype)
def choose(
    rule: str, scores: Float[Tensor, "B H V"], images: Int[Tensor, "B V"], keep: Int[Tensor, "B I"]
) -> Bool[Tensor, "B H V"]:
    return getattr(retention, rule)(scores, images, keep)


@st.composite
def cases(draw: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(
        st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=batch, max_size=batch)
    )
    most = max(len(row) for row in lengths)
    longest = max(sum(row) for row in lengths)
    images = torch.full((batch, longest), -1)
    keep = torch.zeros(batch, max(1, most), dtype=torch.long)
    for row, counts in enumerate(lengths):
        flat = [i for i, n in enumerate(counts) for _ in range(n)]
        images[row, : len(flat)] = torch.tensor(flat, dtype=torch.long)
        for i, n in enumerate(counts):
            keep[row, i] = draw(st.integers(1, n))
    # Few distinct values, so that ties are common.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    scores = torch.randint(0, 5, (batch, heads, longest), generator=generator) / 8
    return scores, images, keep


@given(cases())
def test_equal_numbers_a_head(case: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, images, keep = case
    kept = choose("per_image", scores, images, keep)
    for row in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            wanted = set()
            for image in range(keep.shape[1]):
                own = (images[row] == image).nonzero()[:, 0].tolist()
                best = sorted(own, key=lambda i: (-float(scores[row, head, i]), i))
                wanted |= set(best[: int(keep[row, image])])
            assert set(kept[row, head].nonzero()[:, 0].tolist()) == wanted


@given(cases())
def test_one_budget_for_all_heads(case: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, images, keep = case
    kept = choose("shared", scores, images, keep)
    heads = scores.shape[1]
    for row in range(scores.shape[0]):
        assert not kept[row][:, images[row] < 0].any()
        for image in range(keep.shape[1]):
            count = int(keep[row, image])
            own = (images[row] == image).nonzero()[:, 0].tolist()
            chosen = kept[row][:, own]
            assert int(chosen.sum()) == count * heads
            wanted = set()
            for head in range(heads):
                best = sorted(own, key=lambda i: (-float(scores[row, head, i]), i))
                wanted |= {(head, i) for i in best[: min(count, max(1, int(count * 0.2)))]}
            rest = [(h, i) for h in range(heads) for i in own if (h, i) not in wanted]
            rest.sort(key=lambda at: (-float(scores[row, at[0], at[1]]), at))
            wanted |= set(rest[: count * heads - len(wanted)])
            found = {(h, own[i]) for h, i in chosen.nonzero().tolist()}
            assert found == wanted


def numbers(images: Tensor, like: Tensor) -> Tensor:
    """Tokens of each image."""
    return (images[:, None] == torch.arange(like.shape[1])[:, None]).sum(dim=2)


def spread_places(tokens: int, chosen: int, head: int, heads: int, layer: int) -> list[int]:
    """Where tokens spread evenly over an image lie, in exact fractions."""
    parts = retention.PARTS
    phase = Fraction((head * parts // heads + layer * retention.AHEAD) % parts, parts)
    return [int((j + phase) * tokens / chosen) for j in range(chosen)]


@given(
    cases(), st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 60), st.booleans()
)
def test_a_share_is_spread_and_the_rest_attended_to(
    case: tuple[Tensor, Tensor, Tensor], share: float, layer: int, equal: bool
) -> None:
    scores, images, keep = case
    heads, counts = scores.shape[1], numbers(images, keep)
    raised = retention.covering(scores, images, counts, keep, share, layer)
    kept = choose("per_image" if equal else "shared", raised, images, keep)
    if share == 0:
        assert torch.equal(raised, scores)
    for row in range(scores.shape[0]):
        assert not kept[row][:, images[row] < 0].any()
        for image in range(keep.shape[1]):
            own = (images[row] == image).nonzero()[:, 0].tolist()
            count = int(keep[row, image])
            # Half rounded up.
            chosen = int(Fraction(str(share)) * count + Fraction(1, 2))
            assert int(kept[row][:, own].sum()) == count * heads
            for head in range(heads):
                places = spread_places(len(own), chosen, head, heads, layer)
                sure = {own[i] for i in places}
                assert len(sure) == chosen
                found = set(kept[row, head].nonzero()[:, 0].tolist()) & set(own)
                assert sure <= found
                if equal:
                    rest = sorted(set(own) - sure, key=lambda i: (-float(scores[row, head, i]), i))
                    assert found == sure | set(rest[: count - chosen])
                elif share == 1:
                    assert found == sure


@given(cases(), st.sampled_from([0.25, 0.5, 1.0]))
def test_what_is_spread_depends_on_no_score_and_no_other_sample(
    case: tuple[Tensor, Tensor, Tensor], share: float
) -> None:
    scores, images, keep = case
    counts = numbers(images, keep)
    sure = retention.covering(scores, images, counts, keep, share, 3).isinf()
    other = retention.covering(scores.flip(2), images, counts, keep, share, 3).isinf()
    assert torch.equal(sure, other)
    # A sample by itself, and with padding behind it.
    wider = torch.nn.functional.pad(images[:1], (0, 2), value=-1)
    alone = retention.covering(
        torch.zeros(1, scores.shape[1], wider.shape[1]), wider, counts[:1], keep[:1], share, 3
    )
    assert torch.equal(alone.isinf()[..., :-2], sure[:1]) and not alone.isinf()[..., -2:].any()


def test_heads_and_layers_spread_otherwise() -> None:
    """A quarter of sixteen tokens: four heads see all of them, and so does one in six layers."""
    images, sixteen = torch.zeros(1, 16, dtype=torch.long), torch.tensor([[16]])
    scores, four = torch.zeros(1, 4, 16), torch.tensor([[4]])
    sure = retention.covering(scores, images, sixteen, four, 1.0).isinf()[0]
    assert [one.nonzero()[:, 0].tolist() for one in sure] == [
        [start, start + 4, start + 8, start + 12] for start in range(4)
    ]
    # One KV head alone sees all of it in six layers.
    layers = [
        retention.covering(scores[:, :1], images, sixteen, four, 1.0, layer).isinf()[0, 0]
        for layer in range(6)
    ]
    assert torch.stack(layers).any(dim=0).all() and not torch.equal(layers[0], layers[1])


@given(cases(), st.integers(0, 25))
def test_images_give_way_alike(case: tuple[Tensor, Tensor, Tensor], room: int) -> None:
    keep = case[2]
    less = retention.within(keep, torch.full((len(keep),), room))
    for wanted, found in zip(keep.tolist(), less.tolist(), strict=True):
        if sum(wanted) <= room:
            assert found == wanted
            continue
        least = sum(map(bool, wanted))
        assert sum(found) <= max(room, least)
        spare = max(0, room - least)
        assert found == [n and 1 + (n - 1) * spare // max(1, sum(wanted) - least) for n in wanted]


@given(st.integers(1, 3), st.integers(1, 12), st.floats(0.05, 0.99), st.integers(0, 9999))
def test_the_fewest_that_hold_a_share(batch: int, tokens: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Eighths, of which sums are exact, and so few that ties are common.
    sums = torch.randint(0, 9, (batch, tokens), generator=generator) / 8
    seen = torch.randint(1, 4, (batch, tokens), generator=generator)
    pads = torch.randint(0, tokens, (batch,), generator=generator).tolist()
    for row, pad in enumerate(pads):
        sums[row, :pad], seen[row, :pad] = 0, 0
    kept = retention.important(sums, seen, share)
    for row, pad in enumerate(pads):
        own = list(range(pad, tokens))
        left, count = float(np.float32(share) * np.float32(sums[row].sum())), 0
        for value in sorted(sums[row].tolist(), reverse=True):
            count, left = count + 1, left - value
            if left <= 0:
                break
        best = sorted(own, key=lambda i: (-float(sums[row, i] / seen[row, i]), i))
        assert set(kept[row].nonzero()[:, 0].tolist()) == {*best[:count], tokens - 1}


def test_by_hand() -> None:
    """Two heads over two images of three tokens, one of each to keep."""
    scores = torch.tensor([[[0.1, 0.5, 0.2, 0.0, 0.0, 0.9], [0.3, 0.3, 0.0, 0.4, 0.8, 0.1]]])
    images = torch.tensor([[0, 0, 0, 1, 1, 1]])
    kept = choose("per_image", scores, images, torch.tensor([[1, 1]]))
    assert kept[0].nonzero().tolist() == [[0, 1], [0, 5], [1, 0], [1, 4]]
    # Two of the first image for both heads together: head 0 is sure of token 1, head 1 of token 0,
    # and two more go to the best of the rest, 0.3 and 0.2.
    kept = choose("shared", scores, images, torch.tensor([[2, 1]]))
    assert kept[0].nonzero().tolist() == [[0, 1], [0, 2], [0, 5], [1, 0], [1, 1], [1, 4]]


def test_important_by_hand() -> None:
    """Five columns hold 1, 4, 2, 2 and 1 of ten: 4 + 2 + 2 make up 0.8, and 3 are important."""
    sums = torch.tensor([[1.0, 4.0, 2.0, 2.0, 1.0, 0.0]])
    seen = torch.tensor([[10, 10, 8, 4, 1, 0]])
    # A row, they get 0.1, 0.4, 0.25, 0.5 and 1.
    assert retention.important(sums, seen, 0.8).nonzero()[:, 1].tolist() == [1, 3, 4]
    # 0.4 is one column: column 4, which is the last one, too.
    assert retention.important(sums, seen, 0.4).nonzero()[:, 1].tolist() == [4]
    # The last one stays though others are better.
    seen[0, 4] = 10
    assert retention.important(sums, seen, 0.4).nonzero()[:, 1].tolist() == [3, 4]
    # Ties go to the lower index: all get 1 of 5, of which 0.6 are three.
    even = torch.ones(1, 5)
    found = retention.important(even, torch.ones(1, 5).long(), 0.59)
    assert found.nonzero()[:, 1].tolist() == [0, 1, 2, 4]
    assert retention.important(sums, seen, 1).tolist() == [[True] * 5 + [False]]


def view(gamma: list[float], tokens: int) -> LayerView:
    """One sample a gamma, one image of `tokens` tokens, one head."""
    attention = torch.tensor(gamma)[:, None, None].expand(-1, 2, tokens) / tokens
    rows = len(gamma)
    images = torch.zeros(rows, tokens, dtype=torch.long)
    counts = torch.full((rows, 1), tokens)
    return LayerView(attention, images, counts, 1, torch.zeros(rows, dtype=torch.long), 8)


def test_three_levels_of_a_layer() -> None:
    found = PLPHP().retain(0, view([0.3, 0.2, 0.05], tokens=10))
    assert found is not None
    assert found.rate.tolist() == pytest.approx([0.7, 0.4, 0.1])
    assert found.kept.sum(dim=2)[:, 0].tolist() == [7, 4, 1]
    found = PLPHP(alpha=0.5, beta=0.5).retain(0, view([0.51, 0.49], tokens=10))
    assert found is not None and found.kept.sum(dim=2)[:, 0].tolist() == [7, 1]


@pytest.mark.parametrize(
    ("r", "tokens", "kept"),
    [(0.4, 576, 230), (0.1, 5, 1), (0.1, 4, 1), (0.5, 5, 3), (0.3, 5, 2), (0.05, 576, 29)],
)
def test_half_a_token_is_rounded_up_and_one_stays(r: float, tokens: int, kept: int) -> None:
    found = PLPHP(r=r, dr=0, alpha=1, beta=0).retain(0, view([0.5], tokens))
    assert found is not None and int(found.kept.sum()) == kept


@pytest.mark.parametrize("per_head", ["equal", "adaptive"])
def test_coverage(per_head: Any) -> None:
    """Without it the paper's choice to the bit, with all of it none of the attention's."""
    torch.manual_seed(0)
    tokens, seen = 40, view([0.2, 0.2], 40)
    attention = torch.rand(2, 2, tokens) / tokens
    one, other = (replace(seen, attention=a) for a in (attention, attention.flip(2)))

    def kept(at: LayerView, layer: int = 0, **settings: Any) -> Tensor:
        found = PLPHP(per_head=per_head, **settings).retain(layer, at)
        assert found is not None
        return found.kept

    assert torch.equal(kept(one, coverage=0), kept(one))
    assert torch.equal(kept(one, coverage=1), kept(other, coverage=1))
    assert not torch.equal(kept(one, coverage=0.5), kept(other, coverage=0.5))
    # Another part of the image in each layer, the same numbers in all.
    assert not torch.equal(kept(one, coverage=1), kept(one, layer=1, coverage=1))
    for share in (0.0, 0.3, 1.0):
        assert torch.equal(kept(one, coverage=share).sum(dim=(1, 2)), kept(one).sum(dim=(1, 2)))
    limited = kept(one, coverage=0.5, max_layer_bytes=80)
    assert limited.sum(dim=2).tolist() == [[10], [10]]


def test_first_layers_are_not_asked() -> None:
    pruner = PLPHP(first_pruned_layer=2)
    assert pruner.retain(1, view([0.3], 10)) is None and pruner.retain(2, view([0.3], 10))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 1.2}, "r=1.2 is not a number from 0 to 1"),
        ({"r": 0}, "gives rates from"),
        ({"r": 0.2, "dr": 0.3}, "rates from -0.1 to 0.5"),
        ({"r": 0.9, "dr": 0.3}, "rates from 0.6 to 1.2"),
        ({"alpha": True}, "alpha=True"),
        ({"coverage": 1.5}, "coverage=1.5 is not a number from 0 to 1"),
        ({"alpha": 0.1, "beta": 0.2}, "beta=0.2 is above alpha=0.1"),
        ({"window": 0}, "window=0 is not a whole number of 1 or more"),
        ({"first_pruned_layer": -1}, "first_pruned_layer=-1"),
        ({"first_pruned_layer": 1.5}, "first_pruned_layer=1.5"),
        ({"max_layer_bytes": 0}, "max_layer_bytes=0"),
        ({"per_head": "each"}, "per_head='each' is not known"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(VlmpruneError, match=match):
        PLPHP(**settings)


def test_chains_that_make_no_sense() -> None:
    with pytest.raises(VlmpruneError, match="must come last in a chain"):
        PLPHP() | VisPruner(keep=4)
    with pytest.raises(VlmpruneError, match="would both cut the KV cache"):
        PLPHP() | PLPHP(r=0.5)
    chain = VisPruner(keep=8) | VisPruner(keep=4) | PLPHP(window=3)
    assert chain.window == 3 and chain.cuts and chain.shortens
    assert PLPHP().cuts and not PLPHP().shortens
    assert VisPruner(keep=4).shortens and not VisPruner(keep=4).cuts


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"plphp": {"alpha": 0.6, "beta": 0.2, "calibrated_on": "x"}}))
    assert PLPHP.from_file(path) == PLPHP(alpha=0.6, beta=0.2, calibrated_on="x")
    changed = PLPHP.from_file(path, r=0.5, alpha=0.7)
    assert (changed.r, changed.alpha, changed.beta) == (0.5, 0.7, 0.2)
    with pytest.raises(VlmpruneError, match="calibrated on another model \\(x\\) than this"):
        PLPHP.from_file(path).attach(model())
    with pytest.raises(VlmpruneError, match="calibrated with window=1, not 8"):
        PLPHP.from_file(path, window=8)
    assert PLPHP.from_file(path, coverage=0.5).coverage == 0.5
    assert PLPHP.from_file(path, window=8, alpha=0.5, beta=0.4).window == 8
    with pytest.raises(VlmpruneError, match="no setting 'rate'"):
        PLPHP.from_file(path, rate=1)
    with pytest.raises(VlmpruneError, match="cannot be read"):
        PLPHP.from_file(tmp_path / "absent.json")
    for content in ("{", "[]", '{"other": 1}', '{"plphp": 3}'):
        path.write_text(content)
        with pytest.raises(VlmpruneError, match="is no calibration"):
            PLPHP.from_file(path)


@given(r=st.floats(0.01, 1), seed=st.integers(0, 20))
def test_the_first_token_never_changes_and_no_image_is_lost(r: float, seed: int) -> None:
    built = model(seed=seed % 3)
    req = request(built, [1, 2], seed=seed)
    settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    plain = built.generate(**req.inputs, **settings)
    per_head: Any = "adaptive" if seed % 2 else "equal"
    with PLPHP(r=r, dr=min(r, 1 - r), per_head=per_head)(built) as handle:
        pruned = built.generate(**req.inputs, **settings)
    assert torch.equal(plain.logits[0], pruned.logits[0])
    assert handle.report is not None
    for layer in handle.report.layers:
        for head in layer.kept:
            assert {int(n) // 16 for n in head[0]} == {0}
            assert {int(n) // 16 for n in head[1]} == {0, 1}


@pytest.mark.parametrize("rule", ["per_image", "shared"])
def test_a_single_image_needs_less_work_and_keeps_the_same(rule: str) -> None:
    torch.manual_seed(0)
    # With ties, and one more head than two.
    scores = torch.randint(0, 6, (2, 3, 24)) / 6
    images, keep = torch.zeros(2, 24, dtype=torch.long), torch.tensor([[7], [1]])
    choose = getattr(retention, rule)
    kept = choose(scores, images, keep)
    assert torch.equal(choose(scores, images, keep, alone=True), kept)
    assert not torch.equal(choose(-scores, images, keep, alone=True), kept)


def test_what_is_noted_for_later_layers_changes_nothing() -> None:
    """Each layer has its own γ; thresholds and numbers are those of the prompt."""
    notes = dict[str, Any]()
    for gamma in ([0.3, 0.2, 0.05], [0.05, 0.3, 0.24]):
        plain, noted = view(gamma, tokens=10), replace(view(gamma, tokens=10), notes=notes)
        found, wanted = PLPHP().retain(0, noted), PLPHP().retain(0, plain)
        assert found is not None and wanted is not None
        assert torch.equal(found.kept, wanted.kept) and torch.equal(found.rate, wanted.rate)
    assert notes
