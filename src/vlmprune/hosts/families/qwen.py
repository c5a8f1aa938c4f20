"""The Qwen-VL line: images of any size, merged patches, positions in 3-D."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import outputs
from vlmprune.hosts.contract import broken
from vlmprune.hosts.families.media import (
    Encoder,
    Inputs,
    Medium,
    Scored,
    needs,
)
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.parts import Parts
from vlmprune.hosts.requests import IDS, MASK, TYPES
from vlmprune.views import layout
from vlmprune.views.layout import Layout


class QwenImages(Medium):
    """Images, each a crop of its own size.

    The pixels are patches [Σ t·h·w, values] in the order (time, group, patch of the group), and a
    grid of (t, h, w) patches for each image says where it ends. A group of patches is merged into
    one visual token, so that tokens lie time by time and row by row. In the towers of Qwen2-VL and
    Qwen3-VL, whose configs have neither of the fields of windows, each block sees whole images.
    """

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    # The processor stretches a picture to a whole number of groups.
    overlay = "own"
    resizable = True
    parts = Parts(
        fields=("vision_config.spatial_merge_size", "vision_config.depth"),
        attributes=("model.visual.blocks", "model.visual.merger"),
        functions={
            "model.get_image_features": ("pixel_values", "image_grid_thw"),
            "model.get_video_features": ("pixel_values_videos", "video_grid_thw"),
            "model.get_rope_index": (
                "input_ids",
                "mm_token_type_ids",
                "image_grid_thw",
                "video_grid_thw",
                "attention_mask",
            ),
            "model.compute_3d_position_ids": ("input_ids", "attention_mask", "mm_token_type_ids"),
            "_prepare_position_ids_for_generation": ("inputs_tensor", "model_kwargs"),
        },
    )

    def whole(self, model: Any) -> list[int]:
        """Numbers of the blocks in which a patch sees its whole image."""
        return list(range(int(model.config.vision_config.depth)))

    def grids(self, model: Any, inputs: Inputs) -> list[tuple[int, int, int]]:
        """(frames, rows, columns) of each item, in visual tokens.

        Raises:
            VlmpruneError: the grids are missing, or do not account for the pixels.
        """
        pixels, grid = self.inputs[:2]
        sizes: Any = needs(inputs, grid, pixels)
        side = model.config.vision_config.spatial_merge_size
        rows, patches = len(inputs[pixels]), int(sizes.prod(dim=1).sum())
        if rows != patches or bool((sizes[:, 1:] % side).any()):
            raise VlmpruneError(
                f"{pixels} hold {rows} patches but {grid} asks for {patches}, in groups of "
                f"{side} x {side}; pass what the model's own processor returns."
            )
        return [(t, h // side, w // side) for t, h, w in sizes.tolist()]

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every group in order; each frame of a video is a crop."""
        device = inputs[self.inputs[0]].device
        plain = [layout.plain(t, (h, w), device) for t, h, w in self.grids(model, inputs)]
        return [replace(one, kind=self.kind) for one in plain]

    def patches(self, model: Any, inputs: Inputs, layouts: Sequence[Layout]) -> list[int]:
        """A group's patches for each visual token."""
        group = model.config.vision_config.spatial_merge_size**2
        return [one.patches * group for one in layouts for _ in range(one.crops)]

    def after(self, model: Any, inputs: Inputs, known: int) -> dict[str, Any]:
        """The inputs without the patches of the first `known` items."""
        pixels, grid = self.inputs[:2]
        rest = {name: inputs[name][known:] for name in self.inputs[1:] if name in inputs}
        return {pixels: inputs[pixels][int(inputs[grid][:known].prod(dim=1).sum()) :], **rest}

    def resized(self, model: Any, inputs: Inputs, counts: Sequence[int]) -> dict[str, Any]:
        """Grids of items one row of tokens high."""
        side, grid = model.config.vision_config.spatial_merge_size, self.inputs[1]
        return {grid: torch.tensor([(1, side, side * n) for n in counts]).to(inputs[grid])}

    def blank(self, inputs: Inputs, items: int) -> Tensor:
        """As many patches as the grids ask for, with nothing in them."""
        return torch.zeros(int(inputs[self.inputs[1]].prod(dim=1).sum()), 0)

    def scored(self, model: Any, inputs: Inputs) -> Scored:
        """What patches receive in the last block in which each sees its whole image."""
        number = max(self.whole(model))
        side = model.config.vision_config.spatial_merge_size
        return Scored(
            model.model.visual.blocks[number],
            "received",
            "attention received (the tower has no CLS token), full-attention block "
            f"{number}, mean of each {side} x {side} group",
        )

    def check_seen(
        self, model: Any, inputs: Inputs, layouts: Sequence[Layout], attention: Sequence[Tensor]
    ) -> None:
        """Each sequence is a whole frame, and no window of one."""
        found = [call.shape[1] for call in attention for _ in range(call.shape[0])]
        if found != self.patches(model, inputs, layouts):
            raise broken(
                model, "the block that is scored does not attend to whole images, one by one"
            )

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """The tower's blocks, of which some may see windows alone."""
        blocks = tuple(model.model.visual.blocks)
        return Encoder(blocks, len(blocks) - 1, None, frozenset(self.whole(model)))

    def projector(self, model: Any) -> nn.Module:
        """The last merger; the other ones of Qwen3-VL merge earlier blocks' features."""
        return model.model.visual.merger

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Means over merged groups, put back in the order of the visual tokens.

        The tap sees a call per frame, or one call that it takes apart itself; the merger is given
        the patches of all items at once.
        """
        group = model.config.vision_config.spatial_merge_size**2
        seen = torch.cat([row.flatten(0, 1) for row in attention])
        scores = seen.unflatten(0, (-1, group)).mean(dim=1)
        patches = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
        merged = patches.view(-1, group, patches.shape[1]).float().mean(dim=1).to(patches.dtype)
        merged = merged.to(scores.device)
        order = self.order(model, inputs).to(scores.device)
        sizes = [one.patches for one in layouts for _ in range(one.crops)]
        return list(scores[order].split(sizes)), list(merged[order].split(sizes))

    def order(self, model: Any, inputs: Inputs) -> Tensor:
        """[n] int64; the place in the tower of each visual token's group."""
        group = model.config.vision_config.spatial_merge_size**2
        return torch.arange(int(inputs[self.inputs[1]].prod(dim=1).sum()) // group)

    def extra(self, output: Any, layouts: Sequence[Layout]) -> list[list[Tensor]]:
        """Qwen3-VL's deepstack features, layer by layer; older releases do not part the items."""
        lengths = [len(one.labels) for one in layouts]
        return [
            list(layer.split(lengths) if isinstance(layer, Tensor) else layer)
            for layer in outputs.deep_of(output)
        ]


class QwenVideos(QwenImages):
    """Videos: a crop for each temporal patch, which is what Qwen makes of two frames."""

    kind = "video"
    token = "video_token_id"
    method = "get_video_features"
    inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
    )
    host_only: ClassVar[tuple[str, ...]] = ("second_per_grid_ts",)

    def left(
        self, inputs: Inputs, layouts: Sequence[Layout], kept: Sequence[Tensor]
    ) -> dict[str, Any]:
        """Grids of the frames of which something is left.

        Where `generate` repeats rows, older releases find a row's videos by counting its frames.
        """
        pixels, grid = self.inputs[:2]
        sizes = inputs[grid].clone()
        for size, one, stays in zip(sizes, layouts, kept, strict=True):
            size[0] = max(1, len(one.crop[stays.to(one.labels.device)].unique()))
        return {pixels: inputs[pixels][: int(sizes.prod(dim=1).sum())], grid: sizes}


