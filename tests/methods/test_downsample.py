"""Downsample: the grids, and generation against a pipeline put together by hand."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance
from in_tower import generate, leftovers
from tiny import IMAGE, Request, dropped_columns, model, positions_of, request
from vlmprune import Downsample, VisPruner, VlmpruneError, costs
from vlmprune.runtime.encoder import acting
from vlmprune.select import coarse_grid
from zoo import ZOO

KINDS = ["clip", "dinov2", "siglip"]
# Of 4 x 4 patches: where each token stands, and the patches that it covers. Two rows of patches
# a token: their centre lies between them, and the upper one is taken. At three tokens a side the
# middle one covers two rows.
BY_HAND = {
    2: ([0, 2], [[0, 1], [2, 3]]),
    3: ([0, 1, 3], [[0], [1, 2], [3]]),
    1: ([1], [[0, 1, 2, 3]]),
}


@pytest.mark.parametrize("side", BY_HAND)
def test_grids_by_hand(side: int) -> None:
    at, covers = BY_HAND[side]
    sources = coarse_grid.sources((4, 4), (side, side)).view(4, 4).tolist()
    ranks = coarse_grid.ranks((4, 4), (side, side)).view(4, 4).tolist()
    for i, j in product(range(side), repeat=2):
        own = list(product(covers[i], covers[j]))
        assert all(sources[r][c] == i * side + j for r, c in own)
        assert min(own, key=lambda cell: ranks[cell[0]][cell[1]]) == (at[i], at[j])


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_grids(rows: int, columns: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, rows * columns))
    small = coarse_grid.smaller((rows, columns), keep)
    assert 1 <= small[0] <= rows and 1 <= small[1] <= columns and small[0] * small[1] <= keep
    if rows == columns:
        assert small[0] == small[1] and (small[0] + 1) ** 2 > keep
    sources, ranks = (
        coarse_grid.sources((rows, columns), small),
        coarse_grid.ranks((rows, columns), small),
    )
    assert sorted(ranks.tolist()) == list(range(rows * columns))
    assert sources.unique().tolist() == list(range(small[0] * small[1]))
    # Cells by how far they are from their token's centre, in exact numbers.
    apart = []
    for number, source in enumerate(sources.tolist()):
        at, own = divmod(number, columns), divmod(source, small[1])
        sides = zip(at, own, (rows, columns), small, strict=True)
        apart.append(
            sum(
                (Fraction(2 * a + 1, 2) - Fraction((2 * o + 1) * n, 2 * f)) ** 2
                for a, o, n, f in sides
            )
        )
    assert ranks.argsort().tolist() == sorted(range(len(apart)), key=lambda one: (apart[one], one))
    # No cell is nearer to another token's centre than to its own.
    centres = [((i + 0.5) * n / fewer) for n, fewer in ((rows, small[0]),) for i in range(fewer)]
    for row in range(rows):
        own = int(sources[row * columns]) // small[1]
        assert abs(row + 0.5 - centres[own]) <= min(abs(row + 0.5 - c) for c in centres) + 1e-9


def scaled(pixels: Tensor, side: int) -> Tensor:
    """Pixels scaled down with a triangle as wide as the scale on each side, by two products."""
    scale = pixels.shape[-1] / side
    weights = torch.zeros(side, pixels.shape[-1])
    for i, x in product(range(side), range(pixels.shape[-1])):
        weights[i, x] = max(0.0, 1 - abs(x + 0.5 - (i + 0.5) * scale) / scale)
    weights /= weights.sum(dim=1, keepdim=True)
    return weights @ pixels @ weights.T


def features(built: Any, pixels: Tensor, **more: Any) -> Tensor:
    """What the host's tower makes of pixels, projected."""
    hidden = built.model.vision_tower(pixels, output_hidden_states=True, **more).hidden_states[-2]
    cls = built.config.vision_config.model_type != "siglip_vision_model"
    return built.model.multi_modal_projector(hidden[:, int(cls) :])


@pytest.mark.parametrize(("kind", "side"), list(product(KINDS, [2, 3])))
def test_equals_a_pipeline_by_hand(kind: str, side: int) -> None:
    built = model(kind=kind)
    req = request(built, [1, 2, 0])
    more = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        tokens = features(built, scaled(req.inputs["pixel_values"], side * 14), **more)
        full = features(built, req.inputs["pixel_values"])
    with Downsample(keep=side**2 + 1)(built) as handle:
        pruned = generate(built, **req.inputs)
    assert handle.report is not None
    assert handle.report.score == f"picture scaled to {side} x {side} patches"
    at, covers = BY_HAND[side]
    cells = [4 * row + column for row, column in product(at, at)]
    assert [kept.tolist() for kept in handle.report.kept] == [cells] * 3
    for (i, own), (j, other) in product(enumerate(covers), enumerate(covers)):
        patches = torch.tensor([4 * row + column for row, column in product(own, other)])
        assert (handle.report.members[0][patches] == 4 * at[i] + at[j]).all()

    def expected(values: Tensor) -> Any:
        """The language model on embeddings, with the other columns masked."""
        ids = req.inputs["input_ids"]
        embeds = built.get_input_embeddings()(ids)
        whole = torch.zeros(3, 16, values.shape[-1])
        whole[:, cells] = values
        embeds[ids == IMAGE] = whole.flatten(0, 1)
        dropped = dropped_columns(req, [torch.tensor(cells)] * 3)
        return generate(
            built,
            inputs_embeds=embeds,
            attention_mask=req.inputs["attention_mask"] * ~dropped,
            position_ids=positions_of(req.inputs["attention_mask"], dropped, "compact"),
        )

    with torch.no_grad():
        # The picture is scaled by another order of sums, and the tower enlarges what differs.
        assert distance(pruned, expected(tokens)) < 3 * TOLERANCE
        # Controls: the full picture's features there, and nearest pixels instead of means.
        assert distance(pruned, expected(full[:, cells])) > DIFFERENT
        nearest = torch.nn.functional.interpolate(req.inputs["pixel_values"], side * 14)
        assert distance(pruned, expected(features(built, nearest, **more))) > DIFFERENT


