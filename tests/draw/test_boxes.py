"""Boxes on the original image, against what the real image processors do with its pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from vlmprune import VlmpruneError
from vlmprune.draw.boxes import token_boxes
from vlmprune.draw.overlay import draw
from vlmprune.views import layout

PATCH = 14
PLAIN = {"do_normalize": False, "do_rescale": False, "resample": 0}
# Aspect ratios far apart, odd sides, larger and smaller than a crop, as (width, height).
SIZES = [(336, 336), (640, 427), (301, 533), (1201, 340), (97, 455), (150, 120)]


def stretch(**more):
    return CLIPImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, **PLAIN, **more
    )


def crop(edge=336, **more):
    return CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": 336, "width": 336}, **PLAIN, **more
    )


def square():
    # A mean that leaves the padding black, so that only the block is bright.
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_mean=[0.0, 0.0, 0.0],
        **PLAIN,
    )


def any_resolution():
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, **PLAIN
    )


def onevision():
    return LlavaOnevisionImageProcessorPil(
        size={"height": 336, "width": 336},
        image_grid_pinpoints=any_resolution().image_grid_pinpoints,
        **PLAIN,
    )


def canvas(**more):
    """As InternVL's processor has it cut images."""
    return GotOcr2ImageProcessorPil(
        size={"height": 224, "width": 224}, crop_to_patches=True, max_patches=6, **PLAIN, **more
    )


def blank_block(size, block):
    x0, y0, x1, y1 = block
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def bright_share(processor, image):
    """[crops, patches]: which share of each patch shows the block; and the grid."""
    out = processor(image, return_tensors="pt")
    pixels = out["pixel_values"].float()
    pixels = pixels[0] if pixels.ndim == 5 else pixels
    crops, _, height, width = pixels.shape
    grid = (height // PATCH, width // PATCH)
    cells = pixels[:, 0].view(crops, grid[0], PATCH, grid[1], PATCH) > 127
    return cells.float().mean(dim=(2, 4)).flatten(1), grid


def shares_by_boxes(boxes, block):
    """Which share of each box the block covers."""
    b = torch.tensor(block, dtype=torch.float32)
    low, high = torch.maximum(boxes[:, :2], b[:2]), torch.minimum(boxes[:, 2:], b[2:])
    inner = (high - low).clamp(min=0).prod(dim=1)
    return inner, (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


def blocks(size):
    width, height = size
    w, h = max(6, width // 5), max(6, height // 5)
    yield (0, 0, w, h)
    yield (width - w, height - h, width, height)
    yield (width // 2 - w // 3, height // 3, width // 2 + w, height // 3 + h)


def disagreement(processor, family, size, block, boxes_for=None):
    """Largest difference between the share of a patch that is bright and what its box says.

    Patches cut by the picture's edge count only where the pixels are bright, since their box is
    clipped.
    """
    real, grid = bright_share(processor, blank_block(size, block))
    boxes = token_boxes(
        layout.plain(len(real), grid), size, boxes_for or processor, family, patch_size=PATCH
    )
    inner, area = shares_by_boxes(boxes, block)
    full = area.view(len(real), -1).amax(dim=1, keepdim=True).expand(real.shape).flatten()
    return (real.flatten() - inner / full).abs().max().item(), real.max().item()


CASES = [
    (stretch, "llava"),
    (crop, "llava"),
    (lambda: crop(edge=448), "llava"),
    (lambda: crop(edge=300), "llava"),
    (square, "llava"),
    (any_resolution, "llava_next"),
    (onevision, "llava_onevision"),
    (stretch, "paligemma"),
    (canvas, "internvl"),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("make", "family"),
    CASES,
    ids=["stretch", "crop", "crop-448", "small", "square", "any", "onevision", "one", "canvas"],
)
def test_boxes_find_the_block_where_the_processor_put_it(make, family, size):
    seen = 0.0
    for block in blocks(size):
        # A resized edge may fall one pixel of the fourteen beside its exact place, on both sides.
        difference, most = disagreement(make(), family, size, block)
        assert difference < 0.27
        seen = max(seen, most)
    assert seen == 1.0


@pytest.mark.parametrize("size", [(640, 427), (301, 533)])
def test_other_ways_of_resizing_are_told_apart(size):
    """Control: each processor's pixels against the boxes of the others."""
    block = next(blocks(size))
    makers = [stretch, crop, square]
    for make in makers:
        for other in makers:
            if other is make:
                continue
            real, _ = bright_share(make(), blank_block(size, block))
            _, grid = bright_share(other(), blank_block(size, block))
            if real.shape[1] != grid[0] * grid[1]:
                continue
            difference, _ = disagreement(make(), "llava", size, block, boxes_for=other())
            assert difference > 0.5


def test_boxes_tile_the_whole_stretched_picture():
    boxes = token_boxes(layout.plain(1, (16, 16)), (640, 427), stretch(), "LLaVA-1.5")
    assert boxes[0].tolist() == pytest.approx([0, 0, 40, 427 / 16])
    assert boxes[-1].tolist() == pytest.approx([600, 427 * 15 / 16, 640, 427])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert areas.sum().item() == pytest.approx(640 * 427, rel=1e-4)


def test_what_the_centre_crop_cuts_is_in_no_box():
    boxes = token_boxes(layout.plain(1, (24, 24)), (800, 400), crop(), "llava")
    assert boxes[:, 0].min() == pytest.approx(200) and boxes[:, 2].max() == pytest.approx(600)
    assert boxes[:, 1].min() == 0 and boxes[:, 3].max() == 400


def test_padding_has_boxes_without_area():
    boxes = token_boxes(layout.plain(1, (24, 24)), (800, 400), square(), "llava")
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).view(24, 24)
    assert (area[:6] == 0).all() and (area[18:] == 0).all() and (area[6:18] > 0).all()


def test_newlines_have_empty_boxes_and_the_picture_can_be_drawn():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, -1, 6, 7, -1])
    one = layout.Layout(labels, 3, (2, 2))
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56]],
        **PLAIN,
    )
    boxes = token_boxes(one, (112, 56), processor, "llava_next", image_sizes_entry=[56, 112])
    assert boxes[labels == -1].eq(0).all()
    assert boxes[4].tolist() == [0, 0, 28, 28]
    assert (boxes[:, 2] > boxes[:, 0]).tolist() == (labels >= 0).tolist()
    picture = draw(Image.new("RGB", (112, 56)), boxes, ["kept"] * 10, legend=False)
    assert picture.width == 672


