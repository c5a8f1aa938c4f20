"""A picture with one bright square: the boxes of what is kept lie there, for every processor.

The method of the test keeps what the square changed, of a tower whose layers do nothing, so that a
visual token knows its own patches alone. What is shown hangs on the processor, the host's packing
and the layout, none of which the test reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from family_processors import backends, inputs_of, processor_of, question, served
from made_processors import MADE
from vlmprune import Pruner
from vlmprune.draw.boxes import token_boxes
from vlmprune.hosts import contract
from vlmprune.hosts.decoder import layer_call, states_of, with_states
from vlmprune.runtime.family import family_of
from vlmprune.views import EncoderView, Reads, Selection
from zoo import UNATTENDED, ZOO
from zoo.crops import PATCH
from zoo.gemma3n import Convolutions

# PaliGemma's processor makes labels of tensors as NumPy takes them no longer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# (width, height) of the picture, and the square's (left, top, right, bottom) as shares of it.
SIZES = [(160, 120), (100, 150)]
SQUARES = [(0.56, 0.28, 0.74, 0.45), (0.28, 0.56, 0.44, 0.74)]
FAMILIES = ZOO | UNATTENDED
CASES = [
    pytest.param(
        family,
        backend,
        marks=pytest.mark.skipif(
            not served(family, backend), reason="needs what `make test-processors` installs"
        ),
    )
    for family in MADE
    if family in FAMILIES
    for backend in backends(family)
]


@dataclass(frozen=True)
class Brightest(Pruner):
    """Keep the cells that a bright picture changed; of the dark one, which comes first, all."""

    dark: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    attends = False

    def reads(self, depth: int, feature: int) -> Reads:
        return Reads(projected=True)

    def select(self, view: EncoderView) -> Selection:
        assert view.projected is not None
        if not self.dark:
            self.dark.append(view.projected)
            return Selection(view.candidates, {})
        score = (view.projected - self.dark[0]).norm(dim=-1)
        kept = view.candidates & (score > 0.05 * score.max())
        return Selection(kept, {"kept": kept})


@contextmanager
def idle(built: Any, inputs: Any) -> Iterator[None]:
    """Let the layers of the tower hand on what they are given, and convolutions see one place."""

    def nothing(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = layer_call(module, args, kwargs).hidden
        return with_states(output, given.view(states_of(output).shape))

    medium = family_of(built).media[0]
    for module in built.modules():
        if isinstance(module, Convolutions):
            around = torch.ones_like(module.second.weight, dtype=torch.bool)
            around[..., 1, 1] = False
            module.second.weight.data.masked_fill_(around, 0.0)
    with ExitStack() as stack:
        for layer in () if medium.unattended else medium.encoder(built, inputs).layers:
            hook = layer.register_forward_hook(nothing, prepend=True, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def covered(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[height, width] bool: the pixels that some box covers."""
    shown = torch.zeros(size[1], size[0], dtype=torch.bool)
    for left, top, right, bottom in boxes.round().long().tolist():
        shown[top:bottom, left:right] = True
    return shown


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_kept_boxes_lie_where_the_square_is(family: str, backend: Any) -> None:
    built, processor = FAMILIES[family].build(), processor_of(family, backend)
    record = family_of(built)
    if not record.media[0].overlay:
        pytest.skip("no picture is drawn of it")
    for size in SIZES:
        for square in SQUARES:
            width, height = size
            place = [round(s * e) for s, e in zip(square, (width, height) * 2, strict=True)]
            pruner, report, made = Brightest(), None, {}
            for white in (False, True):
                picture = Image.new("RGB", size, "black")
                if white:
                    picture.paste("white", tuple(place))
                text = question(family, ["image"], 0)
                made = dict(processor(images=[[picture]], text=[text], return_tensors="pt"))
                inputs = inputs_of(processor, made)
                with contract.switched_off(), idle(built, inputs), pruner(built) as handle:
                    built.generate(**inputs, max_new_tokens=1, do_sample=False)
                report = handle.report
            assert report is not None
            (layout,), (kept,) = report.layouts, report.kept
            told = made["image_sizes"][0] if "image_sizes" in made else None
            boxes = token_boxes(layout, size, processor.image_processor, record.name, told, PATCH)
            shown = covered(boxes[kept], size)
            left, top, right, bottom = place
            inside = shown[top:bottom, left:right]
            assert float(inside.float().mean()) > 0.97
            # What else is shown is no further away than a token is wide, blur included.
            wide = (boxes[kept, 2:] - boxes[kept, :2]).amax(dim=0).ceil().long()
            # One that blends patches has the box of the heaviest.
            wide = (wide * (1 + layout.blended)).tolist()
            around = torch.zeros_like(shown)
            around[
                max(0, top - wide[1] - 2) : bottom + wide[1] + 2,
                max(0, left - wide[0] - 2) : right + wide[0] + 2,
            ] = True
            assert not bool((shown & ~around).any())
            assert float(shown.float().mean()) < 0.5
            # The control: what is shown, were the picture turned round.
            other = shown.flip(0, 1)[top:bottom, left:right]
            assert float(other.float().mean()) < 0.5
