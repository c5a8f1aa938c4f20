"""ToMe: the matching, the tower against a plain one that merges by itself, and generation."""

from __future__ import annotations

from itertools import product
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance
from in_tower import check_any_resolution, check_nothing_stays, generate
from plain_layers import given_to_projector, internvl, shuffled, squares, tower_of
from plain_tome import matched, plain_tower
from tiny import Request, dropped_columns, model, positions_of, request
from vlmprune import PLPHP, ToMe, VisPruner, VlmpruneError
from vlmprune.select import bipartite
from zoo import ZOO

KINDS = ["clip", "dinov2", "siglip"]


def test_matching_by_hand() -> None:
    # Angles in degrees. A: tokens 0, 2, 4 at 0, 50, 95. B: 1, 3 at 10, 90. The edges are 0 to 1
    # (10 apart), 2 to 1 or 3 (both 40 apart, so the first), 4 to 3 (5 apart).
    angles = torch.tensor([0.0, 10.0, 50.0, 90.0, 95.0]).deg2rad()
    keys = torch.stack((angles.cos(), angles.sin()), dim=-1)[None]
    # One merges: 4 into 3. What is left of A, closest first, is 0 and 2; then B.
    assert bipartite.match(keys, 1, cls=False).tolist() == [[0, 2, 1, 3, 3]]
    # Two: 4 into 3, 0 into 1; token 2 is left of A.
    assert bipartite.match(keys, 2, cls=False).tolist() == [[1, 1, 0, 2, 2]]
    # With a CLS token at 0: 4 into 3 and 2 into 1; of A the CLS token is left.
    assert bipartite.match(keys, 2, cls=True).tolist() == [[0, 1, 1, 2, 2]]
    # Lengths of keys do not count.
    scaled = keys * torch.tensor([3.0, 0.1, 7.0, 1.0, 2.0])[None, :, None]
    assert bipartite.match(scaled, 2, cls=True).tolist() == [[0, 1, 1, 2, 2]]


@given(st.data())
def test_matching_equals_lists(data: st.DataObject) -> None:
    tokens, cls = data.draw(st.integers(2, 13)), data.draw(st.booleans())
    merge = data.draw(st.integers(0, (tokens - cls) // 2))
    # Orthogonal directions, so that ties abound and are exact.
    where = st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)
    rows = [data.draw(where), data.draw(where)]
    keys = torch.nn.functional.one_hot(torch.tensor(rows), 4).float()
    into = bipartite.match(keys, merge, cls)
    for row, places in zip(keys.tolist(), into.tolist(), strict=True):
        wanted = matched(row, merge, cls)
        assert len(wanted) == tokens - merge
        for place, members in enumerate(wanted):
            assert {i for i, at in enumerate(places) if at == place} == set(members)


@given(st.integers(1, 700), st.integers(1, 30), st.data())
def test_schedule(tokens: int, layers: int, data: st.DataObject) -> None:
    fewest = tokens
    for _ in range(layers):
        fewest = ceil(fewest / 2)
    assert bipartite.least(tokens, layers) == fewest
    keep = data.draw(st.integers(fewest, tokens))
    taken = bipartite.schedule(tokens, keep, layers)
    assert taken is not None and len(taken) == layers and sum(taken) == tokens - keep
    left = tokens
    for merge in taken:
        assert 0 <= merge <= left // 2
        left -= merge
    # Even where the later layers can follow.
    if keep >= (tokens - keep) / layers + 1:
        assert list(taken) == sorted(taken, reverse=True) and taken[0] - taken[-1] <= 1
    if fewest > 1:
        assert bipartite.schedule(tokens, fewest - 1, layers) is None


def test_schedule_by_hand() -> None:
    assert bipartite.schedule(576, 64, 23) == (23,) * 6 + (22,) * 17
    assert bipartite.schedule(16, 6, 2) == (5, 5)
    # 7 and 7 cannot be: 9 tokens are halved to 5 at least.
    assert bipartite.schedule(16, 4, 2) == (8, 4)
    assert bipartite.schedule(16, 3, 2) is None
    assert bipartite.schedule(16, 16, 2) == (0, 0)


def test_representatives_by_hand() -> None:
    shared = torch.tensor([[0, 1, 0, 2, 1], [3, 3, 3, 0, 0]])
    candidates = torch.tensor([[True, True, True, False, True], [False, True, True, True, False]])
    rank = torch.arange(5)
    kept, members = bipartite.representatives(shared, candidates, rank)
    # Cell 3 of crop 0 is a group without a candidate; cell 0 of crop 1 no candidate of its group.
    assert kept.int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 1, 0]]
    assert members.tolist() == [[0, 1, 0, -1, 1], [-1, 6, 6, 8, -1]]
    kept, members = bipartite.representatives(shared, candidates, rank.flip(0))
    assert kept.int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 1, 0]]
    assert members.tolist() == [[2, 4, 2, -1, 4], [-1, 7, 7, 8, -1]]


