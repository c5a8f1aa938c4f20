"""Encode a request's images once, and record on the way what a method needs.

The host's own `get_image_features` does the work, with its own fast attention; a tap reads the
attention row, a hook on the projector reads the features that the model selected.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune import families, layout
from vlmprune.errors import VlmpruneError
from vlmprune.families import Family
from vlmprune.layout import NO_PATCH, Layout
from vlmprune.taps import Rows, Tap, tapped
from vlmprune.views import EncoderView


@dataclass(frozen=True)
class Plan:
    """The geometry of a request's images, known before any is encoded."""

    layouts: tuple[Layout, ...]
    grid: tuple[int, int]

    @property
    def lengths(self) -> list[int]:
        """Visual tokens of each image, as the language model would see them."""
        return [len(one.labels) for one in self.layouts]

    @property
    def candidates(self) -> Tensor:
        """[crops, N] bool over all images."""
        return torch.cat([one.candidates() for one in self.layouts])

    @property
    def images(self) -> tuple[int, ...]:
        """Image of each crop."""
        return tuple(i for i, one in enumerate(self.layouts) for _ in range(one.crops))


@dataclass(frozen=True)
class Encoded:
    """Encoder output of a request, with the view that methods choose from.

    Attributes:
        output: what `get_image_features` returned; `pooler_output` is a list of [n, D], one an
            image.
        view: attention and features of every crop.
        score: where the attention came from, in words.
    """

    output: Any
    view: EncoderView
    score: str


def plan(model: nn.Module, family: Family, inputs: Mapping[str, Any]) -> Plan:
    """Follow each patch of each image to its place among the visual tokens.

    Raises:
        VlmpruneError: the inputs are not what the family's processor makes.
    """
    grid = families.grid_of(model, inputs)
    device = inputs["pixel_values"].device
    counts = family.crops(model, inputs)
    maps = [layout.label_map(crops, grid, device) for crops in counts]
    if families.keeps_cls(model, inputs):
        maps = [nn.functional.pad(m, (0, 0, 1, 0), value=float(NO_PATCH)) for m in maps]
    packed = family.pack(model, inputs, maps)
    return Plan(
        tuple(layout.read_labels(p, n, grid) for p, n in zip(packed, counts, strict=True)), grid
    )


def encode(
    model: nn.Module,
    get_image_features: Callable[..., Any],
    inputs: Mapping[str, Any],
    planned: Plan,
) -> Encoded:
    """Run the vision encoder once.

    Args:
        model: the host.
        get_image_features: the host's own method.
        inputs: the request's inputs; those that the method takes are passed on.
        planned: the geometry of the images.

    Raises:
        VlmpruneError: the tower makes another number of tokens than its patches account for.
    """
    has_cls = families.has_cls(model)
    rows: Rows = "cls" if has_cls else "received"
    layers = families.tower_layers(model)
    number = (
        families.feature_layer(model, inputs.get("vision_feature_layer"))
        if has_cls
        else len(layers) - 1
    )
    tap = Tap(rows)
    features: list[Tensor] = []
    takes = inspect.signature(get_image_features).parameters
    arguments = {k: v for k, v in inputs.items() if k in takes and k != "kwargs"}
    with ExitStack() as stack:
        stack.enter_context(tapped(layers[number], tap))
        thread = threading.get_ident()

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                features.append(args[0].detach())

        hook = families.projector(model).register_forward_pre_hook(keep)
        stack.callback(hook.remove)
        output = get_image_features(**arguments, return_dict=True)

    patches = planned.grid[0] * planned.grid[1]
    attention = torch.cat(tap.rows_seen)
    chosen = torch.cat(features)
    if attention.shape[1] != patches + has_cls or chosen.shape[1] - patches not in (0, 1):
        raise VlmpruneError(
            f"the vision tower makes {attention.shape[1]} tokens for {patches} patches, which "
            "vlmprune cannot follow; towers with one CLS token or none are supported."
        )
    view = EncoderView(
        attention[:, -patches:], chosen[:, -patches:], planned.candidates, planned.images
    )
    what = "CLS attention" if has_cls else "attention received (the tower has no CLS token)"
    return Encoded(output, view, f"{what}, encoder layer {number}")


def with_features(output: Any, features: list[Tensor]) -> Any:
    """A fresh copy of an encoder output that holds other features and nothing else large.

    Fresh, because `generate` expands `pooler_output` in place.
    """
    light = {
        name: value
        for name, value in output.items()
        if name not in ("last_hidden_state", "hidden_states", "attentions")
    }
    return type(output)(**(light | {"pooler_output": list(features)}))
