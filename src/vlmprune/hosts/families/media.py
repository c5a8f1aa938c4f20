"""How images or videos go into a model: the part in which families differ most.

A *medium* is a modality of a family. One image or video of it is an *item*; an item is encoded as
one or more *crops* (tiles of an image, frames of a video), each a grid of *cells*. A cell is what
becomes one visual token: one patch, or the group of patches that the host merges into one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, outputs
from vlmprune.hosts.parts import Parts
from vlmprune.views.layout import Layout
from vlmprune.views.settings import TapRows

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """Where the attention that scores visual tokens is read.

    Attributes:
        layer: the encoder layer.
        rows: the CLS token's row, or what each token receives.
        words: the same for people.
    """

    layer: nn.Module
    rows: TapRows
    words: str


@dataclass(frozen=True)
class Encoder:
    """The layers of a tower, for methods that read more of it.

    Attributes:
        layers: in order.
        feature: 0-based layer whose output the model takes as features; the last of several.
        cls: place of the CLS token among a layer's tokens, 0 or -1; None where there is none.
        whole: the layers in which a patch sees its whole image (or frame), not a window of it.
    """

    layers: tuple[nn.Module, ...]
    feature: int
    cls: int | None
    whole: frozenset[int]

    @property
    def rows(self) -> TapRows:
        """Which attention of a layer scores tokens."""
        return {None: "received", 0: "cls", -1: "last"}[self.cls]  # type: ignore[return-value]


class Medium:
    """One modality of a family; subclasses say how its host handles it.

    Attributes:
        kind: "image" or "video".
        token: the config's entry that holds the placeholder's id.
        method: the host's method that encodes it.
        inputs: the processor's outputs that hold it, the pixels first.
        host_only: those of them that the encoder does not take.
        stacked: whether the host's forward wants one tensor rather than a list of items.
        replaced: former names of the pixels, which the host takes as well.
        overlay: how a picture of the kept tokens is drawn: "whole" and "tiles" as the processor
            of LLaVA-1.5 and of LLaVA-NeXT cut an image, "canvas" as that of InternVL does,
            "square" where it is resized to one crop, "own" where it keeps its resolution; empty
            where it cannot be drawn.
        whole_crop: which crop of an image is the view of the whole of it, if it has several; empty
            where an item is a crop alone, and nothing says of what it is cut.
        cellwise: whether the projector takes each cell's features by themselves.
        resizable: whether inputs that are no pixels tell the host how many tokens an item has.
        layer_field: the config's entry that says which hidden state becomes features, -2 being
            the output of the layer before the last; empty where the config has none, and the
            host takes the last.
        activation_field: the config's entry that names the activation of a projector of two linear
            layers; empty where the projector is made otherwise.
        parts: what else of the host is relied on here, and must be there at attach.
        unlocal: why a visual token is not made of its own cell alone, so that it cannot be proved
            which cell that is; empty where it is.
        unattended: why nothing attends in the host's tower, as it goes on after the host's name, so
            that no attention can score visual tokens; empty where something does. `encoder` has one
            module then, which makes the features.
        entering: whether the encoder's visual tokens enter the language model as they are; if not,
            it cannot be proved that they stand in their places.
    """

    kind: ClassVar[Literal["image", "video"]] = "image"
    token: ClassVar[str] = "image_token_id"
    method: ClassVar[str] = "get_image_features"
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    host_only: ClassVar[tuple[str, ...]] = ()
    stacked: ClassVar[bool] = False
    replaced: ClassVar[tuple[str, ...]] = ()
    overlay: ClassVar[Literal["whole", "tiles", "square", "canvas", "own", ""]] = ""
    whole_crop: ClassVar[Literal["first", "last", ""]] = "first"
    cellwise: ClassVar[bool] = False
    resizable: ClassVar[bool] = False
    layer_field: ClassVar[str] = ""
    activation_field: ClassVar[str] = ""
    parts: ClassVar[Parts] = Parts()
    unlocal: ClassVar[str] = ""
    unattended: ClassVar[str] = ""
    entering: ClassVar[bool] = True

    @property
    def takes_own(self) -> bool:
        """Whether the host's forward takes tokens in the form in which its encoder returns them."""
        return True

    @property
    def adds_newlines(self) -> bool:
        """Whether the host's forward adds newline tokens by itself, so that none can be dropped."""
        return False

    def shown(self, output: Any) -> Any:
        """What users see of the encoder's output as the visual tokens."""
        return outputs.tokens_of(output)

    def required(self) -> Parts:
        """All that must be there at attach: `parts`, and what each medium needs."""
        named = (self.token, self.layer_field, self.activation_field)
        return Parts(fields=tuple(filter(None, named))) | self.parts

    def check(self, model: Any) -> None:
        """Refuse, at attach, a model of the family that cannot be followed.

        Raises:
            VlmpruneError: one sentence says what stands in the way.
        """

    def described(self, found: Sequence[Layout]) -> list[Layout]:
        """Layouts with what the medium says of all its items: their kind, and the whole view."""
        views = self.whole_crop if self.kind == "image" else ""

        def place(crops: int) -> int | None:
            return {"first": 0, "last": crops - 1, "": None}[views]

        # Items that share a layout go on sharing it.
        made = {
            key: replace(one, kind=self.kind, whole_crop=place(one.crops))
            for key, one in {id(one): one for one in found}.items()
        }
        return [made[id(one)] for one in found]

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Where each item's visual tokens lie, known before anything is encoded.

        Args:
            model: the host.
            inputs: the request's inputs.
            visual: [B, L] bool, the columns that are placeholders of this modality; for families
                whose pixels do not say where an image begins.

        Raises:
            VlmpruneError: the inputs are not what the family's processor makes.
        """
        raise NotImplementedError

    def chosen_layers(self, model: Any, inputs: Inputs) -> int | list[int]:
        """Which hidden states become features: what the request says, else the config.

        Raises:
            VlmpruneError: the config has no such entry, although the family's configs have.
        """
        asked: Any = inputs.get("vision_feature_layer")
        if asked is None:
            asked = config.required(model.config, self.layer_field) if self.layer_field else -1
        return asked if isinstance(asked, int) else list(asked)

    def activation(self, model: Any) -> str | None:
        """The projector's activation, by Transformers' name; None where the config has none."""
        if not self.activation_field:
            return None
        return str(config.required(model.config, self.activation_field))

    def patches(self, model: Any, inputs: Inputs, layouts: Sequence[Layout]) -> list[int]:
        """Patches of each crop that the tower encodes, padding included, for the FLOPs."""
        raise NotImplementedError

    def after(self, model: Any, inputs: Inputs, known: int) -> dict[str, Any]:
        """The inputs without the first `known` items."""
        return {name: inputs[name][known:] for name in self.inputs if inputs.get(name) is not None}

    def new(self, model: Any, inputs: Inputs, known: int, visual: Tensor) -> Inputs:
        """The inputs without items that a cache holds, where they bring those again.

        Args:
            model: the host.
            inputs: the request's inputs.
            known: items that the cache holds.
            visual: [B, L] bool, the new columns that are placeholders.

        Raises:
            VlmpruneError: a batch brings earlier items again, whose rows are not known.
        """
        if not known:
            return inputs
        lengths = [len(one.labels) for one in self.layouts(model, inputs, visual)]
        wanted = int(visual.sum())
        if sum(lengths) == wanted or sum(lengths[known:]) != wanted:
            return inputs
        if len(visual) > 1:
            raise VlmpruneError(
                f"a later turn of a batch brings the {self.kind}s of earlier turns again, and "
                f"nothing says which belong to which row; pass the new {self.kind}s alone."
            )
        return {**inputs, **self.after(model, inputs, known)}

    def left(
        self, inputs: Inputs, layouts: Sequence[Layout], kept: Sequence[Tensor]
    ) -> dict[str, Any]:
        """Inputs to put in place of others where the host counts them against the shorter ids.

        It does not encode them any more.

        Args:
            inputs: the request's inputs.
            layouts: one an item.
            kept: for each item a [n] bool over its visual tokens.
        """
        return {}

    def resized(self, model: Any, inputs: Inputs, counts: Sequence[int]) -> dict[str, Any]:
        """Inputs by which the host places tokens, for a prompt with so many tokens an item.

        Args:
            model: the host.
            inputs: the request's inputs.
            counts: one an item.
        """
        return {}

    def blank(self, inputs: Inputs, items: int) -> Tensor:
        """Something that stands for the pixels of items whose features are known already.

        Only its first dimension counts, by which a host may repeat or split it.
        """
        return torch.zeros(items, 1)

    def scored(self, model: Any, inputs: Inputs) -> Scored:
        """Where to read the attention."""
        raise NotImplementedError

    def check_seen(
        self, model: Any, inputs: Inputs, layouts: Sequence[Layout], attention: Sequence[Tensor]
    ) -> None:
        """Refuse attention that was read of other sequences than whole crops, where that is known.

        Args:
            model: the host.
            inputs: the request's inputs.
            layouts: one an item.
            attention: what the tap saw, call by call, each [B, L].

        Raises:
            ContractError: it was.
        """

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """The tower's layers."""
        raise NotImplementedError

    def pooling_head(self, model: Any) -> nn.Module | None:
        """A head that pools the tower's tokens by attention, if the tower runs one."""
        return None

    def projector(self, model: Any) -> nn.Module:
        """The module whose first argument is the features that the model selected."""
        raise NotImplementedError

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Attention and features of each crop's cells.

        Args:
            model: the host.
            inputs: the request's inputs.
            layouts: one an item.
            attention: what the tap saw, call by call, each [B, L]; or anything else with one
                row a token, [B, L, K].
            features: what the projector was given, call by call.

        Returns:
            For each crop of each item [cells] (or [cells, K]) float32 and [cells, C].
        """
        raise NotImplementedError

    def project(self, model: Any, features: Tensor) -> Tensor | None:
        """Cells' features [n, C] sent through the projector, [n, D].

        None where it does not work cell by cell, or the host does more to its output.
        """
        return self.projector(model)(features) if self.cellwise else None

    def projected(self, model: Any, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Visual tokens [n, D] of each item as the language model gets them."""
        return self.split(output, layouts)

    def completed(self, model: Any, output: Any) -> Any:
        """The encoder's output, with what only the host's forward would add to it."""
        return output

    def split(self, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """The encoder output's visual tokens [n, D], item by item."""
        tokens = outputs.tokens_of(output)
        if isinstance(tokens, Tensor):
            tokens = tokens.flatten(0, -2).split([len(one.labels) for one in layouts])
        return list(tokens)

    def form(self, output: Any) -> Any:
        """An output whose `pooler_output` is a list of items, as the host's forward wants it."""
        tokens = outputs.tokens_of(output)
        if self.stacked and isinstance(tokens, list | tuple):
            outputs.set_tokens(output, torch.cat(list(tokens))[None])
        return output

    def extra(self, output: Any, layouts: Sequence[Layout]) -> list[list[Tensor]]:
        """Further features with one row a visual token, for later layers; item by item."""
        return [list(layer) for layer in outputs.deep_of(output)]


def pooled(values: Tensor, members: Tensor) -> Tensor:
    """Means over the patches that the host merges.

    Args:
        values: [patches, ...].
        members: [cells, g] int64; the patches of each cell.

    Returns:
        [cells, ...] in float32 for a score, else in the values' type.
    """
    if members.shape[1] == 1:
        return values[members[:, 0]]
    return values[members].float().mean(dim=1).to(values.dtype)


def blocks(rows: int, columns: int, side: int, device: Any = None) -> Tensor:
    """[cells, side²] int64; the patches of each block of a grid, row by row of blocks."""
    numbers = torch.arange(rows * columns, device=device).view(rows, columns)
    tiles = numbers.unfold(0, side, side).unfold(1, side, side)
    return tiles.reshape(-1, side * side)


def four_dimensional(inputs: Inputs, name: str) -> Tensor:
    """Pixels [crops, channels, height, width].

    Raises:
        VlmpruneError: they have another shape.
    """
    pixels = inputs[name]
    if pixels.ndim != 4:
        raise VlmpruneError(
            f"{name} of shape {tuple(pixels.shape)} are not [images, channels, height, "
            "width]; pass what the model's own processor returns."
        )
    return pixels


def needs(inputs: Inputs, name: str, beside: str) -> Any:
    """An input that must come along.

    Raises:
        VlmpruneError: it is missing.
    """
    if inputs.get(name) is None:
        raise VlmpruneError(
            f"{beside} came without {name}; pass all that the model's own processor returns."
        )
    return inputs[name]