def rope(
    model: Any, ids: Tensor, mask: Tensor, inputs: Sequence[Inputs], plain: bool
) -> Tensor | None:
    """[3, B, L] positions of a whole request, by the host's own rule.

    Where the token types are missing, the host's forward (in some classes an error) and its
    `generate` each have a rule of their own, which is asked.

    Args:
        model: the host.
        ids: [B, L] token ids.
        mask: [B, L], 0 where a column is padding.
        inputs: the inputs of images and those of videos.
        plain: whether a plain forward is asked for positions, or `generate`.

    Returns:
        The positions; None where the host has those of text.

    Raises:
        VlmpruneError: the host refuses a request without token types.
    """
    given: dict[str, Any] = {}
    for medium, one in zip(MEDIA, inputs, strict=True):
        given |= {k: one[k] for k in (*medium.inputs[1:], TYPES) if one.get(k) is not None}
    # The host's rule fails on a row of padding alone, whose positions nobody reads.
    mask = mask.masked_fill((mask == 0).all(dim=1, keepdim=True), 1)
    if TYPES in given:
        given[TYPES] = given[TYPES][:, -ids.shape[1] :]
        positions, _ = model.model.get_rope_index(input_ids=ids, attention_mask=mask, **given)
        return positions
    given[MASK] = mask
    if not plain:
        positions = model._prepare_position_ids_for_generation(ids, given)
        return positions[-3:]
    rule = model.model.compute_3d_position_ids
    asked = {name: given.get(name) for name in inspect.signature(rule).parameters}
    try:
        return rule(**{**asked, IDS: ids})
    except ValueError as error:
        raise VlmpruneError(
            f"{type(model).__name__} makes no positions without {TYPES}; pass all that the "
            "model's own processor returns."
        ) from error


MEDIA = (QwenImages(), QwenVideos())


def family(
    name: str,
    cls: str,
    note: str,
    media: tuple[Medium, ...] = MEDIA,
    where: str = "layer",
    fails: Mapping[str, str] = MappingProxyType({}),
) -> Family:
    """A record of the line.

    Args:
        name: as users call it.
        cls: the class of transformers.
        note: what a user should know.
        media: its modalities, images first.
        where: which of the tower's layers is scored, after "the last".
        fails: as `Family.fails`.
    """
    score = f"attention received in the last {where}, averaged over the patches that a token merges"
    return Family(name, cls, "original", media, note, score, rope, fails=fails)