@pytest.mark.parametrize(("kind", "attention"), list(product(KINDS, ["sdpa", "eager"])))
def test_tower_equals_a_plain_one(kind: str, attention: str) -> None:
    built = model(kind=kind, attention=attention, vision_feature_layer=-1)
    req = request(built, [2])
    pixels, cls = req.inputs["pixel_values"], int(kind != "siglip")
    with torch.no_grad():
        wanted, groups = plain_tower(built, pixels, [4, 3, 3])
        unweighed, _ = plain_tower(built, pixels, [4, 3, 3], weigh=False)
        unmerged, _ = plain_tower(built, pixels, [0, 0, 0])
    features, report = given_to_projector(built, ToMe(keep=6), req.inputs)
    assert float((features - wanted[:, cls:]).abs().max()) < TOLERANCE
    assert float((features - unweighed[:, cls:]).abs().max()) > DIFFERENT
    assert float((features - unmerged[:, cls:]).abs().max()) > DIFFERENT
    assert report.score == "keys of encoder layers 0 to 2"
    for kept, members, of_crop in zip(report.kept, report.members, groups, strict=True):
        assert sorted(min(group) for group in of_crop) == kept.tolist() and len(kept) == 6
        for group in of_crop:
            assert all(int(members[patch]) == min(group) for patch in group)


@pytest.mark.parametrize(("ratio", "attention"), [(0.5, "sdpa"), (1.0, "sdpa"), (0.5, "eager")])
def test_internvl_merges_whole_visual_tokens(ratio: float, attention: str) -> None:
    """Patches of one visual token go together, each into the one at its place in the other."""
    built, inputs = internvl(ratio, attention)
    edge = round(1 / ratio)
    tokens = 36 // edge**2
    merges = {9: [2, 2, 1], 36: [9, 9, 8]}[tokens]
    keep = tokens - sum(merges)
    with torch.no_grad():
        pixels, cells = inputs["pixel_values"], squares(6, edge)
        wanted, groups = plain_tower(built, pixels, merges, cells=cells)
        others = [
            plain_tower(built, pixels, merges, weigh=False, cells=cells)[0],
            plain_tower(built, pixels, [0, 0, 0], cells=cells)[0],
        ]
    features, report = given_to_projector(built, ToMe(keep=keep), inputs)
    assert float((features - shuffled(built, wanted)).abs().max()) < TOLERANCE
    for other in others:
        assert float((features - shuffled(built, other)).abs().max()) > DIFFERENT
    (members,), (kept,) = report.members, report.kept
    assert len(kept) == 2 * keep
    for crop, of_crop in enumerate(groups):
        assert len(of_crop) == keep
        for group in of_crop:
            into = min(group) + crop * tokens
            assert into in kept
            assert all(int(members[cell + crop * tokens]) == into for cell in group)


def test_gemma_merges_the_squares_that_it_averages() -> None:
    entry = ZOO["gemma3"]
    built = entry.build()
    req = entry.request(built, [["image"], ["image"]])
    with torch.no_grad():
        pixels = req.inputs["pixel_values"]
        wanted, groups = plain_tower(built, pixels, [2, 2, 1], cells=squares(6, 2))
        other, _ = plain_tower(built, pixels, [2, 2, 1], cells=None)
        norm = built.model.vision_tower.post_layernorm
    features, report = given_to_projector(built, ToMe(keep=4), req.inputs)
    assert float((features - norm(wanted)).abs().max()) < TOLERANCE
    assert float((features - norm(other)).abs().max()) > DIFFERENT
    for kept, of_crop in zip(report.kept, groups, strict=True):
        assert kept.tolist() == sorted(min(group) for group in of_crop)


