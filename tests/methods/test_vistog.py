"""VisToG: against a slow re-statement, its groups, its tokens in a host, its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPVisionConfig

from tiny import IMAGE, model, positions_of, request
from tiny import dropped_columns as dropped_of
from vistog_host import host, loud, restated, shown, vistog
from vlmprune import EViT, ToMe, VisPruner, VisToG, VlmpruneError
from vlmprune.methods.vistog import Grouper, homes
from vlmprune.select.grouping import assigned, means
from zoo import ZOO

KINDS = ["clip", "siglip", "dinov2"]
SMALL = {
    "tokens": 3, "temperature": 1.0, "features": 6, "language": 5, "tower": 6,
    "activation": "gelu", "bias": True,
}  # fmt: skip


def test_forward_is_the_slow_restatement() -> None:
    """Patches that do not count, closed groups, and groups that nobody joins."""
    module = loud(Grouper(SMALL))
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 7, 6, generator=generator)
    tokens = torch.randn(3, 3, 6, generator=generator)
    features[2] = features[2, :1]  # all alike: one group has them all
    seen = torch.ones(3, 7, dtype=torch.bool)
    seen[1, [0, 4]] = False
    there = torch.ones(3, 3, dtype=torch.bool)
    there[1, 1] = False
    with torch.no_grad():
        found, shares = module(features, tokens, seen, there)
        other, _ = module(features, tokens.roll(1, 1), seen, there)
        every, _ = module(features, tokens, torch.ones_like(seen), there)
    empty = 0
    for crop in range(3):
        want, group = restated(
            module, features[crop], tokens[crop], seen[crop].tolist(), there[crop].tolist()
        )
        torch.testing.assert_close(found[crop], torch.tensor(want), rtol=1e-4, atol=1e-5)
        table = [[float(g == m) for g in group] for m in range(3)]
        assert shares[crop].tolist() == table
        empty += sum(not any(row) for row in table)
    assert empty >= 3
    # Other semantic tokens, and patches that did not count, make other tokens.
    assert (found[0] - other[0]).abs().max() > 1e-3
    assert (found[1] - every[1]).abs().max() > 1e-3
    assert torch.equal(found[0], every[0])


def test_a_crop_without_patches_is_no_nan() -> None:
    module = loud(Grouper(SMALL))
    nothing = torch.zeros(1, 7, dtype=torch.bool)
    made, shares = module(torch.ones(1, 7, 6), torch.ones(1, 3, 6), nothing, nothing[:, :3])
    assert made.isfinite().all() and not shares.any()


def test_straight_through() -> None:
    """Values are those of the hard choice, gradients those of the softmax."""
    scores = torch.tensor([[[2.0, 1.0, 5.0], [2.0, 4.0, 0.0]]], requires_grad=True)
    weight = torch.tensor([[[1.0, -2.0, 3.0], [0.5, 0.0, 7.0]]])
    shares = assigned(scores, temperature=0.5)
    assert shares.tolist() == [[[1, 0, 1], [0, 1, 0]]], "of equals the lower group"
    (shares * weight).sum().backward()
    found, scores.grad = scores.grad, None
    ((scores / 0.5).softmax(dim=1) * weight).sum().backward()
    assert found is not None and scores.grad is not None
    torch.testing.assert_close(found, scores.grad)
    assert found.abs().max() > 0.1
    noise = torch.tensor([[[0.0, 9.0, 0.0], [0.1, 0.0, 9.0]]])
    assert assigned(scores, noise).tolist() == [[[0, 1, 0], [1, 0, 1]]]


def test_groupings_gradients_are_those_of_scaled_likeness() -> None:
    """The softmax is of the product over the root of the width, over the temperature."""
    module = loud(Grouper(SMALL | {"temperature": 0.7})).grouping
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, 7, 6, generator=generator)
    tokens = torch.randn(1, 3, 6, generator=generator).requires_grad_()
    weight = torch.randn(1, 3, 7, generator=generator)
    every = torch.ones(1, 7, dtype=torch.bool)
    _, shares = module(features, tokens, every, every[:, :3])
    (found,) = torch.autograd.grad((shares * weight).sum(), tokens)
    soft = (module.queries(tokens) @ module.keys(features).mT / (0.7 * 6**0.5)).softmax(dim=1)
    (want,) = torch.autograd.grad((soft * weight).sum(), tokens)
    torch.testing.assert_close(found, want)
    assert found.abs().max() > 1e-2


def test_means_by_hand() -> None:
    shares = torch.tensor([[[1.0, 0, 1], [0, 0, 0], [0, 1, 0]]])
    values = torch.tensor([[[1.0, 2], [3, 4], [5, 8]]])
    assert means(shares, values).tolist() == [[[3, 5], [0, 0], [3, 4]]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_homes(cells: int, groups: int, seed: int) -> None:
    """Every kept cell has one group, both rise, and open groups lie at even distances."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(3, cells, generator=generator).argsort(dim=1) < torch.tensor(
        [[groups], [groups // 2], [0]]
    )
    places, there = homes(kept, groups)
    assert places.shape == there.shape == (3, groups)
    for crop in range(3):
        want = kept[crop].nonzero()[:, 0].tolist()
        assert [p for p in places[crop].tolist() if p >= 0] == want
        opened = there[crop].nonzero()[:, 0].tolist()
        assert opened == [int((j + 0.5) * groups / len(want)) for j in range(len(want))]
        assert (places[crop][~there[crop]] == -1).all()


# In a host.


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_module_begins_as_blank_cells_and_the_hosts_projector(kind: str) -> None:
    built = host(kind=kind)
    pruner = VisToG.fresh(built, tokens=4)
    with torch.no_grad():
        states = built.model.vision_tower(
            torch.zeros(1, 3, 56, 56), output_hidden_states=True
        ).hidden_states[0][0, -16:]
    # Of 4 x 4 cells: rows and columns 1 and 3.
    found = pruner.module.semantic.detach()
    torch.testing.assert_close(found, states[[5, 7, 13, 15]], rtol=0, atol=1e-6)
    req = request(built, [1])
    view, selection = shown(built, pruner, req.inputs)
    # Its tokens are the host's own of the mean of each group's patches.
    assert selection.tokens is not None and selection.members is not None
    into = selection.members[0].tolist()
    assert {5, 7, 13, 15} == {cell for cell, home in enumerate(into) if home == cell}
    with torch.no_grad():
        _, shares = pruner.module(
            view.features, view.semantic, view.candidates, torch.ones(1, 4, dtype=torch.bool)
        )
        for m, cell in enumerate((5, 7, 13, 15)):
            mine = [n for n in range(16) if shares[0, m, n]]
            others = [n for n in range(16) if into[n] == cell and n != cell]
            assert set(others) <= set(mine) <= {*others, 5, 7, 13, 15}
            mean = view.features[0, mine].sum(dim=0) / max(1, len(mine))
            want = built.model.multi_modal_projector(mean[None])[0]
            torch.testing.assert_close(selection.tokens[0, cell], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_unchanged_to_the_bit(kind: str) -> None:
    built = host(kind=kind)
    req = request(built, [2, 1])
    view, _ = shown(built, vistog(built), req.inputs)
    with torch.no_grad():
        tower = built.model.vision_tower
        states = tower(req.inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert torch.equal(view.features, states[-2][:, -16:])
    assert view.semantic is not None and view.semantic.shape == (3, 5, 32)
    # Images have tokens of their own, and a batch changes none.
    assert (view.semantic[0] - view.semantic[1]).abs().max() > 1e-3
    alone = request(built, [1]).inputs | {"pixel_values": req.inputs["pixel_values"][1:2]}
    single, _ = shown(built, vistog(built), alone)
    assert single.semantic is not None
    torch.testing.assert_close(single.semantic[0], view.semantic[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(("kind", "side"), [("clip", "left"), ("siglip", "right")])
def test_tokens_stand_where_the_kept_cells_are(kind: str, side: str, positions: Any) -> None:
    """Several images a prompt: the language model on embeddings that are put together by hand."""
    built = host(kind=kind)
    pruner = vistog(built, positions=positions)
    req = request(built, [2, 0, 1], text=[3, 6, 4], side=side)
    with torch.no_grad(), pruner(built) as handle:
        found = built(**req.inputs).logits
    assert handle.report is not None
    kept = handle.report.kept
    assert [len(k) for k in kept] == [5, 5, 5]
    assert handle.report.score == "5 semantic tokens beside the patches"
    view, selection = shown(built, pruner, req.inputs)
    assert selection.tokens is not None and view.semantic is not None
    # The tokens by the slow way, from what was seen.
    rows = []
    for crop in range(3):
        want, group = restated(
            pruner.module, view.features[crop], view.semantic[crop], [True] * 16, [True] * 5
        )
        rows += want
        cells = [16 * crop + int(c) for c in kept[crop]]
        homes_of = [cells[g] for g in group]
        for cell in cells:
            homes_of[cell - 16 * crop] = cell
        assert selection.members is not None
        assert selection.members[crop].tolist() == homes_of
    dropped = dropped_of(req, kept)
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"]
    places = positions_of(mask, dropped, positions)

    def by_hand(tokens: Tensor) -> list[Tensor]:
        out = []
        embeds = built.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(((ids == IMAGE) & ~dropped)[..., None], tokens)
        for row in range(len(ids)):
            stays = mask[row].bool() & ~dropped[row]
            one = built.model.language_model(
                inputs_embeds=embeds[row, stays][None],
                position_ids=places[row, stays][None],
                attention_mask=torch.ones(1, int(stays.sum()), dtype=torch.long),
            )
            out.append(built.lm_head(one.last_hidden_state)[0])
        return out

    with torch.no_grad():
        want = by_hand(torch.tensor(rows))
        plain = by_hand(built.model.multi_modal_projector(view.features[selection.kept]))
    real = mask.bool() & ~dropped
    for row, (one, other) in enumerate(zip(want, plain, strict=True)):
        length = int(real[row].sum())
        mine = found[row, -length:] if side == "left" else found[row, :length]
        torch.testing.assert_close(mine, one, rtol=0, atol=5e-5)
        assert (row == 1) == bool((mine - other).abs().max() < 1e-3)


@pytest.mark.parametrize("tokens", [64, 16])
def test_as_many_tokens_as_the_paper(tokens: int) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=126, patch_size=14,
    )  # fmt: skip
    built = model(vision_config=vision)
    ids = torch.tensor([[1, *[IMAGE] * 81, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(1, 3, 126, 126, generator=torch.Generator().manual_seed(3))
    with vistog(built, tokens=tokens)(built) as handle:
        out = built.generate(**inputs, max_new_tokens=2)
    assert out.shape[1] == ids.shape[1] + 2
    report = handle.report
    assert report is not None and report.visual_tokens_after == tokens
    # Beside the language model's FLOPs, the tokens' own in two of the tower's three layers.
    assert report.decoder_flops_before is not None and report.decoder_flops_after is not None
    before = report.flops_before - report.decoder_flops_before
    after = report.flops_after - report.decoder_flops_after
    products = tokens * (4 * 32 * 32 + 2 * 32 * 48 + 2 * (82 + tokens) * 32)
    assert after - before == 2 * 2 * products


def test_any_resolution_with_padding_cut_away() -> None:
    """Crops of unpadded images have fewer cells, some fewer than tokens."""
    built = host("llava_next")
    pruner = vistog(built, tokens=12)
    req = request(built, [2, 1])
    view, selection = shown(built, pruner, req.inputs)
    counts = view.candidates.sum(dim=1)
    assert counts.min() < 12 < counts.max()
    assert selection.kept.sum(dim=1).tolist() == counts.clamp(max=12).tolist()
    assert selection.members is not None and not (selection.kept & ~view.candidates).any()
    for crop, (kept, members) in enumerate(zip(selection.kept, selection.members, strict=True)):
        own = {16 * crop + int(c) for c in kept.nonzero()}
        assert set(members[view.candidates[crop]].tolist()) == own
    assert (selection.members[~view.candidates] == -1).all()
    with pruner(built) as handle:
        built.generate(**req.inputs, max_new_tokens=2)
    assert handle.report is not None
    report = handle.report
    assert sum(map(len, report.kept)) == int(selection.kept.sum()) + report.newline_tokens


def test_an_image_serves_several_questions() -> None:
    built = host()
    pruner = vistog(built)
    req = request(built, [1])
    with pruner(built) as handle:
        want = built.generate(**req.inputs, max_new_tokens=4)
        vision = handle.encode(**req.inputs)
        text = {k: v for k, v in req.inputs.items() if k != "pixel_values"}
        assert torch.equal(built.generate(**text, vision=vision, max_new_tokens=4), want)


def test_noise_in_training_alone() -> None:
    built = host()
    pruner = VisToG.fresh(built, tokens=5)
    req = request(built, [1])
    runs = []
    for training in (False, False, True):
        pruner.module.train(training)
        torch.manual_seed(4)
        runs.append(shown(built, pruner, req.inputs)[1].members)
    pruner.module.eval()
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])  # type: ignore[arg-type]


def test_without_images_nothing_happens() -> None:
    built = host()
    req = request(built, [0, 0])
    with torch.no_grad():
        want = built(**req.inputs).logits
        with vistog(built)(built):
            assert torch.equal(built(**req.inputs).logits, want)


def test_bfloat16_hosts_get_tokens_of_their_type() -> None:
    built = model().to(torch.bfloat16)
    req = request(built, [1])
    inputs = req.inputs | {"pixel_values": req.inputs["pixel_values"].to(torch.bfloat16)}
    pruner = vistog(built)
    with pruner(built) as handle:
        built.generate(**inputs, max_new_tokens=2)
    assert next(pruner.module.parameters()).dtype == torch.float32
    assert handle.report is not None and handle.report.visual_tokens_after == 5


# Refusals.


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"tokens": 0}, "tokens=0 is not a whole number"),
        ({"tokens": True}, "tokens=True is not a whole number"),
        ({"tokens": 17}, "tokens=17 is more than the 16 patches"),
        ({"temperature": 0}, "temperature=0 is not a number above 0"),
        ({"heads": 2}, "heads=2 is no setting of vistog"),
    ],
)
def test_settings_are_refused(hyper: dict[str, Any], words: str) -> None:
    with pytest.raises(VlmpruneError, match=words):
        VisToG.fresh(host(), **hyper)


@pytest.mark.parametrize("name", ["pixtral", "qwen2_5_vl", "gemma3"])
def test_other_towers_are_refused_by_name(name: str) -> None:
    built = ZOO[name].build()
    said = f"^VisToG makes .* cell by cell, which .* of {type(built).__name__} does not; use"
    with pytest.raises(VlmpruneError, match=said):
        VisToG.fresh(built)


def test_requests_are_refused() -> None:
    built = host()
    req = request(built, [1])
    pruner = vistog(built)
    with pruner(built), pytest.raises(VlmpruneError, match="takes features of several layers"):
        built(**req.inputs, vision_feature_layer=[-2, -3])
    with (
        (VisPruner(keep=4) | pruner)(built) as handle,
        torch.no_grad(),
    ):
        built(**req.inputs)
    assert handle.report is not None and len(handle.report.kept[0]) == 4
    for first in (ToMe(keep=8), EViT(keep=8)):
        with (first | pruner)(built), pytest.raises(VlmpruneError, match="changes the tokens"):
            built(**req.inputs)
    with pytest.raises(VlmpruneError, match=r"^VisToG\(.* would both merge visual tokens; chain"):
        (pruner | vistog(built, seed=1))(built).__enter__()


def test_more_tokens_than_cells() -> None:
    built = model("llava", kind="dinov2")
    pruner = vistog(built, tokens=12)
    ids = torch.tensor([[1, *[IMAGE] * 4, 7, 8]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    words = "make 12 tokens of a crop, which has 4 visual tokens here"
    with pruner(built), pytest.raises(VlmpruneError, match=words):
        built(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
