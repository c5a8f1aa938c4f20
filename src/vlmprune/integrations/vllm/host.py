"""vLLM's models as the library's families see Transformers' ones, so that their geometry is shared.

A family's media ask a model for its config, its tower, its projector and its packing. A *host*
answers with vLLM's own, also without a model, where vLLM's processor counts placeholders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts.families.media import Inputs, Medium
from vlmprune.hosts.families.towers import Crops
from vlmprune.pruner import Pruner
from vlmprune.views.layout import Layout


class Host:
    """A vLLM model, or its config alone.

    Attributes:
        config: Transformers' config of the model.
        served: vLLM's model; None in its processor.
    """

    def __init__(self, config: Any, served: Any = None) -> None:
        self.config = config
        self.served = served

    @property
    def model(self) -> Host:
        """The model below the language-model head, which vLLM has not apart."""
        return self

    @property
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""
        return self.served.vision_tower

    @property
    def multi_modal_projector(self) -> nn.Module:
        """The projector."""
        return self.served.multi_modal_projector


class Absent(nn.Module):
    """Stands for an encoder layer behind the features, which vLLM does not build."""


class Served(Medium):
    """A medium in vLLM; mixed in before the library's own."""

    def items(self, kwargs: Mapping[str, Any]) -> list[Inputs]:
        """The inputs of each item by itself, in Transformers' form.

        Args:
            kwargs: what vLLM's processor returns for all items, or gives to its model.
        """
        own = [name for name in self.inputs if kwargs.get(name) is not None]
        count = len(kwargs[self.inputs[0]])
        return [{name: kwargs[name][i][None] for name in own} for i in range(count)]

    def joined(self, items: Sequence[Inputs]) -> Inputs:
        """The inputs of all items; of the pixels, which may differ in number, the first alone."""
        pixels, *others = self.inputs
        return {
            pixels: items[0][pixels],
            **{k: torch.cat([one[k] for one in items]) for k in others if k in items[0]},
        }

    def rows(self, host: Host, items: Sequence[Inputs]) -> list[int]:
        """How many crops of each item the tower encodes, padding included."""
        pixels = [one[self.inputs[0]] for one in items]
        return [one.shape[1] if one.ndim == 5 else 1 for one in pixels]

    def layouts_of(self, host: Host, items: Sequence[Inputs]) -> list[Layout]:
        """Where the visual tokens of each item lie."""
        nothing = torch.zeros(1, 0, dtype=torch.bool)
        return [self.layouts(host, one, nothing)[0] for one in items]

    def loaded(self, config: Any) -> int:
        """How many of the tower's encoder layers vLLM builds."""
        return int(config.vision_config.num_hidden_layers)

    def absent(self, host: Host, method: Pruner | None) -> list[int]:
        """Encoder layers that a method reads and vLLM does not build."""
        return []

    def placeholders(self, embeds: Tensor, after: int) -> Tensor:
        """[n] bool; which of an item's prompt tokens stay.

        Args:
            embeds: [n] bool; which of them stand for visual tokens.
            after: how many visual tokens are left.
        """
        return ~embeds | (embeds.cumsum(0) <= after)

    def fits(self, method: Pruner | None) -> None:
        """Refuse a method whose numbers are not known where they are needed.

        Raises:
            VlmpruneError: one sentence says why.
        """

    def lengths(self, host: Host, items: Sequence[Inputs]) -> list[int] | None:
        """Tokens of each sequence of the tower's attention; None where its calls say it."""
        return None

    def unscored(
        self, host: Host, inputs: Inputs, layouts: Sequence[Layout]
    ) -> list[Tensor] | None:
        """Scores for methods that look at none, item by item; None where their shape is unknown."""
        return None

    def split(self, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Visual tokens [n, D], item by item, as vLLM's models return them."""
        return [one.flatten(0, -2) for one in output]


class ServedCrops(Served, Crops):
    """A medium whose tower sees all crops as one batch, in vLLM."""

    def layers(self, model: Any) -> Sequence[nn.Module]:
        """The tower's encoder layers; `Absent` where vLLM does not build one."""
        depth, loaded = model.config.vision_config.num_hidden_layers, self.loaded(model.config)
        if model.served is None:
            built: Sequence[nn.Module] = [nn.Identity() for _ in range(loaded)]
        else:
            built = _layers_of(self.tower(model), loaded)
        return [*built, *(Absent() for _ in range(depth - len(built)))]

    def absent(self, host: Host, method: Pruner | None) -> list[int]:
        """Those behind the features'."""
        if method is None:
            return []
        depth, built = host.config.vision_config.num_hidden_layers, self.loaded(host.config)
        feature = self.feature_layer(host, {})
        reads = method.reads(depth, feature)
        wanted = {*reads.layers, *reads.single} - {None}
        if method.attends:
            wanted.add(feature if self.has_cls(host) else depth - 1)
        return sorted(layer for layer in wanted if layer is not None and layer >= built)

    def unscored(
        self, host: Host, inputs: Inputs, layouts: Sequence[Layout]
    ) -> list[Tensor] | None:
        """Zeros for every token of the tower."""
        rows, columns = self.patch_grid(host, inputs)
        tokens = rows * columns + self.has_cls(host)
        return [torch.zeros(one.crops, tokens) for one in layouts]


def _layers_of(tower: nn.Module, count: int) -> Sequence[nn.Module]:
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise LookupError(f"no list of {count} layers was found in {type(tower).__name__}.")