def by_hand(built: Any, req: Request, kept: list[Tensor], states: Tensor) -> Any:
    """Generation from embeddings put together by hand; positions renumbered."""
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"]
    embeds = built.get_input_embeddings()(ids)
    tokens = built.model.multi_modal_projector(states)
    embeds[ids == 5] = tokens.flatten(0, 1)
    dropped = dropped_columns(req, kept)
    mask = mask * ~dropped
    return generate(
        built,
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions_of(req.inputs["attention_mask"], dropped, "compact"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_embeddings_by_hand(kind: str) -> None:
    built = model(kind=kind)
    req = request(built, [1, 2, 0])
    with torch.no_grad():
        states, groups = plain_tower(built, req.inputs["pixel_values"], [5, 4])
        unmerged, _ = plain_tower(built, req.inputs["pixel_values"], [0, 0])
    cls = int(kind != "siglip")
    with ToMe(keep=7)(built) as handle:
        pruned = generate(built, **req.inputs)
    assert handle.report is not None
    kept = [torch.tensor(sorted(min(group) for group in crop)) for crop in groups]
    assert all(torch.equal(a, b) for a, b in zip(handle.report.kept, kept, strict=True))
    with torch.no_grad():
        wanted = by_hand(built, req, kept, states[:, cls:])
        control = by_hand(built, req, kept, unmerged[:, cls:])
    assert distance(pruned, wanted) < TOLERANCE
    assert distance(pruned, control) > DIFFERENT


@pytest.mark.parametrize(
    ("kind", "policy"), list(product(["clip", "siglip"], ["compact", "original"]))
)
def test_any_resolution_equals_masking(kind: str, policy: Any) -> None:
    """The full model with merged features, told to overlook all but one token of each."""
    check_any_resolution(ToMe(keep=6, positions=policy), kind, least=1)


def test_nothing_stays() -> None:
    check_nothing_stays(ToMe(keep=5))


def test_stored_visions_serve_other_questions() -> None:
    built = model()
    req = request(built, [2, 1])
    with ToMe(keep=5)(built) as handle:
        wanted = generate(built, **req.inputs)
        report = handle.report
        vision = handle.encode(**req.inputs)
        rest = {k: v for k, v in req.inputs.items() if k != "pixel_values"}
        again = generate(built, **rest, vision=vision)
    assert distance(again, wanted) == 0
    assert report is not None and handle.report is not None
    assert report.flops_after == handle.report.flops_after < report.flops_before


def test_flops_by_hand() -> None:
    """Tokens before the attention, tokens after it in the MLP; the last layer is whole."""
    built = model()
    req = request(built, [1])
    _, report = given_to_projector(built, ToMe(keep=6), req.inputs)
    width, inner = 32, 48
    spent = 0
    for before, after in ((17, 12), (12, 7), (17, 17)):
        spent += 4 * before * width**2 + 2 * before**2 * width + 2 * after * width * inner
    usual = 3 * (4 * 17 * width**2 + 2 * 17**2 * width + 2 * 17 * width * inner)
    _, other = given_to_projector(built, VisPruner(keep=6), req.inputs)
    assert report.flops_before == other.flops_before
    assert other.flops_after - report.flops_after == 2 * (usual - spent) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_behind_it_sees_each_patchs_share(kind: str) -> None:
    """Attention to a merged token is shared by its patches; the later method ranks those kept."""
    built = model(kind=kind)
    req = request(built, [2])
    seen: list[Any] = []

    class Last(VisPruner):
        def select(self, view: Any) -> Any:
            seen.append(view)
            return super().select(view)

    with (ToMe(keep=6) | Last(keep=3, important_ratio=1))(built) as handle:
        generate(built, **req.inputs)
    (view,) = seen
    # Told apart by hand. A CLS row is that of the feature layer, which begins with what layer 0
    # merged; what patches receive is of the layer behind it, which begins with all, of which those
    # that merged are alike.
    cls = kind != "siglip"
    assert handle.report is not None
    assert ("CLS attention" if cls else "attention received") in handle.report.score
    with torch.no_grad():
        pixels = req.inputs["pixel_values"]
        states, groups = plain_tower(built, pixels, [5] if cls else [5, 5])
        unmerged, _ = plain_tower(built, pixels, [0] if cls else [0, 0])
        _, layers, heads, _ = tower_of(built)
        for crop, (tokens, plain, members) in enumerate(zip(states, unmerged, groups, strict=True)):

            def row_of(tokens: Tensor) -> Tensor:
                # Duplicates of a merged token get what it gets, shared.
                weights = layers[1 if cls else 2].attend(tokens, heads)[1].mean(dim=0)
                return weights[0, 1:] if cls else weights.mean(dim=0)

            row = row_of(tokens)
            assert float((view.attention[crop] - row).abs().max()) < TOLERANCE
            assert float((view.attention[crop] - row_of(plain)).abs().max()) > 10 * TOLERANCE
            assert len(members) == (11 if cls else 6)
            kept = view.candidates[crop].nonzero()[:, 0]
            assert len(kept) == 6
            best = sorted(kept.tolist(), key=lambda cell: -float(row[cell]))[:3]
            assert sorted(best) == handle.report.kept[crop].tolist()


def test_videos_and_towers_of_other_families() -> None:
    for name, pruner in (("video_llava", ToMe(keep=5)), ("paligemma", ToMe(keep=0.5))):
        entry = ZOO[name]
        built = entry.build()
        rows: list[Any] = [["image"], ["image"]]
        if "video" in entry.modalities:
            rows = [["video", "image"], ["video"]]
        req = entry.request(built, rows)
        with torch.no_grad(), pruner(built) as handle:
            built(**req.inputs)
        assert handle.report is not None
        for one, kept in zip(handle.report.layouts, handle.report.kept, strict=True):
            wanted = 5 if pruner.keep == 5 else one.patches // 2
            assert len(kept) == one.crops * wanted + one.newlines


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    built = model().to(dtype)
    req = request(model(), [2])
    req.inputs["pixel_values"] = req.inputs["pixel_values"].to(dtype)
    features, report = given_to_projector(built, ToMe(keep=6), req.inputs)
    assert features.dtype == dtype and [len(k) for k in report.kept] == [6, 6]
    assert features.isfinite().all()
    assert all(len(crop.unique(dim=0)) == 6 for crop in features)


REFUSED = [
    ("qwen2_vl", ToMe(keep=3), "at their own resolution"),
    ("pixtral", ToMe(keep=3), "at their own resolution"),
    ("idefics3", ToMe(keep=3), "not among the layers that it knows"),
    ("llama4", ToMe(keep=3), "puts its CLS token last"),
]


@pytest.mark.parametrize(("name", "pruner", "why"), REFUSED)
def test_refused_at_attach(name: str, pruner: Any, why: str) -> None:
    with pytest.raises(VlmpruneError, match=why), pruner(ZOO[name].build()):
        raise AssertionError("attached")


def test_a_tower_that_masks_its_tokens_is_refused() -> None:
    built = model()
    hidden = torch.zeros(1, 1, 17, 17)
    for layer in built.model.vision_tower.encoder.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args[:1], {**kwargs, "attention_mask": hidden}),
            with_kwargs=True,
        )
    said = "^CLIPEncoderLayer masks its tokens, which vlmprune cannot merge then; pass what the"
    with ToMe(8)(built), pytest.raises(VlmpruneError, match=said):
        built(**request(built, [1]).inputs)


