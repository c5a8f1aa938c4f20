"""EViT: the tower against a plain one in which tokens leave, and generation."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance
from in_tower import check_any_resolution, check_nothing_stays, generate
from plain_evit import left_each_time, plain_tower
from plain_layers import given_to_projector, internvl, shuffled, squares
from tiny import Request, dropped_columns, model, positions_of, request
from vlmprune import PLPHP, EViT, ToMe, VisionZip, VisPruner, VlmpruneError, spec
from zoo import ZOO

KINDS = ["clip", "dinov2", "siglip"]


def left_of(tokens: int, keep: int, layers: tuple[int, ...]) -> dict[int, int]:
    return dict(zip(layers, left_each_time(tokens, keep, len(layers)), strict=True))


@pytest.mark.parametrize(
    ("kind", "attention", "fuse"), list(product(KINDS, ["sdpa", "eager"], [True, False]))
)
def test_tower_equals_a_plain_one(kind: str, attention: str, fuse: bool) -> None:
    built = model(kind=kind, attention=attention, vision_feature_layer=-1)
    req = request(built, [2])
    pixels, cls = req.inputs["pixel_values"], int(kind != "siglip")
    left = left_of(16, 5, (0, 1, 2))
    assert list(left.values()) == [11, 8, 5]
    with torch.no_grad():
        wanted, kept, _ = plain_tower(built, pixels, left, 2, fuse)
        others = [
            plain_tower(built, pixels, left, 2, not fuse)[0],
            plain_tower(built, pixels, left, 2, fuse, lowest=True)[0],
            plain_tower(built, pixels, {2: 5}, 2, fuse)[0],
        ]
    features, report = given_to_projector(built, EViT(keep=5, fuse=fuse), req.inputs)
    assert float((features - wanted[:, cls:]).abs().max()) < TOLERANCE
    for other in others:
        assert float((features - other[:, cls:]).abs().max()) > DIFFERENT
    assert report.score == "attention in encoder layers 0, 1, 2"
    assert [cells.tolist() for cells in report.kept] == kept
    # Layers of one's own choice.
    features, report = given_to_projector(built, EViT(5, layers=(1,), fuse=fuse), req.inputs)
    with torch.no_grad():
        wanted, kept, _ = plain_tower(built, pixels, {1: 5}, 2, fuse)
    assert float((features - wanted[:, cls:]).abs().max()) < TOLERANCE
    assert [cells.tolist() for cells in report.kept] == kept


@pytest.mark.parametrize(
    ("ratio", "attention", "fuse"),
    [(0.5, "sdpa", True), (0.5, "eager", False), (1.0, "sdpa", True)],
)
def test_internvl_drops_whole_visual_tokens(ratio: float, attention: str, fuse: bool) -> None:
    built, inputs = internvl(ratio, attention)
    edge = round(1 / ratio)
    tokens = 36 // edge**2
    left = left_of(tokens, 4, (0, 1, 2))
    pixels, cells = inputs["pixel_values"], squares(6, edge)
    with torch.no_grad():
        wanted, kept, scores = plain_tower(built, pixels, left, 2, fuse, cells)
        other, _, _ = plain_tower(built, pixels, left, 2, fuse, cells, lowest=True)
    features, report = given_to_projector(built, EViT(4, fuse=fuse), inputs)
    assert float((features - shuffled(built, wanted)).abs().max()) < TOLERANCE
    assert float((features - shuffled(built, other)).abs().max()) > DIFFERENT
    assert report.kept[0].tolist() == [tokens * crop + c for crop in (0, 1) for c in kept[crop]]
    # A later method chooses by the mean over a token's patches.
    pruner = EViT(4, fuse=fuse) | VisPruner(2, important_ratio=1)
    _, report = given_to_projector(built, pruner, inputs)
    chosen = []
    for crop, (row, own) in enumerate(zip(scores, kept, strict=True)):
        best = sorted(own, key=lambda c: -float(row[cells[c]].mean()))[:2]
        chosen += [tokens * crop + c for c in sorted(best)]
    assert report.kept[0].tolist() == chosen


def test_gemma_drops_the_squares_that_it_averages() -> None:
    entry = ZOO["gemma3"]
    built = entry.build()
    req = entry.request(built, [["image"], ["image"]])
    with torch.no_grad():
        pixels, cells = req.inputs["pixel_values"], squares(6, 2)
        left = left_of(9, 4, (0, 1, 2))
        wanted, kept, _ = plain_tower(built, pixels, left, 2, cells=cells)
        norm = built.model.vision_tower.post_layernorm
        features, report = given_to_projector(built, EViT(4), req.inputs)
        assert float((features - norm(wanted)).abs().max()) < TOLERANCE
    assert [cells.tolist() for cells in report.kept] == kept


def by_hand(built: Any, req: Request, kept: list[Tensor], states: Tensor) -> Any:
    """Generation from embeddings put together by hand; positions renumbered."""
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"]
    embeds = built.get_input_embeddings()(ids)
    embeds[ids == 5] = built.model.multi_modal_projector(states).flatten(0, 1)
    dropped = dropped_columns(req, kept)
    return generate(
        built,
        inputs_embeds=embeds,
        attention_mask=mask * ~dropped,
        position_ids=positions_of(mask, dropped, "compact"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_embeddings_by_hand(kind: str) -> None:
    built = model(kind=kind)
    req = request(built, [1, 2, 0])
    cls = int(kind != "siglip")
    with torch.no_grad():
        pixels, left = req.inputs["pixel_values"], left_of(16, 7, (0, 1))
        states, cells, _ = plain_tower(built, pixels, left, 1)
        whole, _, _ = plain_tower(built, pixels, {}, 1)
    with EViT(keep=7)(built) as handle:
        pruned = generate(built, **req.inputs)
    assert handle.report is not None
    kept = [torch.tensor(own) for own in cells]
    assert all(torch.equal(a, b) for a, b in zip(handle.report.kept, kept, strict=True))
    with torch.no_grad():
        wanted = by_hand(built, req, kept, states[:, cls:])
        control = by_hand(built, req, kept, whole[:, cls:])
    assert distance(pruned, wanted) < TOLERANCE
    assert distance(pruned, control) > DIFFERENT


@pytest.mark.parametrize(("kind", "fuse"), list(product(KINDS, [True, False])))
def test_a_method_behind_it_chooses_among_what_is_left(kind: str, fuse: bool) -> None:
    """By attention read in the shorter tower; of SigLIP in a layer behind the features."""
    built = model(kind=kind)
    req = request(built, [1, 2, 0])
    cls = int(kind != "siglip")
    seen: list[Any] = []

    class Last(VisPruner):
        def select(self, view: Any) -> Any:
            seen.append(view)
            return super().select(view)

    with torch.no_grad():
        pixels, left = req.inputs["pixel_values"], left_of(16, 6, (0, 1))
        states, cells, scores = plain_tower(built, pixels, left, 1, fuse)
        _, _, others = plain_tower(built, pixels, {}, 1)
    with (EViT(keep=6, fuse=fuse) | Last(keep=3, important_ratio=1))(built) as handle:
        pruned = generate(built, **req.inputs)
    assert handle.report is not None
    for words in ("in encoder layers 0, 1; ", "CLS attention" if cls else "attention received"):
        assert words in handle.report.score
    (view,) = seen
    assert float((view.attention - torch.stack(scores)).abs().max()) < TOLERANCE
    assert float((view.attention - torch.stack(others)).abs().max()) > 10 * TOLERANCE
    assert [row.nonzero()[:, 0].tolist() for row in view.candidates] == cells
    kept = []
    for row, own in zip(scores, cells, strict=True):
        best = sorted(own, key=lambda cell: -float(row[cell]))[:3]
        kept.append(torch.tensor(sorted(best)))
    assert [one.tolist() for one in kept] == [one.tolist() for one in handle.report.kept]
    with torch.no_grad():
        wanted = by_hand(built, req, kept, states[:, cls:])
    assert distance(pruned, wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "policy"), list(product(["clip", "siglip"], ["compact", "original"]))
)
def test_any_resolution_equals_masking(kind: str, policy: Any) -> None:
    """The full model with the shorter tower's features, told to overlook what left."""
    check_any_resolution(EViT(keep=6, positions=policy), kind, least=0)


