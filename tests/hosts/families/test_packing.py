"""Packing of families that scale, pool or merge: labels and scores against the host's own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlmprune import VlmpruneError
from vlmprune.draw.boxes import token_boxes
from vlmprune.hosts.families import FAMILIES
from vlmprune.runtime.family import family_of
from vlmprune.views.layout import NO_PATCH, Layout
from zoo import ZOO
from zoo.crops import FRAMES, PATCH, PINPOINTS, SIDE

FAMILY = ["llava_onevision", "llava_next_video", "video_llava", "pixtral", "mistral3"]
PATCHES = (SIDE // PATCH) ** 2
BUILT = {name: ZOO[name].build() for name in FAMILY}
lengths = st.integers(1, 6 * SIDE)
sizes = st.lists(st.tuples(lengths, lengths), min_size=1, max_size=3)


def medium(name: str, kind: str = "image") -> Any:
    return next(m for m in family_of(BUILT[name]).media if m.kind == kind)


def any_resolution(given_sizes: list[tuple[int, int]], name: str, **more: Any) -> tuple[Any, ...]:
    """The layouts of images of these sizes, and what the layouts are made from."""
    own = medium(name)
    inputs = {"image_sizes": torch.tensor(given_sizes), **more}
    inputs["pixel_values"] = torch.zeros(len(given_sizes), 1, 3, SIDE, SIDE)
    return own.layouts(BUILT[name], inputs, torch.empty(0)), inputs, own.crops(BUILT[name], inputs)


def packed(name: str, inputs: dict[str, Any], maps: list[Tensor], newline: Tensor) -> list[Tensor]:
    """The host's own packing, with its own settings."""
    base, config = BUILT[name].model, BUILT[name].config
    if name == "llava_onevision":
        ratio = {"vision_aspect_ratio": config.vision_aspect_ratio}
        out, _ = base.pack_image_features(maps, inputs["image_sizes"], newline, **ratio)
    else:
        out, _ = base.pack_image_features(maps, inputs["image_sizes"], "default", newline)
    return list(out)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video"])
@settings(max_examples=60)
@given(given_sizes=sizes, seed=st.integers(0, 2**31))
def test_each_token_holds_the_patch_of_its_label(
    name: str, given_sizes: list[tuple[int, int]], seed: int
) -> None:
    found, inputs, counts = any_resolution(given_sizes, name)
    generator = torch.Generator().manual_seed(seed)
    real = [torch.randn(n, PATCHES, 5, generator=generator) for n in counts]
    newline = torch.randn(5, generator=generator)
    images = zip(found, packed(name, inputs, real, newline), real, strict=True)
    for number, (one, tokens, patches) in enumerate(images):
        assert len(one.labels) == len(tokens)
        ends = one.labels == NO_PATCH
        assert torch.equal(tokens[ends], newline.expand(int(ends.sum()), -1))
        held = patches.flatten(0, 1)[one.labels[~ends]]
        assert torch.equal(tokens[~ends], held) != one.blended
        if one.blended:
            # Of each patch's weight in each token, the label's is the largest.
            many = one.crops * PATCHES
            single = inputs | {"image_sizes": inputs["image_sizes"][[number]]}
            eye = torch.eye(many).view(one.crops, PATCHES, many)
            (weights,) = packed(name, single, [eye], torch.zeros(many))
            own = weights[~ends].gather(1, one.labels[~ends, None])[:, 0]
            assert bool((own > 0.2).all())
            assert bool((own >= weights[~ends].amax(dim=1) - 1e-5).all())
            # Control: the neighbour's is not.
            other = weights[~ends].gather(1, (one.labels[~ends, None] + 1) % many)[:, 0]
            assert not bool((other >= weights[~ends].amax(dim=1) - 1e-5).all())


def test_some_of_the_sizes_are_scaled_down_and_some_are_not() -> None:
    found, _, _ = any_resolution([(90, 60), (50, 160), (56, 112)], "llava_onevision")
    assert [one.blended for one in found] == [True, True, False]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_a_scaled_token_is_chosen_by_what_it_holds(seed: int) -> None:
    """Scores and features of scaled images are those that the host's packing makes."""
    name, own = "llava_onevision", medium("llava_onevision")
    found, inputs, counts = any_resolution([(90, 60), (56, 112), (112, 90)], name)
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(sum(counts), PATCHES, generator=generator)
    features = torch.randn(sum(counts), PATCHES, 3, generator=generator)
    scores, cells = own.cells(BUILT[name], inputs, found, [attention], [features])
    channels = torch.cat((attention[..., None], features), dim=-1).split(counts)
    start = 0
    for one, tokens in zip(
        found, packed(name, inputs, list(channels), torch.zeros(4)), strict=True
    ):
        here = slice(start, start + one.crops)
        real = one.labels != NO_PATCH
        got = torch.cat((torch.stack(scores[here])[..., None], torch.stack(cells[here])), dim=-1)
        assert torch.equal(got.flatten(0, 1)[one.labels[real]], tokens[real])
        start += one.crops
    assert start == len(scores) == len(cells)


def test_images_that_share_a_row_have_one_crop_each() -> None:
    name = "llava_onevision"
    own = [(90, 60)] * 3
    found, _, counts = any_resolution(own, name, batch_num_images=torch.tensor([2, 1]))
    assert counts[:2] == [1, 1] and counts[2] > 1
    assert [one.newlines for one in found[:2]] == [1, 1]
    with pytest.raises(VlmpruneError, match="batch_num_images counts 2"):
        any_resolution(own, name, batch_num_images=torch.tensor([2]))