def test_refused_before_any_work() -> None:
    built = model()
    req = request(built, [1])
    ran: list[int] = []
    built.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))

    def refused(pruner: Any, why: str, **more: Any) -> None:
        with pytest.raises(VlmpruneError, match=why), pruner(built):
            generate(built, **req.inputs, **more)

    refused(ToMe(keep=3), "2 encoder layers that merge half of them at most leave 4; use keep=4")
    refused(ToMe(keep=0.2), "use keep=4 or more")
    several = model(vision_feature_layer=[-2, -1])
    which = r"vision_feature_layer=\[-2, -1\]"
    with pytest.raises(VlmpruneError, match=which), ToMe(keep=5)(several):
        generate(several, **req.inputs)
    # A list of one layer is that layer.
    with ToMe(keep=5)(model(vision_feature_layer=[-2])) as one, ToMe(keep=5)(model()) as plain:
        answers = [generate(handle.model, **req.inputs).sequences for handle in (one, plain)]
        assert torch.equal(*answers)
    built.model.vision_tower.config._attn_implementation = "flash_attention_2"
    refused(ToMe(keep=5), "flash_attention_2 cannot weigh merged tokens")
    assert not ran
    one = ZOO["llava_onevision"].build()
    video = ZOO["llava_onevision"].request(one, [["video"]])
    with pytest.raises(VlmpruneError, match="blends neighbouring"), ToMe(keep=0.5)(one):
        generate(one, **video.inputs)
    with pytest.raises(VlmpruneError, match="merges within a crop"):
        ToMe(keep=5, budget="image")
    with pytest.raises(VlmpruneError, match="must come first"):
        VisPruner(keep=5) | ToMe(keep=3)
    assert (ToMe(keep=5) | PLPHP()).acts == "merging"