def test_nothing_stays() -> None:
    check_nothing_stays(EViT(keep=5))


@pytest.mark.parametrize("pruner", [EViT(keep=5), EViT(keep=8) | VisPruner(keep=3)])
def test_stored_visions_serve_other_questions(pruner: Any) -> None:
    for built in (model(), model("llava_next")):
        req = request(built, [2, 1])
        with pruner(built) as handle:
            wanted = generate(built, **req.inputs)
            report = handle.report
            vision = handle.encode(**req.inputs)
            away = ("pixel_values", "image_sizes")
            rest = {k: v for k, v in req.inputs.items() if k not in away}
            again = generate(built, **rest, vision=vision)
        assert distance(again, wanted) == 0
        assert report is not None and handle.report is not None
        assert report.flops_after == handle.report.flops_after < report.flops_before


@pytest.mark.parametrize("fuse", [True, False])
def test_flops_by_hand(fuse: bool) -> None:
    """Tokens before the attention, tokens behind it in the MLP; a layer behind sees as many."""
    built = model()
    req = request(built, [1])
    _, report = given_to_projector(built, EViT(keep=6, fuse=fuse), req.inputs)
    width, inner, more = 32, 48, int(fuse)
    assert left_each_time(16, 6, 2) == [10, 6]
    spent = 0
    for before, after in ((17, 11 + more), (11 + more, 7 + more), (7 + more, 7 + more)):
        spent += 4 * before * width**2 + 2 * before**2 * width + 2 * after * width * inner
    usual = 3 * (4 * 17 * width**2 + 2 * 17**2 * width + 2 * 17 * width * inner)
    _, other = given_to_projector(built, VisPruner(keep=6), req.inputs)
    assert report.flops_before == other.flops_before
    assert other.flops_after - report.flops_after == 2 * (usual - spent) > 0


