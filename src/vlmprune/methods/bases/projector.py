"""What learned methods take over from a host: its widths, and a copy of its projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import pretrained, sizes
from vlmprune.hosts.families.towers import Crops
from vlmprune.runtime.family import family_of


@dataclass(frozen=True)
class Widths:
    """Sizes of a host.

    Attributes:
        features: width of what its projector takes.
        language: width of the language model.
        tower: width of the vision tower's layers.
        depth: number of them.
        feature: 0-based layer whose output the model takes as features.
        activation: of the projector, by Transformers' name.
        bias: whether its linear layers have one.
    """

    features: int
    language: int
    tower: int
    depth: int
    feature: int
    activation: str
    bias: bool

    @property
    def config(self) -> dict[str, Any]:
        """As JSON has them."""
        return asdict(self)


def widths(model: Any, who: str) -> Widths:
    """The sizes of a host whose tower encodes crops and whose projector takes them cell by cell.

    Args:
        model: the host.
        who: the method, for error sentences.

    Raises:
        VlmpruneError: it is no such host.
    """
    family = family_of(model)
    medium = family.media[0]
    if not isinstance(medium, Crops) or not medium.cellwise:
        raise VlmpruneError(
            f"{who} makes visual tokens of encoder features cell by cell, which the tower or the "
            f"projector of {type(model).__name__} does not; use a model of the LLaVA families."
        )
    first, second, activation = _layers(model, medium, who)
    encoder = medium.encoder(model, {})
    tower = sizes.width(model.config)
    return Widths(
        first.in_features,
        second.out_features,
        tower,
        len(encoder.layers),
        encoder.feature,
        activation,
        first.bias is not None,
    )


class Projector(nn.Module):
    """Two linear layers with an activation between them, as the LLaVA families have."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        wide, bias = sizes["language"], sizes["bias"]
        self.linear_1 = nn.Linear(sizes["features"], wide, bias=bias)
        self.act = pretrained.activation(sizes["activation"])
        self.linear_2 = nn.Linear(wide, wide, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """[..., features] → [..., language]."""
        projected: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected

    @torch.no_grad()
    def start(self, model: Any) -> None:
        """Begin with the host's own weights."""
        first, second, _ = _layers(model, family_of(model).media[0], "the projector")
        for mine, its in ((self.linear_1, first), (self.linear_2, second)):
            mine.weight.copy_(its.weight)
            if its.bias is not None:
                mine.bias.copy_(its.bias)


def _layers(model: Any, medium: Any, who: str) -> tuple[nn.Linear, nn.Linear, str]:
    """The two linear layers of a host's projector, and what is between them.

    Raises:
        VlmpruneError: it is made otherwise.
    """
    projector = medium.projector(model)
    found = [one for one in projector.modules() if isinstance(one, nn.Linear)]
    held = sum(len(list(one.parameters())) for one in found)
    name = medium.activation(model)
    plain = len(found) == 2 and held == len(list(projector.parameters()))
    if not plain or found[0].out_features != found[1].in_features or not isinstance(name, str):
        raise VlmpruneError(
            f"{who} has a projector of two linear layers, but {type(projector).__name__} of "
            f"{type(model).__name__} is made otherwise; use a model of the LLaVA families."
        )
    return found[0], found[1], name