@settings(max_examples=25)
@given(side=st.integers(2, 9), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video"])
def test_frames_are_pooled_as_the_host_pools_them(name: str, side: int, seed: int) -> None:
    built, own = BUILT[name], medium(name, "video")
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(2 * FRAMES, side * side + (name != FAMILY[0]), generator=generator)
    features = torch.randn(2 * FRAMES, side * side, 4, generator=generator)
    inputs = {"pixel_values_videos": torch.zeros(2, FRAMES, 3, side * PATCH, side * PATCH)}
    before = built.config.vision_config.image_size
    built.config.vision_config.image_size = side * PATCH
    try:
        found = own.layouts(built, inputs, torch.empty(0))
        pool = built.model.apply_pooling if name == FAMILY[0] else built.model.vision_resampler
        expected = pool(features)
        given_features = features if name == FAMILY[0] else expected
        scores, cells = own.cells(built, inputs, found, [attention], [given_features])
        wanted = pool(attention[:, -side * side :, None])[..., 0]
    finally:
        built.config.vision_config.image_size = before
    assert len(found) == 2
    assert torch.allclose(torch.stack(cells), expected)
    assert torch.allclose(torch.stack(scores), wanted)
    count = FRAMES * expected.shape[1]
    newline = [NO_PATCH] * (name == FAMILY[0])
    for one in found:
        assert one.labels.tolist() == [*range(count), *newline]
        assert one.crops == FRAMES and one.patches == expected.shape[1]


def test_frames_of_video_llava_begin_with_a_token_of_no_cell() -> None:
    own = medium("video_llava", "video")
    inputs = {"pixel_values_videos": torch.zeros(1, FRAMES, 3, SIDE, SIDE)}
    (one,) = own.layouts(BUILT["video_llava"], inputs, torch.empty(0))
    rows = one.labels.view(FRAMES, PATCHES + 1)
    assert rows[:, 0].tolist() == [NO_PATCH] * FRAMES
    assert torch.equal(rows[:, 1:].flatten(), torch.arange(FRAMES * PATCHES))


grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4)


@settings(max_examples=40)
@given(given_grids=grids, seed=st.integers(0, 2**31))
@pytest.mark.parametrize("name", ["pixtral", "mistral3"])
def test_own_resolutions_are_merged_as_the_host_merges_them(
    name: str, given_grids: list[tuple[int, int]], seed: int
) -> None:
    built, own = BUILT[name], medium(name)
    side = own.merge(built)
    image_sizes = torch.tensor(given_grids) * side * 8
    most = image_sizes.amax(dim=0).tolist()
    inputs = {"pixel_values": torch.zeros(len(image_sizes), 3, *most), "image_sizes": image_sizes}
    found = own.layouts(built, inputs, torch.empty(0))
    assert [one.grid for one in found] == given_grids
    patches = own.patches(built, inputs, found)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, sum(patches), 3, generator=generator)
    attention = torch.rand(1, sum(patches), generator=generator)
    scores, cells = own.cells(built, inputs, found, [attention], [features])
    channels = torch.cat((attention[..., None], features), dim=-1)[0]
    merged = channels
    if name == "mistral3":
        merger = built.model.multi_modal_projector.patch_merger
        linear, merger.merging_layer = merger.merging_layer, nn.Identity()
        try:
            merged = merger(channels, image_sizes).unflatten(1, (4, -1)).mean(dim=-1)
        finally:
            merger.merging_layer = linear
    for one, score, cell, tokens in zip(
        found, scores, cells, merged.split([len(one.labels) for one in found]), strict=True
    ):
        assert torch.equal(one.labels, torch.arange(len(tokens)))
        assert torch.allclose(cell, tokens[:, 1:], atol=1e-6)
        assert torch.allclose(score / score.sum(), tokens[:, 0] / tokens[:, 0].sum())
        # What an image's patches receive adds up to 1, whatever else is in the call.
        assert float(score.sum()) * side**2 == pytest.approx(1)


@pytest.mark.parametrize("kind", ["llava:pixtral", "mistral3"])
def test_boxes_of_images_of_their_own_resolution_are_a_plain_grid(kind: str) -> None:
    one = Layout(torch.arange(6), 1, (2, 3))
    for entry in (None, (32, 48)):
        boxes = token_boxes(one, (300, 100), None, kind, entry, patch_size=16)
        assert boxes[0].tolist() == [0, 0, 100, 50]
        assert boxes[5].tolist() == pytest.approx([200, 50, 300, 100])


def test_boxes_of_onevision_follow_its_processor() -> None:
    from transformers.models.llava_onevision import image_processing_pil_llava_onevision as code

    processor = code.LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    found, _, _ = any_resolution([(112, 56)], "llava_onevision")
    boxes = token_boxes(found[0], (56, 112), processor, FAMILIES["llava_onevision"].name)
    assert boxes[0].tolist() == pytest.approx([0, 0, 14, 28])
    assert boxes[PATCHES].tolist() == pytest.approx([0, 0, 14, 14])
    shared = Layout(found[0].labels[: PATCHES + 1], 1, found[0].grid)
    boxes = token_boxes(shared, (56, 112), processor, "llava_onevision")
    # Padded to a square, of which the picture is the middle half.
    assert boxes[0].tolist() == [0, 0, 0, 28]
    assert boxes[1].tolist() == pytest.approx([0, 0, 28, 28])


def test_videos_have_no_boxes() -> None:
    one = Layout(torch.arange(4), 1, (2, 2), kind="video")
    with pytest.raises(VlmpruneError, match="not known for a video"):
        token_boxes(one, (8, 8), None, "video_llava")
