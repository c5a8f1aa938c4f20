"""Placeholders in several runs and prompts made whole again, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlmprune import EVS, VisPruner
from vlmprune.errors import VlmpruneError
from vlmprune.integrations.vllm.runs import Apart, each_run, unpruned

PAD, TIME, START, END = 9, 5, 6, 7


@dataclass(frozen=True)
class Place:
    """As vLLM's `PlaceholderRange`."""

    offset: int
    length: int
    is_embed: Tensor | None = None


@dataclass(frozen=True)
class Feature:
    """As vLLM's `MultiModalFeatureSpec`."""

    mm_position: Place
    modality: str = "image"


def test_an_image_between_texts() -> None:
    whole = unpruned([1, PAD, PAD, 2, 3], [Feature(Place(1, 2))], [(5, 2)])
    assert whole.tokens == [1, *[PAD] * 5, 2, 3]
    assert whole.places.tolist() == [0, 1, 1, 6, 7]
    assert whole.features == [Feature(Place(1, 5))]


def test_frames_that_stand_apart_each_begin_anew() -> None:
    frame = [TIME, START, PAD, END]
    mask = torch.tensor([token == PAD for token in frame * 2])
    whole = unpruned([1, *frame * 2, 2], [Feature(Place(1, 8, mask), "video")], [(6, 2)])
    assert whole.tokens == [1, *[TIME, START, PAD, PAD, PAD, END] * 2, 2]
    assert whole.places.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13]
    assert whole.features == [Feature(Place(1, 12), "video")]


def test_neighbours_and_ends_and_any_order() -> None:
    first, second = Feature(Place(0, 1)), Feature(Place(1, 2))
    whole = unpruned([PAD, PAD, PAD], [second, first], [(4, 2), (3, 1)])
    assert whole.tokens == [PAD] * 7
    assert whole.places.tolist() == [0, 3, 3]
    assert [one.mm_position for one in whole.features] == [Place(0, 3), Place(3, 4)]


def test_text_alone_stays() -> None:
    whole = unpruned([4, 3, 2], [], [])
    assert (whole.tokens, whole.places.tolist(), whole.features) == ([4, 3, 2], [0, 1, 2], [])


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        ([True, True], (4, 3)),  # other than counted
        ([True, False, True, True], (6, 3)),  # runs of 1 and 2
        ([True, False, True], (5, 2)),  # 5 tokens do not go into two runs
    ],
)
def test_what_cannot_be_made_whole_is_told(mask: list[bool], counts: tuple[int, int]) -> None:
    feature = Feature(Place(0, len(mask), torch.tensor(mask)))
    said = (
        rf"^one image has placeholders in runs of \[.*\] where {counts[1]} of {counts[0]} visual "
    )
    with pytest.raises(RuntimeError, match=said):
        unpruned([PAD] * len(mask), [feature], [counts])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 4), st.data())
def test_as_many_are_left_of_each_run(texts: list[int], size: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, size))
    mask, wanted = [], []
    for text in texts:
        mask += [False] * (text + 1) + [True] * size
        wanted += [True] * (text + 1) + [True] * keep + [False] * (size - keep)
    assert each_run(torch.tensor(mask), keep * len(texts)).tolist() == wanted


def test_a_number_that_does_not_go_into_the_runs_is_told() -> None:
    with pytest.raises(RuntimeError, match="3 visual tokens do not go into 2 runs"):
        each_run(torch.tensor([True, True, False, True, True]), 3)


def test_budgets_of_whole_videos_are_refused_where_frames_stand_apart() -> None:
    videos = Apart()
    videos.fits(None)
    videos.fits(VisPruner(keep=3))
    videos.fits(VisPruner(keep=3, budget="frame"))
    for method in (VisPruner(keep=3, budget="clip"), VisPruner(keep=3, budget="image"), EVS(0.5)):
        with pytest.raises(VlmpruneError, match="one budget for all frames of a video"):
            videos.fits(method)
