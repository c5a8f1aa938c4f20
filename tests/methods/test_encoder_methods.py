"""Methods that choose before the language model, on views made by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_views import view_of
from vlmprune import (
    EVS,
    AveragePooling,
    CDPruner,
    DivPrune,
    FasterVLM,
    FoPru,
    PruMerge,
    RandomTokens,
    UniformGrid,
    VisionZip,
    VisPruner,
    VlmpruneError,
    VtcCls,
)
from vlmprune.methods import METHODS
from vlmprune.select import farthest_point
from vlmprune.views import Reads

# Those that keep exactly what they are told to.
EXACT = (
    FasterVLM,
    VtcCls,
    FoPru,
    VisionZip,
    PruMerge,
    DivPrune,
    CDPruner,
    RandomTokens,
    UniformGrid,
)
ALL = (*EXACT, AveragePooling, EVS)


def test_defaults_are_the_authors() -> None:
    settings_ = {cls: {f.name: f.default for f in fields(cls)} for cls in ALL}
    assert settings_[VtcCls]["first_layer"] is None
    assert list(VtcCls(keep=64).summed(24)) == [16, 17, 18, 19, 20, 21, 22]
    assert settings_[VisionZip]["contextual_ratio"] == 10 / 64
    prumerge = PruMerge()
    assert (prumerge.keep, prumerge.plus, prumerge.neighbours) == (None, True, 32)
    assert prumerge.heads == "joined"
    assert settings_[FoPru]["choose"] == "rank"
    assert settings_[CDPruner]["text_tower"] == "auto"
    assert settings_[RandomTokens]["seed"] == 0
    assert settings_[AveragePooling]["where"] == "features"
    assert {s["positions"] for s in settings_.values()} == {"auto"}
    budgets = {cls: s["budget"] for cls, s in settings_.items() if "budget" in s}
    assert budgets.pop(DivPrune) == "image" and set(budgets.values()) == {"crop"}
    for cls in ALL:
        assert METHODS[{v: k for k, v in METHODS.items()}[cls]] is cls
        assert cls.text_agnostic == (cls is not CDPruner)
        assert cls.merges == (cls in (VisionZip, PruMerge, AveragePooling))


@pytest.mark.parametrize(
    ("depth", "layers"), [(24, range(16, 23)), (12, range(8, 11)), (3, [1]), (2, [0]), (1, [0])]
)
def test_vtc_cls_sums_the_same_share_of_other_depths(depth: int, layers: Any) -> None:
    pruner = VtcCls(keep=4)
    assert list(pruner.summed(depth)) == list(layers)
    assert pruner.reads(depth, depth - 2) == Reads(layers=tuple(sorted({*layers, depth - 1})))


def test_vtc_cls_leaves_the_last_layer_out() -> None:
    view = view_of((0,), (1, 4))
    by_layer = {1: [9.0, 0, 0, 1], 2: [0.0, 8, 0, 2], 3: [0.0, 0, 99, 0]}
    view = replace(view, layers={k: torch.tensor([v]) for k, v in by_layer.items()})
    kept = VtcCls(keep=2, first_layer=1).select(view).kept
    assert kept.nonzero()[:, 1].tolist() == [0, 1]
    assert VtcCls(keep=1, first_layer=2).select(view).kept.nonzero()[:, 1].tolist() == [1]
    # A stage of a chain may have asked for earlier layers.
    earlier = replace(view, layers={**view.layers, 0: torch.tensor([[0.0, 0, 0, 99]])})
    assert VtcCls(keep=2, first_layer=1).select(earlier).kept.equal(kept)


def test_faster_vlm_is_vispruner_with_ratio_one() -> None:
    view = view_of(boxes={1: (2, 3)})
    wanted = VisPruner(keep=6, important_ratio=1).select(view)
    assert FasterVLM(keep=6).select(view).kept.equal(wanted.kept)
    assert not VisPruner(keep=6).select(view).kept.equal(wanted.kept)


def test_fopru_by_rows() -> None:
    """4 × 5: received sums of the rows 5, 50, 10, 20; what is given varies less."""
    received = torch.tensor([1.0, 10, 2, 4]).repeat_interleave(5)[None]
    view = view_of((0,))
    view = replace(view, received=received, given=torch.full_like(received, 7.0))
    rows = FoPru(keep=10, choose="row").select(view).kept.view(4, 5).all(dim=1)
    assert rows.tolist() == [False, True, False, True]
    for keep, count in ((5, 1), (9, 1), (14, 2), (20, 4), (0.5, 2), (0.74, 2), (0.75, 3), (1.0, 4)):
        kept = FoPru(keep=keep, choose="row").select(view).kept
        assert int(kept.sum()) == count * 5
    # By rank, fractions are rounded down too: 0.29 · 20 = 5.8.
    assert int(FoPru(keep=0.29).select(view).kept.sum()) == 5
    for keep in (4, 0.24):
        with pytest.raises(VlmpruneError, match=r"less than one row of the grid \(5 of 20 tokens"):
            FoPru(keep=keep, choose="row").select(view)


def test_fopru_by_rows_of_what_is_left() -> None:
    """Five tokens are one of four rows; of the 2 × 3 that unpadding leaves of crop 1, one too."""
    view = view_of((0, 0), boxes={1: (2, 3)})
    kept = FoPru(keep=5, choose="row").select(view).kept.view(2, 4, 5)
    assert kept.sum(dim=(1, 2)).tolist() == [5, 3]
    assert kept[1].any(dim=1).sum() == 1 and not kept[1, :2].any() and not kept[1, :, :2].any()


@pytest.mark.parametrize(
    ("keep", "dominant", "contextual"), [(64, 54, 10), (128, 108, 20), (192, 162, 30), (6, 6, 0)]
)
def test_visionzip_splits_its_budget(keep: int, dominant: int, contextual: int) -> None:
    chosen = VisionZip(keep=keep).select(view_of((0, 1), (24, 24)))
    assert chosen.kept.sum(dim=1).tolist() == [keep, keep]
    assert chosen.roles["important"].sum(dim=1).tolist() == [dominant] * 2
    assert chosen.roles["merged"].sum(dim=1).tolist() == [contextual] * 2
    if contextual:
        assert chosen.merge is not None and chosen.members is not None
        assert torch.equal(chosen.last, chosen.roles["merged"])
        # Every cell went somewhere, and 576 - dominant of them into contextual tokens.
        assert int((chosen.members >= 0).sum()) == 2 * 576
        assert len(chosen.merge.into) == 2 * (576 - dominant)
        assert not chosen.merge.projected
    else:
        assert chosen.merge is None and chosen.last is None


def test_prumerge_counts_outliers_crop_by_crop() -> None:
    """Two outliers in crop 0, one in crop 1, none in crop 2; each with a residual token."""
    view = view_of((0, 0, 1))
    scores = torch.linspace(0.010, 0.012, 20).repeat(3, 1)
    scores[0, 3] = scores[0, 8] = scores[1, 5] = 0.5
    view = replace(view, joined=scores)
    chosen = PruMerge(plus=False).select(view)
    assert chosen.kept.sum(dim=1).tolist() == [3, 2, 2]
    assert chosen.roles["important"].nonzero().tolist() == [[0, 3], [0, 8], [1, 5], [2, 19]]
    assert chosen.last is not None and chosen.last.sum(dim=1).tolist() == [1, 1, 1]
    plus = PruMerge().select(view)
    assert plus.kept.sum(dim=1).tolist() == [2 + 6 + 1, 1 + 4 + 1, 1 + 4 + 1]
    assert PruMerge().reads(24, 22) == Reads(joined=23)
    # By heads' means, as vlmprune 0.1 did, from what else there is to see.
    old = PruMerge(plus=False, heads="mean")
    assert old.reads(24, 22) == Reads(layers=(23,), keys=23)
    means = replace(view, layers={2: torch.rand(3, 20), 3: scores}, joined=torch.rand(3, 20))
    assert old.select(means).kept.equal(chosen.kept)
    assert not PruMerge(plus=False).select(means).kept.equal(chosen.kept)


def test_cdpruner_weighs_by_the_question() -> None:
    """Orthogonal tokens add their relevance alone: the least cosine to the question first."""
    view = view_of((0, 1), (1, 5))
    cosine = torch.tensor([[0.3, 0.1, 0.5, 0.2, 0.4], [0.0, 0.9, 0.8, 0.1, 0.2]])
    view = replace(view, projected=torch.eye(5).repeat(2, 1, 1), relevance=cosine)
    kept = CDPruner(keep=2).select(view).kept
    assert kept.nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 3]]
    # By the language model's words, for want of a text tower, the largest first.
    kept = CDPruner(keep=2).select(replace(view, by_words=True)).kept
    assert kept.nonzero().tolist() == [[0, 2], [0, 4], [1, 1], [1, 2]]
    reads = Reads(projected=True, relevance="auto", asked="bare")
    assert CDPruner(keep=2).reads(24, 22) == reads
    assert CDPruner(keep=2, question="prompt").reads(24, 22) == replace(reads, asked="prompt")
    assert CDPruner(keep=2, text_tower="clip").reads(24, 22).relevance == "clip"


def test_divprune_takes_what_is_far_apart() -> None:
    """At 0°, 5°, 90°, 180°, 185°: 90° is loneliest, then 185°, 95° away, then 0°, by 5°."""
    angles = torch.tensor([0.0, 5, 90, 180, 185]).deg2rad()
    view = view_of((0,), (1, 5))
    view = replace(view, projected=torch.stack((angles.cos(), angles.sin()), dim=1)[None])
    assert DivPrune(keep=1).select(view).kept.nonzero()[:, 1].tolist() == [2]
    assert DivPrune(keep=3).select(view).kept.nonzero()[:, 1].tolist() == [0, 2, 4]


def test_divprune_chooses_from_all_crops_of_an_image() -> None:
    view = view_of((0, 0, 0, 1), (4, 5))
    together, apart = DivPrune(keep=9).select(view).kept, DivPrune(keep=9, budget="crop")
    assert view.narrow(together).counts("image") == [9, 9]
    # As if they were one long crop, whatever comes of each; by crop each has nine.
    assert view.projected is not None
    long = view.projected[:3].flatten(0, 1)[None]
    assert together[:3].flatten().nonzero()[:, 0].tolist() == farthest_point(long, 9)[0].tolist()
    assert not together[:3].equal(DivPrune(keep=3, budget="crop").select(view).kept[:3])
    assert view.narrow(apart.select(view).kept).counts("crop") == [9, 9, 9, 9]


def test_evs_keeps_the_first_frame_and_what_changed() -> None:
    """A video of three frames, an image, a video of two; eight tokens a frame."""
    view = view_of((0, 0, 0, 1, 2, 2), (2, 4), videos=(True, False, True))
    frames = torch.zeros(6, 8, 2)
    frames[..., 0] = 1
    # Turned away from the frame before, and back again in the next one.
    frames[1, 2] = frames[5, 6] = torch.tensor([0.0, 1])
    frames[1, 5] = torch.tensor([1.0, 1])
    view = replace(view, projected=frames)
    chosen = EVS(keep=0.5).select(view)
    # 12 of 24, and 8 of 16, which is the first frame alone.
    assert chosen.kept.sum(dim=1).tolist() == [8, 2, 2, 8, 8, 0]
    assert chosen.roles["changed"].nonzero().tolist() == [[1, 2], [1, 5], [2, 2], [2, 5]]
    assert chosen.roles["whole"].sum(dim=1).tolist() == [0, 0, 0, 8, 0, 0]
    # Of equals the lower index, never less than a frame, and int counts a clip.
    assert EVS(keep=9).select(view).kept.sum(dim=1).tolist() == [8, 1, 0, 8, 8, 1]
    assert EVS(keep=1).select(view).kept.sum(dim=1).tolist() == [8, 0, 0, 8, 8, 0]
    assert EVS(keep=0.375).select(view).kept.sum(dim=1).tolist() == [8, 1, 0, 8, 8, 0]
    assert EVS(keep=1.0).select(view).kept.equal(view.candidates)


def test_evs_lets_requests_of_images_pass() -> None:
    view = view_of()
    EVS(keep=9999).check_request(view.candidates, view.images, False)
    assert EVS(keep=2).select(view).kept.equal(view.candidates)


def test_random_tokens_repeat_and_crops_differ() -> None:
    view = view_of(boxes={1: (3, 4)})
    kept = RandomTokens(keep=6).select(view).kept
    assert RandomTokens(keep=6).select(view_of(boxes={1: (3, 4)})).kept.equal(kept)
    # Another picture, other places.
    other = RandomTokens(keep=6).select(view_of(boxes={1: (3, 4)}, seed=5)).kept
    assert not other[0].equal(kept[0])
    assert not RandomTokens(keep=6, seed=1).select(view).kept.equal(kept)
    assert not kept[0].equal(kept[2])
    # Every cell's turn comes: of 400 draws of 6 of 20 each is in about 120.
    drawn = sum(
        RandomTokens(keep=6, seed=s).select(view_of((0,))).kept[0].long() for s in range(400)
    )
    assert isinstance(drawn, torch.Tensor) and 75 < int(drawn.min()) <= int(drawn.max()) < 165


def test_uniform_grid_on_what_is_left() -> None:
    """An unpadded crop has its own grid; where no rectangle is left, the raster order is used."""
    view = view_of((0, 0), (4, 4), boxes={1: (2, 4)})
    kept = UniformGrid(keep=4).select(view).kept.view(2, 4, 4)
    assert kept[0].nonzero().tolist() == [[1, 1], [1, 3], [3, 1], [3, 3]]
    # 2 × 4 cells from row 2: √(4 · 2 / 4) makes one row of four.
    assert kept[1].nonzero().tolist() == [[3, 0], [3, 1], [3, 2], [3, 3]]
    odd = view_of((0,), (1, 9))
    odd = odd.narrow(torch.tensor([[True] * 4 + [False] + [True] * 4]))
    assert UniformGrid(keep=2).select(odd).kept.nonzero()[:, 1].tolist() == [2, 7]


def test_average_pooling_of_what_is_left() -> None:
    view = view_of((0, 0), (4, 4), boxes={1: (2, 4)})
    chosen = AveragePooling(keep=4).select(view)
    # 2 × 2 blocks of the whole crop; of 2 × 4 cells those of two rows and one column.
    assert chosen.kept[0].nonzero()[:, 0].tolist() == [0, 2, 8, 10]
    assert chosen.kept[1].nonzero()[:, 0].tolist() == [8, 9, 10, 11]
    assert chosen.merge is not None and chosen.members is not None and chosen.last is None
    assert chosen.members[1].tolist() == [-1] * 8 + [24, 25, 26, 27] * 2
    assert chosen.merge.weight.tolist() == [0.25] * 16 + [0.5] * 8
    assert chosen.roles["merged"].equal(chosen.kept)
    assert not chosen.merge.projected
    after = AveragePooling(keep=4, where="projected").select(view).merge
    assert after is not None and after.projected


@pytest.mark.parametrize("cls", EXACT)
@settings(max_examples=15)
@given(data=st.data())
def test_any_budget_on_images_of_any_shape(cls: Any, data: st.DataObject) -> None:
    """Unpadded crops, several images, int and fraction, each unit of the budget."""
    boxes = {
        crop: data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
        for crop in data.draw(st.sets(st.integers(0, 3)))
    }
    view = view_of((0, 0, 1, 2), boxes=boxes, seed=data.draw(st.integers(0, 99)))
    budget = "crop" if cls is PruMerge else data.draw(st.sampled_from(["crop", "image"]))
    counts = view.counts(budget)
    keep = data.draw(st.integers(1, max(counts)) | st.floats(0.01, 1.0))
    pruner = cls(keep=keep) if cls is PruMerge else cls(keep=keep, budget=budget)
    pruner.check_request(view.candidates, view.images, False)
    chosen = pruner.select(view)
    assert not bool((chosen.kept & ~view.candidates).any())
    rounded = (lambda n: int(keep * n + 1e-9)) if cls is FoPru else (lambda n: round(keep * n))
    wanted = [min(keep, n) if isinstance(keep, int) else max(1, rounded(n)) for n in counts]
    assert view.narrow(chosen.kept).counts(budget) == wanted
    roles = torch.stack([*chosen.roles.values(), torch.zeros_like(chosen.kept)])
    assert int(roles.sum(dim=0).max()) <= 1 and not bool((roles.any(dim=0) & ~chosen.kept).any())
    if chosen.merge is not None:
        flat = chosen.kept.flatten()
        seen = view.candidates.flatten()
        assert bool(flat[chosen.merge.into].all()) and bool(seen[chosen.merge.source].all())
        # Members went into kept cells of the same unit, and kept cells into themselves.
        owner = chosen.members.flatten()
        assert bool(flat[owner[owner >= 0]].all())
        assert owner[flat].tolist() == flat.nonzero()[:, 0].tolist()
        assert bool((owner[~seen] == -1).all())


@settings(max_examples=20)
@given(st.integers(1, 40), st.sampled_from(["crop", "image"]), st.integers(0, 99))
def test_average_pooling_stays_within_its_budget(keep: int, budget: Any, seed: int) -> None:
    view = view_of((0, 0, 1), boxes={1: (3, 2)}, seed=seed)
    keep = min(keep, max(view.counts(budget)))
    kept = AveragePooling(keep=keep, budget=budget).select(view).kept
    found = view.narrow(kept).counts(budget)
    assert all(1 <= n <= min(keep, m) for n, m in zip(found, view.counts(budget), strict=True))


@pytest.mark.parametrize("cls", ALL)
def test_keeping_everything_merges_nothing(cls: Any) -> None:
    view = view_of(boxes={1: (2, 3)}, videos=(True, False))
    chosen = cls(keep=1.0).select(view)
    assert chosen.kept.equal(view.candidates)
    assert chosen.merge is None and chosen.members is None and chosen.last is None


@pytest.mark.parametrize("cls", ALL)
def test_numpy_integers_count_tokens_too(cls: Any) -> None:
    # One crop has fewer tokens than are to be kept.
    view = view_of((0, 0, 1), boxes={1: (2, 2)}, videos=(True, False))
    found, same = cls(keep=np.int64(5)), cls(keep=5)
    assert found == same and repr(found) == repr(same)
    assert found.select(view).kept.equal(same.select(view).kept)
    assert not found.select(view).kept.equal(view.candidates)


@pytest.mark.parametrize("choose", ["rank", "row"])
def test_numpy_integers_are_no_fractions_of_rows(choose: Any) -> None:
    view = view_of()
    found = FoPru(keep=np.int64(5), choose=choose).select(view).kept
    assert found.equal(FoPru(keep=5, choose=choose).select(view).kept)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FasterVLM(keep=0), "keep=0 leaves no visual tokens"),
        (lambda: VisionZip(keep=8, contextual_ratio=1.5), "contextual_ratio=1.5 is outside"),
        (lambda: VtcCls(keep=8, first_layer=-1), "first_layer=-1 is below 0"),
        (lambda: VtcCls(keep=8, first_layer=2.0), "first_layer=2.0 is not a whole number"),
        (lambda: VtcCls(keep=8, first_layer=23).reads(24, 22), "leaves no layer .* at most 22"),
        (lambda: FoPru(keep=8, choose="column"), "choose='column' is not known"),
        (lambda: FoPru(keep=8, choose="row", budget="image"), "does not go with choose='row'"),
        (lambda: PruMerge(keep=0), "keep=0 leaves no visual tokens"),
        (lambda: PruMerge(plus=1), "plus=1 is neither"),
        (lambda: PruMerge(neighbours=-1), "neighbours=-1 is not a whole number"),
        (lambda: PruMerge(heads="all"), "heads='all' is not known; use 'joined' or 'mean'"),
        (lambda: PruMerge(positions="new"), "positions='new' is not known"),
        (lambda: CDPruner(keep=8, question="all"), "question='all' is not known"),
        (lambda: CDPruner(keep=8, text_tower=""), "text_tower='' is no source"),
        (lambda: EVS(keep=1.5), "keep=1.5 is a fraction outside"),
        (lambda: EVS(keep=2, positions="new"), "positions='new' is not known"),
        (lambda: RandomTokens(keep=8, seed=-1), "seed=-1 is not a whole number"),
        (lambda: AveragePooling(keep=8, where="after"), "where='after' is not known"),
        (lambda: UniformGrid(keep=8, budget="row"), "budget='row' is not known"),
        (lambda: UniformGrid(keep=8).select(replace(view_of(), grids=())), "grids .* not known"),
        (
            lambda: FoPru(keep=8, choose="row").select(replace(view_of(), grids=())),
            "choose='row' needs the grids of crops; use choose='rank'",
        ),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(VlmpruneError, match=message):
        make()
