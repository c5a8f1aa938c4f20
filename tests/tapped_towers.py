"""Tiny towers whose attention is far from uniform, and what taps on them see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.models.clip import modeling_clip
from transformers.models.dinov2 import modeling_dinov2

from vlmprune.runtime.attention import interception
from vlmprune.runtime.attention.taps import Tap, tapped
from vlmprune.views.settings import TapRows

REGISTRIES = (modeling_clip.ALL_ATTENTION_FUNCTIONS, modeling_dinov2.ALL_ATTENTION_FUNCTIONS)
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def tower(kind: str, attention: str, seed: int = 0) -> Any:
    """A tiny tower whose weights are scaled up, so that attention is far from uniform."""
    torch.manual_seed(seed)
    model: Any
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(intermediate_size=64, **SHAPE))
    else:
        model = Dinov2Model(Dinov2Config(mlp_ratio=2, **SHAPE))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "embedding" in name:
                weight.normal_(0, 0.4)
    model.set_attn_implementation(attention)
    return model.eval()


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def pixels(seed: int = 0, images: int = 2) -> Tensor:
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def eager_weights(kind: str, seed: int = 0, images: int = 2) -> tuple[Tensor, ...]:
    """[B, heads, L, L] of each layer, as the library returns them."""
    return tower(kind, "eager", seed)(pixels(images=images), output_attentions=True).attentions


@torch.no_grad()
def seen(model: Any, layer: int, rows: TapRows, images: int = 2) -> Tensor:
    tap = Tap(rows)
    with tapped(layers_of(model)[layer], tap):
        model(pixels(images=images))
    (row,) = tap.rows_seen
    return row


def nothing_stays() -> Iterator[None]:
    """After each test the registries hold the very functions they held before."""
    before = [dict(registry) for registry in REGISTRIES]
    local = [dict(registry._local_mapping) for registry in REGISTRIES]
    shared = [dict(registry._global_mapping) for registry in REGISTRIES]
    yield
    assert [dict(registry) for registry in REGISTRIES] == before
    assert [dict(registry._local_mapping) for registry in REGISTRIES] == local
    assert [dict(registry._global_mapping) for registry in REGISTRIES] == shared
    assert not interception._dispatchers
