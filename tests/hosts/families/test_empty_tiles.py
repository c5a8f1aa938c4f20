"""No tile of a picture is padding alone, so that there is none to leave out of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaNextConfig, LlavaOnevisionConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from tiny import model, request
from vlmprune import VisPruner
from zoo import ZOO

# Side of a tile in pixels and in patches, and what pictures are scaled to.
SETTINGS = {
    "llava_next": (336, 24, LlavaNextConfig().image_grid_pinpoints),
    "llava_onevision": (384, 27, LlavaOnevisionConfig().image_grid_pinpoints),
}
# Pictures from one pixel a side to more than any resolution has.
SIDES = st.integers(1, 5000)


def tiles_left(height: int, width: int, side: int, patches: int, sizes: Sequence[Any]) -> Tensor:
    """[rows, columns] bool; the tiles of which a token is left, by the host's own functions."""
    best = select_best_resolution((height, width), [list(one) for one in sizes])
    rows, columns = best[0] // side, best[1] // side
    tiles = torch.arange(rows * columns).view(rows, columns)
    cells = tiles.repeat_interleave(patches, 0).repeat_interleave(patches, 1)
    left = unpad_image(cells[None], (height, width)).unique()
    return torch.isin(tiles, left)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_the_released_ones(name: str) -> None:
    side, _, sizes = SETTINGS[name]
    grids = {(one[0] // side, one[1] // side) for one in sizes}
    every = {(rows, columns) for rows in range(1, 7) for columns in range(1, 7)}
    assert grids == ({(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)} if "next" in name else every)


@pytest.mark.parametrize("name", SETTINGS)
@given(height=SIDES, width=SIDES)
@example(height=1, width=24)
@example(height=24, width=1)
def test_each_tile_has_a_token_that_is_left(name: str, height: int, width: int) -> None:
    left = tiles_left(height, width, *SETTINGS[name])
    if bool(left.any()):
        assert bool(left.all())
    else:
        # Thinner than half a patch where a tile has an even number of them: nothing is left of any
        # tile, and the overview alone goes on.
        assert name == "llava_next" and max(height / width, width / height) > 24


def test_other_settings_leave_tiles_empty() -> None:
    """Three rows of tiles for a picture that fits in one of them: the control."""
    side, patches, _ = SETTINGS["llava_next"]
    left = tiles_left(100, 1000, side, patches, [[3 * side, 3 * side]])
    assert left.tolist() == [[False] * 3, [True] * 3, [False] * 3]


@torch.no_grad()
def test_tiles_that_pad_a_batch_are_not_encoded() -> None:
    """Hosts take them away in front of the tower; what is pruned is encoded once, as it was."""
    hosts = {"llava_next": (model("llava_next"), request(model("llava_next"), [1, 2]))}
    for name in ("llava_onevision", "idefics3"):
        built = ZOO[name].build()
        hosts[name] = built, ZOO[name].request(built, [["image", "image"], ["image"]])
    for name, (built, req) in hosts.items():
        layer = next(
            one for one in built.base_model.modules() if type(one).__name__.endswith("EncoderLayer")
        )
        seen: list[int] = []
        hook = layer.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(
                len(args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
        with VisPruner(keep=3)(built) as handle:
            built(**req.inputs)
            seen.clear()
            built(**req.inputs)
        hook.remove()
        crops = sum(one.crops for one in handle.report.layouts)
        pixels = req.inputs["pixel_values"]
        assert sum(seen) == crops < pixels.shape[0] * pixels.shape[1], name