@pytest.mark.parametrize(("kind", "policy"), [("clip", "compact"), ("siglip", "original")])
def test_any_resolution_equals_masking(kind: str, policy: Any) -> None:
    built = model("llava_next", kind=kind)
    req = request(built, [1, 2, 0])
    pruner = Downsample(keep=4, positions=policy)
    with pruner(built) as handle:
        pruned = generate(built, **req.inputs)
        medium = handle.family.media[0]
    assert handle.report is not None
    kept, layouts = handle.report.kept, handle.report.layouts
    for one, indices in zip(layouts, kept, strict=True):
        candidates, chosen = one.candidates().view(-1, 4, 4), torch.zeros(one.crops * 16)
        chosen[one.labels[indices][one.labels[indices] >= 0]] = 1
        # A token is there if the host left any of its four patches.
        for r, c in product((0, 2), (0, 2)):
            left = candidates[:, r : r + 2, c : c + 2].flatten(1).any(dim=1)
            there = chosen.view(-1, 4, 4)[:, r : r + 2, c : c + 2].flatten(1).sum(dim=1)
            assert torch.equal(left.float(), there)
        assert int((one.labels[indices] < 0).sum()) == one.newlines
    dropped = dropped_columns(req, kept)
    changed = req.inputs | {
        "attention_mask": req.inputs["attention_mask"] * ~dropped,
        "position_ids": positions_of(req.inputs["attention_mask"], dropped, policy),
    }
    (planned,) = acting.acts_of(built, [medium], [req.inputs], [layouts], pruner)
    with acting.acting(built, medium, req.inputs, planned):
        expected = generate(built, **changed)
    assert distance(pruned, expected) < TOLERANCE
    assert distance(pruned, generate(built, **changed)) > DIFFERENT


def test_reports_what_the_tower_spends_and_leaves_nothing() -> None:
    built = model()
    req: Request = request(built, [2, 1])
    before = leftovers(built)
    with Downsample(keep=5)(built) as handle:
        wanted = generate(built, **req.inputs)
        report = handle.report
        vision = handle.encode(**req.inputs)
        rest = {k: v for k, v in req.inputs.items() if k != "pixel_values"}
        assert distance(generate(built, **rest, vision=vision), wanted) == 0
        assert report is not None and handle.report is not None
        assert handle.report.flops_after == report.flops_after
        hook = built.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(built, **req.inputs)
        hook.remove()
        assert leftovers(built) == before
        assert distance(generate(built, **req.inputs), wanted) == 0
    decoder = sum(costs.prefill_flops(built.config, n) for n in (8, 4))
    assert report.flops_after == costs.encoder_flops(built.config, 3, patches=4) + decoder
    assert leftovers(built) == before


def test_a_method_behind_it_chooses_among_its_tokens() -> None:
    built = model()
    req = request(built, [1])
    seen: list[Any] = []

    class Last(VisPruner):
        def select(self, view: Any) -> Any:
            seen.append(view)
            return super().select(view)

    with (Downsample(keep=9) | Last(keep=4))(built) as handle:
        generate(built, **req.inputs)
    assert handle.report is not None and len(handle.report.kept[0]) == 4
    (view,) = seen
    assert view.candidates.sum() == 9
    # Attention to a token is shared by the patches that it covers, all of it but the CLS token's.
    pixels = scaled(req.inputs["pixel_values"], 42)
    with torch.no_grad():
        tower = built.model.vision_tower
        tower.set_attn_implementation("eager")
        out = tower(pixels, interpolate_pos_encoding=True, output_attentions=True)
    row = out.attentions[1][0].mean(dim=0)[0]
    totals = torch.zeros(9).scatter_add(0, coarse_grid.sources((4, 4), (3, 3)), view.attention[0])
    assert float((totals - row[1:]).abs().max()) < TOLERANCE


def test_refused() -> None:
    out = "give the model's processor a smaller picture"
    for name in ("qwen2_5_vl", "pixtral"):
        with pytest.raises(VlmpruneError, match=out), Downsample(keep=3)(ZOO[name].build()):
            raise AssertionError("attached")
    gemma = ZOO["gemma3"].build()
    pooled = ZOO["gemma3"].request(gemma, [["image"]])
    why = "one visual token of several"
    with pytest.raises(VlmpruneError, match=why), Downsample(keep=0.5)(gemma):
        generate(gemma, **pooled.inputs)
    with pytest.raises(VlmpruneError, match="scales every crop by itself"):
        Downsample(keep=5, budget="image")
    with pytest.raises(VlmpruneError, match="must come first"):
        VisPruner(keep=5) | Downsample(keep=3)