def test_flops_are_those_of_the_layers_that_run() -> None:
    """Counted by the inputs of each layer's projections, of patches that come four at a time."""
    built, inputs = internvl()
    seen: list[int] = []
    hooks = [
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for layer in built.model.vision_tower.encoder.layer
        for part in (layer.attention, layer.mlp)
    ]
    for pruner in (EViT(4), EViT(4, fuse=False), ToMe(4)):
        # The contract, which runs whole towers, is through.
        given_to_projector(built, pruner, inputs)
        with torch.no_grad(), pruner(built) as handle:
            built(**inputs)
            seen.clear()
            built(**inputs)
        spent, width, inner = 0, 32, 48
        assert len(seen) == 6 and min(seen) < 37
        for before, after in zip(seen[::2], seen[1::2], strict=True):
            spent += 4 * before * width**2 + 2 * before**2 * width + 2 * after * width * inner
        usual = 3 * (4 * 37 * width**2 + 2 * 37**2 * width + 2 * 37 * width * inner)
        _, other = given_to_projector(built, VisPruner(4), inputs)
        assert other.flops_after - handle.report.flops_after == 2 * 2 * (usual - spent)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    built = model().to(dtype)
    req = request(model(), [2])
    req.inputs["pixel_values"] = req.inputs["pixel_values"].to(dtype)
    features, report = given_to_projector(built, EViT(keep=6), req.inputs)
    assert features.dtype == dtype and [len(k) for k in report.kept] == [6, 6]
    assert features.isfinite().all()
    whole, _ = given_to_projector(model(), EViT(keep=6), request(model(), [2]).inputs)
    both = (features != 0).any(dim=-1) & (whole != 0).any(dim=-1)
    assert int((features != 0).any(dim=-1).sum()) == 12
    near = float((features.float() - whole)[both].abs().max())
    assert near < 40 * torch.finfo(dtype).eps * float(whole.abs().max())


