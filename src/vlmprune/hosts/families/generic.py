"""Models that no record knows: what a trial of them found out, as a medium of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, packing
from vlmprune.hosts.families.features import LAYER
from vlmprune.hosts.families.media import Encoder, Inputs, Scored, four_dimensional
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import Layout
from vlmprune.views.settings import TapRows

SUFFIX = "ForConditionalGeneration"
# Layers of a language model that are right with fewer columns: a recurrence never meets those that
# were left out before it.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", *config.RECURRENT}

Cls = Literal["first", "last", ""]


@dataclass(frozen=True)
class TrialFindings:
    """What the self-check found out about a model.

    Attributes:
        layers: name of the tower's list of layers.
        layer: the last of them whose output becomes features.
        projector: name of the module that is given the features.
        image_size: (height, width) of the pixels in the check.
        patch_size: side of a patch.
        merge: side of the square of patches that makes one token.
        cls: where the tower puts its CLS token, if it has one.
    """

    layers: str
    layer: int
    projector: str
    image_size: tuple[int, int]
    patch_size: int
    merge: int
    cls: Cls


class Generic(Crops):
    """Images of a model that the self-check has followed."""

    stacked = True

    def __init__(self, found: TrialFindings) -> None:
        self.found = found
        self.cls_last = found.cls == "last"  # type: ignore[misc]

    def check(self, model: Any) -> None:
        """It was checked when the record was made."""

    def has_cls(self, model: Any) -> bool:
        """Whether the tower has a CLS token."""
        return bool(self.found.cls)

    def required(self) -> Parts:
        """What the self-check looked at needs no other look."""
        return Parts()

    def chosen_layers(self, model: Any, inputs: Inputs) -> int | list[int]:
        """What the request or the config says, where such a config has the usual entry."""
        asked: Any = inputs.get(LAYER)
        asked = getattr(model.config, LAYER, -1) if asked is None else asked
        return asked if isinstance(asked, int) else list(asked)

    def projector(self, model: Any) -> nn.Module:
        """The module that was found to be given the features."""
        return model.get_submodule(self.found.projector)

    def patch_grid(self, model: Any, inputs: Inputs) -> tuple[int, int]:
        """(rows, columns) of patches."""
        patch = self.found.patch_size
        height, width = self.found.image_size
        return height // patch, width // patch

    def merge(self, model: Any) -> int:
        """Side of the square of patches that makes one token."""
        return self.found.merge

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every cell in order."""
        pixels = four_dimensional(inputs, "pixel_values")
        if tuple(pixels.shape[-2:]) != self.found.image_size:
            raise VlmpruneError(
                f"pixel_values are {pixels.shape[-2]} x {pixels.shape[-1]}, but the layout of "
                f"{type(model).__name__} was checked at {self.found.image_size[0]} x "
                f"{self.found.image_size[1]}; pass images of the size that its config says."
            )
        rows, columns = self.patch_grid(model, inputs)
        grid = (rows // self.found.merge, columns // self.found.merge)
        return [layout.plain(1, grid, pixels.device)] * len(pixels)

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As other crops, whatever else the host sends through the projector."""
        images = [given for given in features if given.ndim == 3]
        return super().cells(model, inputs, layouts, attention, images)

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """The list of layers that was found."""
        layers = tuple(model.get_submodule(self.found.layers))
        cls = {"": None, "first": 0, "last": -1}[self.found.cls]
        return Encoder(layers, self.found.layer, cls, frozenset(range(len(layers))))

    def scored(self, model: Any, inputs: Inputs) -> Scored:
        """The CLS row of the last layer that is used, else what patches receive in the last."""
        layers = model.get_submodule(self.found.layers)
        number = self.found.layer if self.found.cls else len(layers) - 1
        rows: TapRows = "cls" if self.found.cls else "received"
        rows = "last" if self.cls_last else rows
        words = "CLS attention" if self.found.cls else "attention received (no CLS token)"
        return Scored(layers[number], rows, f"{words}, encoder layer {number}")


def unfit(model: Any) -> str | None:
    """Why a model's class cannot be followed, as far as a trial could not find it wrong."""
    said = config.of_model(model)
    base: Any = getattr(model, "base_model", None)
    if not type(model).__name__.endswith(SUFFIX) or said is None:
        return f"its class is no …{SUFFIX}"
    if not callable(getattr(base, "get_image_features", None)):
        return "it has no get_image_features"
    if packing.first_argument(base.get_image_features) != "pixel_values":
        return "its get_image_features does not begin with pixel_values"
    if not config.has_placeholder(said, Generic.token):
        return "its config has no image_token_id"
    if not config.has_vision(said):
        return "its config has no vision_config"
    if config.has_encoder(said):
        return "its language model has an encoder of its own"
    if hasattr(base, "get_rope_index"):
        return "its visual tokens have three positions each"
    others = config.listed_kinds(said) - _ATTENTION
    if others:
        return f"its language model has layers of {' and '.join(sorted(others))}"
    return None
