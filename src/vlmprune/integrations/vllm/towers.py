"""Vision towers that vLLM does not build itself: Transformers' own, inside vLLM's model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from vlmprune.hosts.families.towers import feature_layer

# By the type of their config.
OWN = ("dinov2",)


class TransformersTower(nn.Module):
    """A tower of Transformers where vLLM expects its own; whole on every tensor-parallel rank."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision = config.vision_config
        self.tower = AutoModel.from_config(vision, attn_implementation="sdpa")
        self.number = feature_layer(vision.num_hidden_layers, config.vision_feature_layer)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    def forward(self, pixel_values: Tensor, feature_select_strategy: str, **_: Any) -> Tensor:
        """Features of the layer that the model takes, [B, tokens, C]."""
        pixels = pixel_values.to(self.dtype)
        states = self.tower(pixels, output_hidden_states=True).hidden_states[self.number + 1]
        return states[:, 1:] if feature_select_strategy == "default" else states

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load by Transformers, which knows what checkpoints call its weights."""
        given = {name: weight.cpu() for name, weight in weights}
        cls, own = type(self.tower), dict(self.tower.named_parameters())
        with torch.device("cpu"):
            loaded, told = cls.from_pretrained(
                None, config=self.tower.config, state_dict=given, output_loading_info=True
            )
        for name, weight in loaded.named_parameters():
            own[name].data.copy_(weight)
        # What is missing, vLLM's loader finds out.
        return {f"tower.{name}" for name in own.keys() - set(told["missing_keys"])}


@contextmanager
def building(module: Any, config: Any) -> Iterator[None]:
    """While vLLM builds a model, towers of `OWN` are built by us.

    Args:
        module: vLLM's module with `init_vision_tower_for_llava`.
        config: Transformers' config of the model.
    """
    if config.vision_config.model_type not in OWN:
        yield
        return
    name = "init_vision_tower_for_llava"
    before = getattr(module, name)
    setattr(module, name, lambda config, **_: TransformersTower(config))
    try:
        yield
    finally:
        setattr(module, name, before)