def test_gradients_reach_what_is_left() -> None:
    """Of the patches' embeddings: all that stay or go into the token made of others."""
    for fuse in (True, False):
        built = model(vision_feature_layer=-1).train()
        req = request(built, [1])
        embedded: list[Tensor] = []

        def keep(_: Any, __: Any, output: Tensor, embedded: list[Tensor] = embedded) -> None:
            # The contract's own run has none.
            if output.requires_grad:
                output.retain_grad()
                embedded.append(output)

        hook = built.model.vision_tower.embeddings.register_forward_hook(keep)
        labels = req.inputs["input_ids"].clone()
        labels[labels == 5] = -100
        # One layer, whose attention sees all: what leaves in the first has keys there.
        with EViT(keep=5, layers=(0,), fuse=fuse)(built) as handle:
            built(**req.inputs, labels=labels).loss.backward()
        hook.remove()
        gradient = embedded[-1].grad
        assert gradient is not None and bool((gradient != 0).any(dim=-1).all())
        kept = handle.report.kept[0]
        assert len(kept) == 5
        norms = gradient[0, 1:].norm(dim=-1)
        gone = torch.ones(16, dtype=torch.bool).index_put((kept,), torch.tensor(False))
        assert float(norms[kept].median()) > 2 * float(norms[gone].median())


def test_videos_and_towers_of_other_families() -> None:
    for name, pruner in (("video_llava", EViT(keep=5)), ("paligemma", EViT(keep=0.5))):
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


REFUSED = [
    ("qwen2_vl", "at their own resolution"),
    ("pixtral", "at their own resolution"),
    ("idefics3", "not among the layers that it knows"),
    ("llama4", "puts its CLS token last"),
]


@pytest.mark.parametrize(("name", "why"), REFUSED)
def test_refused_at_attach(name: str, why: str) -> None:
    with pytest.raises(VlmpruneError, match=why), EViT(keep=3)(ZOO[name].build()):
        raise AssertionError("attached")


def test_refused_before_any_work() -> None:
    built = model()
    req = request(built, [1])
    ran: list[int] = []
    built.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))

    def refused(pruner: Any, why: str, **more: Any) -> None:
        with pytest.raises(VlmpruneError, match=why), pruner(built):
            generate(built, **req.inputs, **more)

    refused(EViT(keep=3, layers=(1, 2)), "gets what layer 1 makes; use layers up to that")
    refused(EViT(keep=3) | VisionZip(keep=2), "changes the tokens of the vision encoder")
    several = model(vision_feature_layer=[-2, -1])
    which = r"vision_feature_layer=\[-2, -1\]"
    with pytest.raises(VlmpruneError, match=which), EViT(keep=5)(several):
        generate(several, **req.inputs)
    built.model.vision_tower.config._attn_implementation = "flash_attention_2"
    refused(EViT(keep=5), "flash_attention_2 is not among those under which tokens are dropped")
    assert not ran
    one = ZOO["llava_onevision"].build()
    video = ZOO["llava_onevision"].request(one, [["video"]])
    with pytest.raises(VlmpruneError, match="blends neighbouring"), EViT(keep=0.5)(one):
        generate(one, **video.inputs)
    checkpointed = model().train()
    later = getattr(checkpointed, "activation_checkpointing_enable", None)  # the newer name
    (later or checkpointed.gradient_checkpointing_enable)()
    with pytest.raises(VlmpruneError, match="a second time"), EViT(keep=5)(checkpointed):
        checkpointed(**req.inputs)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"budget": "image"}, "drops within a crop"),
        ({"layers": (3, 1)}, "no rising numbers"),
        ({"layers": (1, 1)}, "no rising numbers"),
        ({"layers": ()}, "no rising numbers"),
        ({"layers": (-1,)}, "no rising numbers"),
        ({"layers": "2;x"}, "no rising numbers"),
        ({"layers": (True,)}, "no rising numbers"),
        ({"fuse": 1}, "use True or False"),
        ({"keep": 0}, "keep=0"),
    ],
)
def test_settings_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(VlmpruneError, match=why):
        EViT(**({"keep": 5} | settings))


def test_settings_as_text() -> None:
    pruner = EViT(0.25, layers=(3, 6), fuse=False)
    assert spec.parse("evit:keep=0.25,layers=3;6,fuse=false") == pruner
    assert spec.parse(spec.dump(pruner)) == pruner
    assert spec.parse("evit:keep=9,layers=4") == EViT(9, layers=(4,))
    with pytest.raises(VlmpruneError, match="must come first"):
        VisPruner(keep=5) | EViT(keep=3)
    assert (EViT(keep=5) | PLPHP()).acts == "dropping"
