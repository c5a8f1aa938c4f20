"""The view of the whole is the left panel, whichever crop of a family it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from vlmprune import Pruner, VlmpruneError
from vlmprune.draw import recall
from vlmprune.draw.boxes import token_boxes
from vlmprune.hosts.families import FAMILIES
from vlmprune.io.models import Loaded
from vlmprune.runtime.family import family_of
from vlmprune.study import one_question
from vlmprune.study.compare import drawn as drawn_by
from vlmprune.study.compare.results import ShownAnswer
from vlmprune.views import Selection, layout
from zoo import ZOO
from zoo.base import BOS, IMAGE, WORDS

PLAIN = {"do_normalize": False}
SIDE = {"internvl": 48, "llava_next": 56, "llava_next_video": 56, "llava_onevision": 56}
# How the processor of each family cuts a picture of two tiles side by side, and its whole view.
CUT = {name: one.media[0] for name, one in FAMILIES.items() if name in SIDE}


@dataclass(frozen=True)
class These(Pruner):
    """Keeps the cells that it is told."""

    cells: tuple[tuple[bool, ...], ...] = ()

    needs: ClassVar[str] = "nothing"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "control"
    text_agnostic: ClassVar[bool] = True
    attends: ClassVar[bool] = False

    def select(self, view: Any) -> Selection:
        return Selection(torch.tensor(self.cells), {})


@dataclass(frozen=True)
class _Case:
    """A model with its processor, a picture with a bright cell, and what is kept: that cell."""

    loaded: Loaded
    inputs: dict[str, Any]
    picture: Image.Image
    square: tuple[int, int, int, int]
    pruner: These


def image_processor(name: str) -> Any:
    side = {"height": SIDE[name], "width": SIDE[name]}
    if name == "internvl":
        return GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, max_patches=4, **PLAIN)
    pinpoints = [[SIDE[name], 2 * SIDE[name]], [2 * SIDE[name], SIDE[name]]]
    if name == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=pinpoints, **PLAIN)
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE[name]},
        crop_size=side,
        image_grid_pinpoints=pinpoints,
        **PLAIN,
    )


def case(name: str) -> _Case:
    """The square is one cell of the whole view, in the right one of two tiles."""
    model, side = ZOO[name].build(), SIDE[name]
    grid = 3 if name == "internvl" else 4
    width, height = 2 * side // grid, side // grid
    left, top = (grid - 1) * width, height
    square = (left, top, left + width, top + height)
    pixels = np.full((side, 2 * side, 3), 90, np.uint8)
    pixels[top : top + height, left : left + width] = 255
    picture = Image.fromarray(pixels)

    class Processor:
        image_processor = image_processor(name)

    made = dict(Processor.image_processor(picture, return_tensors="pt"))
    # What InternVL's processor looks at and does not hand on.
    made.pop("num_patches", None)
    crops = made["pixel_values"].flatten(0, -4)
    bright = crops.mean(dim=1).unfold(1, side // grid, side // grid)
    bright = bright.unfold(2, side // grid, side // grid).mean(dim=(3, 4)).flatten(1) > 0.7
    assert len(crops) == 3 and sorted(bright.sum(dim=1).tolist()) == [0, 1, 2]
    medium, everywhere = family_of(model).media[0], torch.ones(1, bright.numel(), dtype=torch.bool)
    (one,) = medium.layouts(model, made, everywhere)
    ids = torch.tensor([[BOS, *[IMAGE] * len(one.labels), WORDS, WORDS + 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}
    cells = These(cells=tuple(map(tuple, bright.tolist())))
    return _Case(Loaded(model, Processor()), inputs, picture, square, cells)


def drawn(one: _Case) -> Image.Image:
    """The overlay of a call."""
    with one.pruner(one.loaded.model) as handle:
        one.loaded.model.generate(**one.inputs, max_new_tokens=1, do_sample=False)
    return one_question.draw(
        *(one.loaded, one.inputs, [one.picture], handle.report),
        **{"legend": False, "min_side": one.picture.width, "max_side": one.picture.width},
    )[0]


def lies_on_the_square(panel: np.ndarray, square: tuple[int, int, int, int]) -> bool:
    """Whether what is as bright as it was, and all that is lit, lies on the square."""
    x0, y0, x1, y1 = square
    lit = panel.mean(axis=2) > 60
    wanted = np.zeros_like(lit)
    wanted[y0:y1, x0:x1] = True
    # A line parts the two tiles.
    middle = panel.shape[1] // 2
    return bool(np.delete(lit == wanted, middle, axis=1).all())


@pytest.mark.parametrize("name", SIDE)
def test_marks_lie_on_the_square_in_both_panels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(name)
    picture = drawn(one)
    width, height = one.picture.size
    assert picture.size == (2 * width, height)
    pixels = np.asarray(picture, dtype=float)
    panels = pixels[:, :width], pixels[:, width:]
    assert all(lies_on_the_square(panel, one.square) for panel in panels)
    # Control: with another crop for the whole view one of the panels shows something else.
    medium = CUT[name]
    other = {"first": "last", "last": "first"}[medium.whole_crop]
    monkeypatch.setattr(type(medium), "whole_crop", other)
    swapped = np.asarray(drawn(one), dtype=float)
    assert not all(
        lies_on_the_square(panel, one.square) for panel in (swapped[:, :width], swapped[:, width:])
    )


@pytest.mark.parametrize("name", SIDE)
def test_films_light_the_square_in_both_panels(name: str) -> None:
    one = case(name)
    with one.pruner(one.loaded.model) as handle:
        one.loaded.model.generate(**one.inputs, max_new_tokens=1, do_sample=False)
    (place,) = one_question.places_of(one.loaded, one.inputs, [one.picture], handle.report)
    lit = torch.zeros(len(place.boxes))
    lit[handle.report.kept[0]] = 0.5
    width, height = one.picture.size
    how = {"crops": place.crops, "whole_crop": place.whole_crop, "legend": False, "side": width}
    film = recall.film(one.picture, place.boxes, [lit], ["", "a"], **how)
    (frame,) = film.frames
    assert frame.size == (2 * width, height)
    pixels = np.asarray(frame, dtype=float)
    assert all(lies_on_the_square(panel, one.square) for panel in np.split(pixels, 2, axis=1))


def test_the_page_of_compare_shows_the_same() -> None:
    one = case("internvl")
    (page,) = drawn_by.drawn(
        *(one.loaded, one.pruner, one.inputs, [one.picture]), ShownAnswer("", 1.0, True), 4
    ).drawn
    # Back to its own size, so that edges are where they were.
    small = np.asarray(page.resize((192, 48), Image.Resampling.BOX), dtype=float)
    assert all(lies_on_the_square(panel, one.square) for panel in (small[:, :96], small[:, 96:]))


def test_every_family_of_several_crops_says_which_is_the_whole_view() -> None:
    for name, family in FAMILIES.items():
        images = [medium for medium in family.media if medium.kind == "image"]
        assert {
            medium.whole_crop for medium in images if medium.overlay in ("tiles", "canvas")
        } <= {
            "first",
            "last",
        }
        cut = any(medium.overlay in ("tiles", "canvas") for medium in images)
        assert cut == (name in SIDE), name


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "aya_vision", "llama4"])
def test_a_tile_that_is_an_image_of_its_own_is_no_view_of_a_whole(name: str) -> None:
    """Nothing tells of what it is cut, so no picture claims to show it."""
    medium = FAMILIES[name].media[0]
    (one,) = medium.described([layout.plain(1, (3, 3))])
    assert one.whole_crop is None
    with pytest.raises(VlmpruneError, match="where visual tokens lie is not known"):
        token_boxes(one, (64, 64), image_processor("internvl"), name)


def test_frames_are_no_view_of_a_whole() -> None:
    for family in FAMILIES.values():
        for medium in family.media:
            (one,) = medium.described([layout.plain(3, (2, 2))])
            assert one.kind == medium.kind
            assert (one.whole_crop is None) == (medium.kind == "video" or not medium.whole_crop)
