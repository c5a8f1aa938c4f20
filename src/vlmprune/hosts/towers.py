"""Vision towers of Transformers as methods that act inside them know them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import config
from vlmprune.hosts.parallel import class_of
from vlmprune.select.softmax import scores, softmax

# Encoder layers that are followed: their norm between attention and MLP, and the MLP. Nothing in
# them depends on a token's place, as rotary embeddings and windows would.
PARTS: Mapping[str, tuple[str, str]] = {
    "CLIPEncoderLayer": ("layer_norm2", "mlp"),
    "SiglipEncoderLayer": ("layer_norm2", "mlp"),
    "Dinov2Layer": ("norm2", "mlp"),
    "InternVLVisionLayer": ("layernorm_after", "mlp"),
}

# Towers that scale their positions to the pixels without being told to, and what tells others.
_SCALING, _TELLS = ("dinov2",), "interpolate_pos_encoding"
_PIXELS = "pixel_values"
_POOLING_HEAD = "MultiheadAttentionPoolingHead"


def parts_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norm before a layer's MLP, and the MLP."""
    norm, mlp = PARTS[class_of(layer).__name__]
    return layer.get_submodule(norm), layer.get_submodule(mlp)


def unknown_layers(layers: Any) -> set[str]:
    """Classes among encoder layers whose parts are not known."""
    return {class_of(layer).__name__ for layer in layers} - PARTS.keys()


def scales(tower: Any) -> bool:
    """Whether a tower can scale its positions to a smaller picture."""
    if not isinstance(getattr(tower.config, "patch_size", None), int):
        return False
    by_itself = config.model_type(tower.config) in _SCALING
    return by_itself or _TELLS in inspect.signature(type(tower).forward).parameters


@dataclass(frozen=True)
class TowerCall:
    """One call of a tower, taken apart.

    Attributes:
        tower: the vision encoder.
        args: by place.
        kwargs: by name.
    """

    tower: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def pixels(self) -> Tensor:
        """[crops, channels, height, width]."""
        found: Tensor = self.args[0] if self.args else self.kwargs[_PIXELS]
        return found

    def scaled(self, pixels: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call on pixels of another size, for which positions are scaled."""
        kwargs = dict(self.kwargs)
        if config.model_type(self.tower.config) not in _SCALING:
            kwargs[_TELLS] = True
        if self.args:
            return (pixels, *self.args[1:]), kwargs
        return (), {**kwargs, _PIXELS: pixels}


def patch_size(tower: Any) -> int:
    """Side of a patch in pixels."""
    return int(config.required(tower.config, "patch_size"))


def pooling_head(tower: nn.Module) -> nn.Module | None:
    """SigLIP's head, in checkpoints that have one (`vision_use_head`)."""
    for module in tower.modules():
        if type(module).__name__.endswith(_POOLING_HEAD):
            return module
    return None


@torch.no_grad()
def pooled_attention(head: Any, hidden: Tensor) -> Tensor:
    """[B, N] float32; what the query of a pooling head attends to, averaged over heads.

    Its query and keys are in the head's own type, as those of any layer, and the softmax of their
    products is in float32.

    Args:
        head: a module with `probe` [1, 1, C] and `attention`, a `nn.MultiheadAttention`.
        hidden: [B, N, C] what it is called with.
    """
    attention = head.attention
    weights = attention.in_proj_weight.detach().chunk(3)
    biases = attention.in_proj_bias.detach().chunk(3)
    probe = head.probe.detach().expand(len(hidden), -1, -1)
    query, key = (
        nn.functional.linear(states, weight, bias)
        .unflatten(-1, (attention.num_heads, -1))
        .transpose(1, 2)
        for states, weight, bias in zip((probe, hidden.detach()), weights, biases, strict=False)
    )
    found = softmax(scores(query, key, query.shape[-1] ** -0.5))
    return found.mean(dim=1)[:, 0]