def test_a_picture_given_at_another_size_than_its_own():
    """The processor saw 200 x 100 pixels of an image that has 400 x 200."""
    whole = layout.plain(1, (16, 16))
    same = token_boxes(whole, (400, 200), stretch(), "llava")
    torch.testing.assert_close(
        token_boxes(whole, (400, 200), stretch(), "llava", image_sizes_entry=(100, 200)), same
    )
    cut = token_boxes(layout.plain(1, (24, 24)), (400, 200), crop(), "llava", (100, 200))
    torch.testing.assert_close(
        cut, token_boxes(layout.plain(1, (24, 24)), (400, 200), crop(), "llava")
    )


def test_pixels_behind_the_last_whole_patch_are_in_no_box():
    boxes = token_boxes(layout.plain(1, (15, 15)), (224, 224), stretch(), "llava", patch_size=14)
    assert boxes.max() == 210
    assert token_boxes(layout.plain(1, (15, 15)), (224, 224), stretch(), "llava").max() == 224


def test_squares_of_merged_patches_fill_the_picture():
    boxes = token_boxes(layout.plain(1, (4, 4)), (640, 420), stretch(), "gemma3", patch_size=14)
    assert boxes[5].tolist() == pytest.approx([160, 105, 320, 210])
    tiles = token_boxes(layout.plain(3, (4, 4)), (448, 224), canvas(), "internvl", patch_size=14)
    assert tiles[0].tolist() == [0, 0, 56, 56] and tiles[16].tolist() == [224, 0, 280, 56]
    assert tiles[32].tolist() == [0, 0, 112, 56]


CANVAS = "get_optimal_tiled_canvas"


def test_mistakes_are_told(monkeypatch):
    with pytest.raises(VlmpruneError, match="is not known for SmolVLM yet"):
        token_boxes(layout.plain(1, (3, 3)), (64, 64), stretch(), "smolvlm")
    panned = stretch()
    panned.do_pan_and_scan = True
    with pytest.raises(VlmpruneError, match="do_pan_and_scan"):
        token_boxes(layout.plain(1, (4, 4)), (64, 64), panned, "gemma3")
    with pytest.raises(VlmpruneError, match="has 3 crops but its processor's settings make 5"):
        token_boxes(layout.plain(3, (4, 4)), (224, 224), canvas(min_patches=4), "internvl")
    with pytest.raises(VlmpruneError, match=r"has 2 crops but its processor's settings make 1"):
        token_boxes(layout.plain(2, (16, 16)), (64, 64), stretch(), "llava")
    with monkeypatch.context() as patch:
        patch.delattr("transformers.models.got_ocr2.image_processing_pil_got_ocr2." + CANVAS)
        with pytest.raises(
            VlmpruneError, match=r"^how GotOcr2ImageProcessorPil cuts an image is no"
        ):
            token_boxes(layout.plain(3, (4, 4)), (448, 224), canvas(), "internvl")
    with pytest.raises(VlmpruneError, match="family 'qwen' is not known"):
        token_boxes(layout.plain(1, (16, 16)), (64, 64), stretch(), "qwen")
    bounded = CLIPImageProcessorPil(size={"shortest_edge": 100, "longest_edge": 200})
    with pytest.raises(VlmpruneError, match="use one with height and width"):
        token_boxes(layout.plain(1, (16, 16)), (64, 64), bounded, "llava")
