"""Vision towers that encode crops of one size: CLIP, SigLIP, DINOv2 and their like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import towers
from vlmprune.hosts.families.media import Encoder, Inputs, Medium, Scored, blocks, pooled
from vlmprune.hosts.parts import Parts
from vlmprune.views.layout import Layout
from vlmprune.views.settings import TapRows

# Towers of this kind, and whether they put a CLS token first.
TOWERS: Mapping[str, bool] = {
    "clip_vision_model": True,
    "dinov2": True,
    "siglip_vision_model": False,
}

# What the config of every such tower says, and where most hosts hold one and their projector.
SIZES = Parts(
    fields=(
        "vision_config.model_type",
        "vision_config.patch_size",
        "vision_config.num_hidden_layers",
    )
)
TOWER = Parts(attributes=("model.vision_tower",))
PROJECTOR = Parts(attributes=("model.multi_modal_projector",))


def layers_of(tower: nn.Module, depth: int) -> nn.ModuleList:
    """The encoder layers of a tower.

    Raises:
        VlmpruneError: no list of that length is found.
    """
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise VlmpruneError(f"no list of {depth} layers was found in {type(tower).__name__}.")


def feature_layer(depth: int, chosen: int | list[int]) -> int:
    """0-based layer whose output a model takes as features (the last, where it takes several).

    `vision_feature_layer` counts hidden states, of which number 0 is the embedding: with 24
    layers, -2 is the output of layer 22.
    """
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    return max((index if index >= 0 else depth + 1 + index) - 1 for index in chosen)


def is_open(medium: Medium) -> bool:
    """Whether a config may choose the medium's tower among `TOWERS`."""
    return isinstance(medium, Crops) and type(medium).has_cls is Crops.has_cls


class Crops(Medium):
    """A medium whose tower sees all crops as one batch [crops, tokens, C].

    Attributes:
        cls_last: whether its CLS token, if it has one, is the last token instead of the first.
    """

    cls_last: ClassVar[bool] = False
    parts = SIZES | TOWER | PROJECTOR

    def check(self, model: Any) -> None:
        """Refuse a tower of another kind."""
        self.has_cls(model)

    def tower(self, model: Any) -> nn.Module:
        """The vision encoder."""
        return model.model.vision_tower

    def projector(self, model: Any) -> nn.Module:
        """The module that takes the features to the language model's width."""
        return model.model.multi_modal_projector

    def pooling_head(self, model: Any) -> nn.Module | None:
        """SigLIP's head, in checkpoints that have one (`vision_use_head`)."""
        return towers.pooling_head(self.tower(model))

    def has_cls(self, model: Any) -> bool:
        """Whether the tower puts a CLS token first."""
        kind = model.config.vision_config.model_type
        if kind not in TOWERS:
            raise VlmpruneError(
                f"vlmprune does not support the vision tower {kind!r} yet; supported towers: "
                f"{', '.join(TOWERS)}."
            )
        return TOWERS[kind]

    def feature_layer(self, model: Any, inputs: Inputs) -> int:
        """0-based layer whose output the model takes as features."""
        depth = model.config.vision_config.num_hidden_layers
        return feature_layer(depth, self.chosen_layers(model, inputs))

    def patch_grid(self, model: Any, inputs: Inputs) -> tuple[int, int]:
        """(rows, columns) of patches in a crop, from the pixels that came."""
        patch = model.config.vision_config.patch_size
        height, width = inputs[self.inputs[0]].shape[-2:]
        return height // patch, width // patch

    def joins_patches(self, model: Any, inputs: Inputs, layouts: Sequence[Layout]) -> str | None:
        """How it makes one visual token of several patches, in words; None where it does not."""
        if not layouts:
            return None
        grid = self.patch_grid(model, inputs)
        if any(one.grid != grid or one.blended for one in layouts):
            return f"{type(model).__name__} makes one visual token of several patches there"
        return None

    def joins_layers(self, model: Any, inputs: Inputs) -> str | None:
        """How it takes features of several layers, likewise."""
        chosen = self.chosen_layers(model, inputs)
        if isinstance(chosen, int) or len(chosen) == 1:
            return None
        return f"vision_feature_layer={list(chosen)} takes features of several layers"

    def patches(self, model: Any, inputs: Inputs, layouts: Sequence[Layout]) -> list[int]:
        """One number a crop, all equal."""
        rows, columns = self.patch_grid(model, inputs)
        return [rows * columns] * sum(one.crops for one in layouts)

    def merge(self, model: Any) -> int:
        """Side of the square of patches that makes one visual token."""
        return 1

    def members(self, model: Any, inputs: Inputs) -> Tensor:
        """[cells, g] int64; the patches behind each cell of a crop."""
        rows, columns = self.patch_grid(model, inputs)
        return blocks(rows, columns, self.merge(model))

    def layers(self, model: Any) -> Sequence[nn.Module]:
        """The tower's encoder layers, as many as its config says."""
        return list(layers_of(self.tower(model), model.config.vision_config.num_hidden_layers))

    def scored(self, model: Any, inputs: Inputs) -> Scored:
        """The CLS row of the feature layer, else what patches receive in the last layer."""
        layers = self.layers(model)
        if self.has_cls(model):
            number = self.feature_layer(model, inputs)
            rows: TapRows = "last" if self.cls_last else "cls"
            return Scored(layers[number], rows, f"CLS attention, encoder layer {number}")
        number = len(layers) - 1
        return Scored(
            layers[number],
            "received",
            f"attention received (the tower has no CLS token), encoder layer {number}",
        )

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """All layers see whole crops."""
        layers = self.layers(model)
        cls = (-1 if self.cls_last else 0) if self.has_cls(model) else None
        everywhere = frozenset(range(len(layers)))
        return Encoder(tuple(layers), self.feature_layer(model, inputs), cls, everywhere)

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Patches without the CLS token, pooled as the host merges them."""
        rows, columns = self.patch_grid(model, inputs)
        patches = rows * columns
        received = [row for call in attention for row in call]
        given = [crop for call in features for crop in call]
        members = self.members(model, inputs).to(received[0].device)
        if received[0].shape[0] != patches + self.has_cls(model):
            raise VlmpruneError(
                f"the vision tower makes {received[0].shape[0]} tokens for {patches} patches, "
                "which vlmprune cannot follow; towers with one CLS token or none are supported."
            )
        own = slice(patches) if self.cls_last else slice(-patches, None)
        scores = [pooled(row[own], members) for row in received]
        if given[0].shape[0] == members.shape[0] != patches:
            # The host had merged them already.
            return scores, given
        return scores, [pooled(crop[own], members) for crop in given]
