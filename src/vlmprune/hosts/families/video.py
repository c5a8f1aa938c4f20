"""Families that take images and videos: LLaVA-OneVision, LLaVA-NeXT-Video, Video-LLaVA.

A frame of a video is a crop. Frames are of one size, and a host pools their patches in its own
way before (LLaVA-NeXT-Video) or after (LLaVA-OneVision) the projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import outputs, packing
from vlmprune.hosts.families.llava import (
    LAYER,
    SELECTS,
    TILES,
    LlavaImages,
    LlavaNextImages,
    keeps_cls,
)
from vlmprune.hosts.families.media import Inputs
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import PROJECTOR, SIZES, Crops
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import NO_PATCH, Layout

# As a limit for images that are never scaled down: more patches than any image has.
_ENDLESS = f"anyres_max_{10**9}"


class OneVisionImages(LlavaNextImages):
    """Any resolution, scaled down where large; one crop where a row holds several images."""

    inputs = ("pixel_values", "image_sizes", "batch_num_images")
    parts = (
        Crops.parts
        | SELECTS
        | TILES
        | Parts(
            fields=("vision_aspect_ratio",),
            functions={
                "model.get_image_features": (
                    "pixel_values",
                    "image_sizes",
                    "vision_aspect_ratio",
                    "batch_num_images",
                ),
                "model.pack_image_features": (
                    "image_features",
                    "image_sizes",
                    "image_newline",
                    "vision_aspect_ratio",
                ),
            },
        )
    )

    def check(self, model: Any) -> None:
        """Refuse a model that passes CLS tokens on, which the host's packing cannot."""
        super().check(model)
        if keeps_cls(model, {}, self.has_cls(model)):
            raise VlmpruneError(
                "vision_feature_select_strategy='full' passes CLS tokens on, which "
                f"{type(model).__name__} cannot pack; set it to 'default' in the model's config."
            )

    def crops(self, model: Any, inputs: Inputs) -> list[int]:
        """Crops of each image; one for each image of a row that holds several."""
        counts = super().crops(model, inputs)
        rows = inputs.get("batch_num_images")
        if rows is None:
            return counts
        alone = [int(n) == 1 for n in rows for _ in range(int(n))]
        if len(alone) < len(counts):
            raise VlmpruneError(
                f"batch_num_images counts {len(alone)} images but {len(counts)} came; pass what "
                "the model's own processor returns."
            )
        return [n if single else 1 for n, single in zip(counts, alone, strict=False)]

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Label maps through `pack_image_features`.

        Of images that it scales down, a token blends up to four patches; places sent through it
        say which is the heaviest.
        """
        counts, grid = self.crops(model, inputs), self.patch_grid(model, inputs)
        device = inputs["pixel_values"].device
        maps = [layout.label_map(n, grid, device) for n in counts]
        packed = self.pack(model, {**inputs, "vision_aspect_ratio": _ENDLESS}, maps)
        found = [layout.read_labels(p, n, grid) for p, n in zip(packed, counts, strict=True)]
        places = self.pack(model, inputs, [layout.place_map(one) for one in found])
        return [
            layout.read_places(p, one) if len(p) != len(one.labels) else one
            for p, one in zip(places, found, strict=True)
        ]

    def pack(self, model: Any, inputs: Inputs, maps: list[Tensor]) -> list[Tensor]:
        """The host's own packing of maps [crops, patches, C]; newlines become -1."""
        newline = torch.full((maps[0].shape[-1],), float(NO_PATCH), device=maps[0].device)
        ratio = inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        packed, _ = model.model.pack_image_features(
            image_features=maps,
            image_sizes=inputs["image_sizes"],
            image_newline=newline,
            vision_aspect_ratio=ratio,
        )
        return list(packed)

    def after(self, model: Any, inputs: Inputs, known: int) -> dict[str, Any]:
        """The inputs without the first `known` images, which are of one row."""
        # The host crops by `batch_num_images` alone and overlooks what it counts too many, so the
        # images that are left are not taken for the only ones of their row.
        kept = {k: inputs[k] for k in ("batch_num_images",) if inputs.get(k) is not None}
        return super().after(model, inputs, known) | kept

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Patches; of scaled images what the packing makes of them, where the label is."""
        scores, given = super().cells(model, inputs, layouts, attention, features)
        ends = [0]
        for one in layouts:
            ends.append(ends[-1] + one.crops)
        for number, (one, (start, end)) in enumerate(zip(layouts, pairwise(ends), strict=True)):
            if not one.blended:
                continue
            own = {"image_sizes": inputs["image_sizes"][number : number + 1]}
            width = scores[start][0].numel()
            channels = [
                torch.cat((score.view(-1, width), crop.float()), dim=-1)
                for score, crop in zip(scores[start:end], given[start:end], strict=True)
            ]
            stacked = torch.stack(channels)
            (packed,) = self.pack(model, {**inputs, **own}, [stacked])
            real = (one.labels != NO_PATCH).to(packed.device)
            cells = stacked.flatten(0, 1)
            cells[one.labels.to(packed.device)[real]] = packed[real]
            blended = cells.view_as(stacked)
            scores[start:end] = list(blended[..., :width].reshape(-1, *scores[start].shape))
            given[start:end] = list(blended[..., width:].to(given[start].dtype))
        return scores, given


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


class NextVideos(Frames):
    """Frames pooled before the projector."""

    stacked = False
    cellwise = True
    parts = Frames.parts | SELECTS | Parts(fields=("spatial_pool_stride",))

    def check(self, model: Any) -> None:
        """Refuse a model that passes CLS tokens on, which the host's pooling cannot."""
        super().check(model)
        if keeps_cls(model, {}, self.has_cls(model)):
            raise VlmpruneError(
                "vision_feature_select_strategy='full' passes CLS tokens on, which "
                f"{type(model).__name__} cannot pool; set it to 'default' in the model's config."
            )

    def merge(self, model: Any) -> int:
        """The pooling's stride; its scores are averaged, whatever it does to features."""
        return model.config.spatial_pool_stride

    def split(self, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Visual tokens [n, D], video by video; early releases keep frames apart."""
        return [tokens.reshape(-1, tokens.shape[-1]) for tokens in outputs.tokens_of(output)]


class VideoLlavaImages(LlavaImages):
    """One crop an image, in a tower of its own."""

    stacked = True
    parts = SIZES | PROJECTOR | SELECTS | Parts(attributes=("model.image_tower",))

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The pixels' name, which was changed."""
        return ("pixel_values",) if self._renamed() else ("pixel_values_images",)

    @property
    def replaced(self) -> tuple[str, ...]:  # type: ignore[override]
        """Their former name."""
        return ("pixel_values_images",) if self._renamed() else ()

    @staticmethod
    def _renamed() -> bool:
        return packing.takes("VideoLlavaForConditionalGeneration", "pixel_values")

    def tower(self, model: Any) -> nn.Module:
        """The encoder of images."""
        return model.model.image_tower


class VideoLlavaVideos(Frames):
    """Frames with their CLS tokens, which belong to no cell."""

    cellwise = True
    marks_cls = True
    parts = (
        SIZES
        | PROJECTOR
        | Parts(attributes=("model.video_tower",), functions={"model.get_video_features": ()})
    )

    def tower(self, model: Any) -> nn.Module:
        """The encoder of frames."""
        return model.model.video_tower

    def check(self, model: Any) -> None:
        """Refuse a tower without CLS tokens."""
        if not self.has_cls(model):
            raise VlmpruneError(
                f"the vision tower {model.config.vision_config.model_type!r} has no CLS token, "
                "which vlmprune expects before each frame of Video-LLaVA; use a CLIP tower."
            )

    def mark(self, labels: Tensor) -> Tensor:
        """A CLS token first in each frame."""
        return nn.functional.pad(labels, (1, 0), value=NO_PATCH).flatten()


FAMILIES: dict[str, Family] = {
    "llava_onevision": Family(
        score="attention received in the last layer",
        name="LLaVA-OneVision",
        cls="LlavaOnevisionForConditionalGeneration",
        positions="compact",
        media=(OneVisionImages(), OneVisionVideos()),
        note="any resolution, images and videos; no CLS token; with newlines; of scaled "
        "images a token stands where its heaviest patch is",
    ),
    "llava_next_video": Family(
        name="LLaVA-NeXT-Video",
        cls="LlavaNextVideoForConditionalGeneration",
        positions="compact",
        media=(LlavaNextImages(), NextVideos()),
        note="any resolution, images and videos; with newlines in images",
    ),
    "video_llava": Family(
        name="Video-LLaVA",
        cls="VideoLlavaForConditionalGeneration",
        positions="compact",
        media=(VideoLlavaImages(), VideoLlavaVideos()),
        note="one crop an image, videos; the CLS token of each frame always kept",
    ),
}
