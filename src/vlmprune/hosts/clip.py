"""CLIP's two towers in one model: which modules compare pictures with words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import outputs
from vlmprune.hosts.config import model_type, required

TYPE = "clip"
_PARTS = ("text_model", "text_projection", "visual_projection", "vision_model")


def within(model: nn.Module) -> list[Any]:
    """The modules of a model that hold both towers."""
    return [one for one in model.modules() if all(hasattr(one, part) for part in _PARTS)]


def is_clip(config: Any) -> bool:
    """Whether a config is that of a CLIP model."""
    return model_type(config) == TYPE


def without_vision(clip: Any) -> Any:
    """The model with its vision tower's layers taken out, of one that sees no image."""
    clip.vision_model.encoder = nn.Identity()
    return clip


def width_of(clip: Any) -> int:
    """Width of the features that its vision tower makes."""
    return int(clip.visual_projection.weight.shape[1])


def longest_of(clip: Any) -> int:
    """Tokens of a text at most."""
    return int(required(required(clip.config, "text_config"), "max_position_embeddings"))


@torch.no_grad()
def embedded_words(clip: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, D] embeddings of texts.

    Args:
        clip: a model with both towers.
        ids: [B, L].
        mask: [B, L], 0 where a column is padding.
    """
    place = clip.text_projection.weight.device
    pooled = clip.text_model(input_ids=ids.to(place), attention_mask=mask.to(place))
    embedded: Tensor = clip.text_projection(outputs.tokens_of(pooled))
    return embedded


@torch.no_grad()
def embedded_image(clip: Any, features: Tensor) -> Tensor:
    """[..., D] embeddings of the vision tower's features."""
    norm = clip.vision_model.post_layernorm
    projection = clip.visual_projection.weight
    embedded: Tensor = clip.visual_projection(norm(features.to(projection)))
    return embedded
