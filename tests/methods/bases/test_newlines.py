"""Newline tokens, kept as the host has them or dropped as the methods' releases do."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from answers import DIFFERENT, TOLERANCE, distance, generate
from vlmprune import PLPHP, FasterVLM, FastV, UniformGrid, Vision, VisPruner, VlmpruneError, spec
from vlmprune.hosts.families.frames import OneVisionVideos
from vlmprune.methods import METHODS
from vlmprune.methods.bases.budgeted import WithBudget
from vlmprune.runtime.family import family_of
from zoo_oracle import KNOWN, dropped_columns, masked

pytestmark = pytest.mark.oracle

BATCHES: dict[str, list[list[Any]]] = {
    "one image": [["image"]],
    "several images": [["image", "image", "image"]],
    "padded batch": [["image", "image"], ["image"], []],
    "one video": [["video"]],
    "mixed": [["video", "image"], ["image", "video", "image"], []],
}
# Families with newline tokens, and what of their media has them.
WITH = {
    "llava_next": ("image",),
    "llava_next_video": ("image",),
    "llava_onevision": ("image", "video"),
}
CASES = [
    (name, attention, batch)
    for name, attention, batch in product(WITH, ["sdpa", "eager"], BATCHES)
    if any(kind in WITH[name] for row in BATCHES[batch] for kind in row)
    and (name != "llava_next" or batch not in ("one video", "mixed"))
]
BUDGETED = [name for name, cls in METHODS.items() if issubclass(cls, WithBudget)]


def both(built: Any, inputs: Any, pruner: Any, other: Any) -> tuple[Any, Any, Any, Any]:
    """Answer and report with either of two pruners."""
    found = []
    for one in (pruner, other):
        with one(built) as handle:
            found.append(generate(built, inputs))
        found.append(handle.report)
    return tuple(found)  # type: ignore[return-value]


def adds_itself(built: Any, inputs: Any, pruner: Any) -> bool:
    """Whether the host adds newlines behind videos in its forward, as early releases do.

    Then they cannot be dropped, which is said.
    """
    if "pixel_values_videos" not in inputs:
        return False
    if not any(one.adds_newlines for one in family_of(built).media if one.kind == "video"):
        return False
    with pruner(built), pytest.raises(VlmpruneError, match="cannot be had for videos here"):
        generate(built, inputs)
    return True


def cells_of(report: Any) -> list[list[int]]:
    """The patches of what is kept of each item, without newlines."""
    pairs = zip(report.layouts, report.kept, strict=True)
    labels = [layout.labels[kept].tolist() for layout, kept in pairs]
    return [[label for label in own if label >= 0] for own in labels]


@pytest.mark.parametrize(
    ("name", "attention", "batch", "policy"),
    [
        (name, attention, batch, policy)
        for (name, attention, batch), policy in product(CASES, ["compact", "original"])
        # All pairs in batches with padding; of the others, one policy for each attention.
        if batch in ("padded batch", "mixed") or (attention == "eager") == (policy == "compact")
    ],
)
def test_dropping_equals_masking(name: str, attention: str, batch: str, policy: Any) -> None:
    """The full model with those tokens masked that were not chosen, and the newlines among them."""
    entry = KNOWN[name]
    built = entry.build(attention)
    req = entry.request(built, BATCHES[batch])
    settings: dict[str, Any] = {"keep": 3, "positions": policy}
    if adds_itself(built, req.inputs, VisPruner(**settings, newlines="drop")):
        return
    pruned, report, kept, usual = both(
        built, req.inputs, VisPruner(**settings, newlines="drop"), VisPruner(**settings)
    )
    expected = masked(built, req, dropped_columns(req, report), policy)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE
    # Controls: with the newlines seen, in the oracle and in a call, logits differ.
    whole = masked(built, req, dropped_columns(req, report, usual.kept), policy)
    assert distance(pruned, whole) > DIFFERENT
    assert distance(pruned, kept) > DIFFERENT
    assert distance(kept, whole) < TOLERANCE

    # The same patches are chosen, and what is said of them is of them.
    assert cells_of(report) == cells_of(usual)
    newlines = sum(one.newlines for one in report.layouts)
    for one, left in ((report, 0), (usual, newlines)):
        assert one.visual_tokens_before == sum(req.lengths)
        assert (one.newline_tokens_before, one.newline_tokens) == (newlines, left)
        assert one.visual_tokens_after == sum(map(len, cells_of(one))) + left
        assert one.as_dict()["newline_tokens"] == left
    assert 0 < newlines == usual.visual_tokens_after - report.visual_tokens_after
    for roles, chosen, layout in zip(report.roles, report.kept, report.layouts, strict=True):
        named = roles["important"] | roles["diverse"]
        assert torch.equal(named.nonzero()[:, 0], chosen)
        assert bool((layout.labels[chosen] >= 0).all())


@pytest.mark.parametrize("name", sorted(set(KNOWN) - set(WITH)))
def test_families_without_newlines_answer_the_same_bits(name: str) -> None:
    """So do those with tokens that are no patch's but no newline either, as Video-LLaVA's CLS."""
    entry = KNOWN[name]
    built = entry.build()
    rows: list[list[Any]] = [["image", "image"], ["image"]]
    if "video" in entry.modalities:
        rows = [["video", "image"], ["image"]]
    req = entry.request(built, rows)
    dropped, report, kept, usual = both(
        built, req.inputs, VisPruner(0.4, newlines="drop"), VisPruner(0.4)
    )
    assert all(torch.equal(a, b) for a, b in zip(dropped.logits, kept.logits, strict=True))
    assert [one.tolist() for one in report.kept] == [one.tolist() for one in usual.kept]
    assert report.newline_tokens == usual.newline_tokens == report.newline_tokens_before
    assert (report.newline_tokens > 0) == (name == "video_llava")


def test_a_cls_token_that_is_a_visual_token_is_no_newline() -> None:
    built = tiny.model(vision_feature_select_strategy="full")
    req = tiny.request(built, [1])
    with VisPruner(3, newlines="drop")(built) as handle:
        generate(built, req.inputs)
    assert len(handle.report.kept[0]) == 4 and int(handle.report.kept[0][0]) == 0
    assert handle.report.newline_tokens == 1


@pytest.mark.parametrize("name", BUDGETED)
def test_every_method_with_a_budget_drops_them(name: str) -> None:
    """As many tokens fewer as there are newlines, the same patches, and equal to masking or not
    depending on merging alone, which the first test holds for a method that merges nothing."""
    entry = KNOWN["llava_onevision" if name == "evs" else "llava_next"]
    built = entry.build()
    kind: Any = "video" if name == "evs" else "image"
    req = entry.request(built, [[kind, "image"], ["image"]])
    settings = "" if name == "prumerge" else ":keep=4"
    if name == "downsample":
        settings = ":keep=9"
    join = "," if settings else ":"
    drops = spec.parse(f"{name}{settings}{join}newlines=drop")
    if adds_itself(built, req.inputs, drops):
        return
    dropped, report, kept, usual = both(built, req.inputs, drops, spec.parse(f"{name}{settings}"))
    assert report.newline_tokens == 0 < usual.newline_tokens == report.newline_tokens_before
    assert cells_of(report) == cells_of(usual)
    assert report.visual_tokens_after == usual.visual_tokens_after - usual.newline_tokens
    assert distance(dropped, kept) > DIFFERENT


@pytest.mark.parametrize("keep", [1, 5, 16])
def test_a_square_picture_leaves_exactly_crops_times_keep(keep: int) -> None:
    built = tiny.model("llava_next")
    # One that fills its four crops, one whose crops lose a row each, and a narrow one.
    for size, exact in (((112, 112), True), ((96, 112), keep <= 12), ((200, 40), keep <= 8)):
        inputs = square(built, size)
        with VisPruner(keep, newlines="drop")(built) as handle, torch.no_grad():
            built(**inputs)
        report = handle.report
        (layout,) = report.layouts
        available = layout.candidates().sum(dim=1)
        # Never a cell that the host cuts away.
        assert report.visual_tokens_after == int(available.clamp(max=keep).sum())
        assert (report.visual_tokens_after == layout.crops * keep) == exact


def square(built: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """A request of one picture (height, width)."""
    sizes = torch.tensor([size])
    pixels = torch.randn(1, 5, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        (features,) = built.get_image_features(pixels, sizes).pooler_output
    ids = torch.tensor([[1, 7, *[tiny.IMAGE] * len(features), 9, 11]])
    return {
        "pixel_values": pixels,
        "image_sizes": sizes,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


@pytest.mark.parametrize("name", list(WITH))
def test_stored_visions_have_none(name: str, tmp_path: Path) -> None:
    entry = KNOWN[name]
    built = entry.build()
    video = "video" in WITH[name]
    req = entry.request(built, [["video" if video else "image", "image"], ["image"]])
    if adds_itself(built, req.inputs, VisPruner(5, newlines="drop")):
        req = entry.request(built, [["image", "image"], ["image"]])
    with VisPruner(5, newlines="drop")(built) as handle:
        wanted = generate(built, req.inputs)
        report = handle.report
        handle.encode(**req.inputs).save(tmp_path / "seen.safetensors")
        loaded = Vision.load(tmp_path / "seen.safetensors")
        pixels = ("pixel_values", "pixel_values_videos")
        rest = {k: v for k, v in req.inputs.items() if k not in pixels}
        again = generate(built, rest | {"vision": loaded})
        assert all(torch.equal(a, b) for a, b in zip(wanted.logits, again.logits, strict=True))
        assert handle.report.newline_tokens == 0 < handle.report.newline_tokens_before
    assert sum(len(item.features) for item in loaded.items) == report.visual_tokens_after
    # What was stored without them does not serve a pruner that keeps them.
    with VisPruner(5)(built), pytest.raises(VlmpruneError, match="newlines='drop'"):
        generate(built, rest | {"vision": loaded})


def test_one_stage_of_a_chain_is_enough() -> None:
    built = tiny.model("llava_next")
    req = tiny.request(built, [2, 1])
    first, last = VisPruner(9, newlines="drop"), FasterVLM(4, newlines="drop")
    found = []
    for chain in (first | FasterVLM(4), VisPruner(9) | last, first | last):
        assert chain.newlines == "drop"
        with chain(built) as handle:
            found.append((generate(built, req.inputs), handle.report))
    assert (VisPruner(9) | FasterVLM(4)).newlines == "keep"
    for out, report in found:
        assert report.newline_tokens == 0
        assert torch.equal(out.logits[0], found[0][0].logits[0])


@pytest.mark.parametrize("later", [FastV(keep=0.5, layer=1), PLPHP(r=0.5, alpha=1.0, beta=0.0)])
def test_what_follows_inside_the_language_model_finds_none(later: Any) -> None:
    built = tiny.model("llava_next")
    req = tiny.request(built, [1, 1])
    with (VisPruner(6, newlines="drop") | later)(built) as handle:
        generate(built, req.inputs)
    report = handle.report
    assert report.newline_tokens == 0 < report.newline_tokens_before
    with (VisPruner(6) | later)(built) as handle:
        generate(built, req.inputs)
    # What such a method drops of them is not counted as left.
    left = sum(
        int((layout.labels[kept] < 0).sum())
        for layout, kept in zip(handle.report.layouts, handle.report.kept, strict=True)
    )
    assert handle.report.newline_tokens == left
    assert (left < report.newline_tokens_before) == isinstance(later, FastV)


def test_releases_that_add_them_in_the_forward_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = KNOWN["llava_onevision"]
    built = entry.build()
    video, image = (entry.request(built, [[kind]]) for kind in ("video", "image"))
    monkeypatch.setattr(OneVisionVideos, "adds_newlines", True)
    with VisPruner(3, newlines="drop")(built) as handle:
        with pytest.raises(VlmpruneError, match="newlines='drop' cannot be had for videos") as told:
            generate(built, video.inputs)
        assert str(told.value).endswith(".") and "newlines='keep'" in str(told.value)
        generate(built, image.inputs)
        assert handle.report.newline_tokens == 0
    with VisPruner(3)(built) as handle:
        generate(built, video.inputs)
        assert handle.report.newline_tokens == 1


def test_a_setting_by_name_with_two_values() -> None:
    with pytest.raises(VlmpruneError, match="newlines='none'"):
        UniformGrid(4, newlines="none")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        UniformGrid(4, "auto", "crop", "drop")  # type: ignore[misc]
    one = VisPruner(4, newlines="drop")
    assert spec.dump(one) == "vispruner:keep=4,newlines=drop"
    assert spec.parse(spec.dump(one)) == one
