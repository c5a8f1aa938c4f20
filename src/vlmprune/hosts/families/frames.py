"""Videos whose frames are of one size, each a crop.

A host pools their patches in its own way before or after the projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import outputs, packing
from vlmprune.hosts.families.features import LAYER
from vlmprune.hosts.families.media import Inputs
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.parts import Parts
from vlmprune.views.layout import NO_PATCH, Layout


class Frames(Crops):
    """Videos of frames of one size, each a crop."""

    kind = "video"
    token = "video_token_id"
    method = "get_video_features"
    inputs = ("pixel_values_videos",)
    stacked = True
    layer_field = LAYER
    # Whether what `mark` adds is CLS tokens.
    marks_cls: ClassVar[bool] = False
    parts = Crops.parts | Parts(functions={"model.get_video_features": ()})

    def frames(self, inputs: Inputs) -> tuple[int, int]:
        """(videos, frames of each).

        Raises:
            VlmpruneError: the pixels have another shape.
        """
        pixels = inputs["pixel_values_videos"]
        if pixels.ndim != 5:
            raise VlmpruneError(
                f"pixel_values_videos of shape {tuple(pixels.shape)} are not [videos, frames, "
                "channels, height, width]; pass what the model's own processor returns."
            )
        return pixels.shape[0], pixels.shape[1]

    def cell_grid(self, model: Any, inputs: Inputs) -> tuple[int, int]:
        """(rows, columns) of visual tokens in a frame."""
        rows, columns = self.patch_grid(model, inputs)
        return rows // self.merge(model), columns // self.merge(model)

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Frame by frame every cell in order."""
        videos, frames = self.frames(inputs)
        grid, device = self.cell_grid(model, inputs), inputs["pixel_values_videos"].device
        labels = torch.arange(frames * grid[0] * grid[1], device=device).view(frames, -1)
        return [Layout(self.mark(labels), frames, grid, cls=self.marks_cls)] * videos

    def mark(self, labels: Tensor) -> Tensor:
        """[n] labels of a video, from those of its cells [frames, cells]."""
        return labels.flatten()


class OneVisionVideos(Frames):
    """Frames scaled to half by the host's own pooling; a newline ends each video."""

    parts = Frames.parts | Parts(
        attributes=("model.image_newline",),
        functions={"model.apply_pooling": ("image_features",)},
    )

    def cell_grid(self, model: Any, inputs: Inputs) -> tuple[int, int]:
        """What the host's pooling leaves of a frame, a square."""
        rows, columns = self.patch_grid(model, inputs)
        pixels = inputs["pixel_values_videos"]
        blank = torch.zeros(1, rows * columns, 1, device=pixels.device)
        cells = model.model.apply_pooling(image_features=blank)
        side = round(cells.shape[1] ** 0.5)
        return side, side

    def mark(self, labels: Tensor) -> Tensor:
        """The newline belongs to no cell."""
        return nn.functional.pad(labels.flatten(), (0, 1), value=NO_PATCH)

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and features through the host's own pooling."""
        scores, given = super().cells(model, inputs, layouts, attention, features)
        pool = model.model.apply_pooling
        rows = torch.stack(scores)
        few = pool(image_features=rows.view(*rows.shape[:2], -1))
        cells = pool(image_features=torch.stack(given))
        return list(few.view(*few.shape[:2], *rows.shape[2:])), list(cells)

    def completed(self, model: Any, output: Any) -> Any:
        """With the newline of each video, which early releases add in their forward."""
        if not self._newline_included():
            tokens = outputs.tokens_of(output)
            newline = model.model.image_newline.to(tokens).expand(len(tokens), 1, -1)
            outputs.set_tokens(output, torch.cat((tokens, newline), dim=1))
        return output

    def form(self, output: Any) -> Any:
        """One tensor, for early releases without the last newline."""
        formed = super().form(output)
        if not self._newline_included():
            # Their forward adds one at the end of each video, and takes this for a single one.
            outputs.set_tokens(formed, outputs.tokens_of(formed)[:, :-1])
        return formed

    @property
    def takes_own(self) -> bool:
        """Not in early releases, which add the newline in their forward."""
        return self._newline_included()

    @property
    def adds_newlines(self) -> bool:
        """In early releases."""
        return not self._newline_included()

    @staticmethod
    def _newline_included() -> bool:
        return packing.takes("LlavaOnevisionForConditionalGeneration", "mm_encoder_outputs")
