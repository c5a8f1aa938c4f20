"""LLaVA-OneVision: any resolution, scaled down where large, and videos."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.features import drops_cls
from vlmprune.hosts.families.frames import OneVisionVideos
from vlmprune.hosts.families.llava_next import LlavaNextImages
from vlmprune.hosts.families.media import Inputs
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import NO_PATCH, Layout

# As a limit for images that are never scaled down: more patches than any image has.
_ENDLESS = f"anyres_max_{10**9}"


class OneVisionImages(LlavaNextImages):
    """Any resolution, scaled down where large; one crop where a row holds several images."""

    inputs = ("pixel_values", "image_sizes", "batch_num_images")
    parts = LlavaNextImages.parts | Parts(
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

    def check(self, model: Any) -> None:
        """Refuse a model that passes CLS tokens on, which the host's packing cannot."""
        super().check(model)
        drops_cls(model, self.has_cls(model), "pack")

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
}
