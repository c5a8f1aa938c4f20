"""Models of which nothing is known but their placeholders: methods inside the language model.

What such a method needs is which columns of a prompt are visual tokens, and which of them belong
together. The request itself goes to the host as it came, and so does what it makes of the pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from vlmprune.hosts import config, contract, release
from vlmprune.hosts.families.media import Inputs, Medium
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import Layout

# Entries of configs that hold the id of a modality's placeholders, and arguments of forwards that
# hold what it is made of.
_TOKENS: Mapping[Literal["image", "video"], Sequence[str]] = {
    "image": ("image_token_id", "image_token_index", "image_patch_id"),
    "video": ("video_token_id", "video_token_index"),
}
_PIXELS: Mapping[Literal["image", "video"], Sequence[str]] = {
    "image": ("pixel_values", "pixel_values_images", "image_patches", "images"),
    "video": ("pixel_values_videos", "pixel_values_video", "videos"),
}


class Counted(Medium):
    """A modality whose placeholders are counted; each run of them is an item."""

    whole_crop = ""

    def __init__(self, kind: Literal["image", "video"], token: str, pixels: str) -> None:
        self.kind = kind  # type: ignore[misc]
        self.token = token  # type: ignore[misc]
        self.inputs = (pixels,)  # type: ignore[misc]

    def required(self) -> Parts:
        """The placeholder's id."""
        return Parts(fields=(self.token,))

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """A run of neighbouring placeholders each, as one row."""
        begins = visual.clone()
        begins[:, 1:] &= ~visual[:, :-1]
        runs = begins.flatten().long().cumsum(dim=0).view(visual.shape)[visual]
        lengths = runs.bincount()[1:].tolist()
        return [layout.plain(1, (1, length), visual.device) for length in lengths]

    def new(self, model: Any, inputs: Inputs, known: int, visual: Tensor) -> Inputs:
        """The inputs as they come, which the host looks through by itself."""
        return inputs

    def patches(self, model: Any, inputs: Inputs, layouts: Sequence[Layout]) -> list[int]:
        """None that are known of."""
        return []


def counted(model: Any) -> Family | str:
    """What can be told of a model by its placeholders alone, or why nothing can.

    Raises:
        VlmpruneError: its language model's config lacks a field that its type is known to have.
    """
    said = config.of_model(model)
    if said is None or not hasattr(type(model), "generate"):
        return "it has no config and no generate of Transformers"
    if contract.checks():
        config.check_text(said)
    if config.has_encoder(said):
        return "its language model has an encoder of its own"
    if config.crosses(said):
        return "its images enter by cross-attention, beside the prompt"
    takes = inspect.signature(type(model).forward).parameters
    media = []
    for kind in _TOKENS:
        token = next((one for one in _TOKENS[kind] if config.has_placeholder(said, one)), None)
        pixels = next((one for one in _PIXELS[kind] if one in takes), None)
        if token is not None and pixels is not None:
            media.append(Counted(kind, token, pixels))
    if not media:
        return (
            f"its config names no placeholders ({', '.join(_TOKENS['image'])}), or its forward "
            "takes no pixels beside them"
        )
    name = type(model).__name__
    return Family(
        name=name,
        cls=name,
        positions="original",
        media=tuple(media),
        note="in no record; its placeholders are counted, for methods inside the language model",
        score="",
        counted=True,
        since=release.version(),
    )
