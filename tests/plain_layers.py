"""The towers of tiny hosts layer by layer, written apart from the library, a crop at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from zoo.base import IMAGE, TEXT, VISION, loud, scale_of, unusual_scales
from zoo.tiles import PATCH, SIDE

# By the tower's class: the norms, what scales attention and MLP, and the attention.
_NAMES = {
    "CLIPEncoderLayer": ("layer_norm1", "layer_norm2", "", "", "self_attn"),
    "SiglipEncoderLayer": ("layer_norm1", "layer_norm2", "", "", "self_attn"),
    "Dinov2Layer": ("norm1", "norm2", "layer_scale1", "layer_scale2", "attention"),
    "InternVLVisionLayer": (
        "layernorm_before",
        "layernorm_after",
        "lambda_1",
        "lambda_2",
        "attention",
    ),
}


def linear(module: Any, *names: str) -> Any:
    """A projection by the name that a release gives it."""
    for name in names:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise AssertionError(names)


class PlainLayer:
    """One encoder layer: attention by a softmax over all logits, then the MLP."""

    def __init__(self, layer: Any) -> None:
        before, behind, *scales, name = _NAMES[type(layer).__name__]
        self.before, self.behind = getattr(layer, before), getattr(layer, behind)
        self.scales = [getattr(layer, scale) if scale else 1.0 for scale in scales]
        self.attention, self.mlp = getattr(layer, name), layer.mlp

    def heads(self, states: Tensor, heads: int) -> list[Tensor]:
        """Queries, keys and values [H, T, D] of states [T, C]."""
        given = self.before(states)
        found = []
        for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
            made = linear(self.attention, f"{short}_proj", f"attention.{long}")(given)
            made = getattr(self.attention, f"{short}_norm", nn.Identity())(made)
            found.append(made.view(len(given), heads, -1).transpose(0, 1))
        return found

    def attend(
        self, states: Tensor, heads: int, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States [T, C] behind the attention, its weights [H, T, T] and its keys [H, T, D]."""
        q, k, v = self.heads(states, heads)
        logits = q @ k.transpose(1, 2) * scale_of(self.attention)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        mixed = (weights @ v).transpose(0, 1).flatten(1)
        names = ("out_proj", "o_proj", "output.dense", "projection_layer")
        return states + self._scaled(0, linear(self.attention, *names)(mixed)), weights, k

    def feed(self, states: Tensor) -> Tensor:
        """States [T, C] behind the MLP."""
        return states + self._scaled(1, self.mlp(self.behind(states)))

    def _scaled(self, number: int, added: Tensor) -> Tensor:
        scale: Any = self.scales[number]
        return scale(added) if isinstance(scale, nn.Module) else scale * added


def tower_of(built: Any) -> tuple[Any, list[PlainLayer], int, bool]:
    """The tower of a model, its layers, their heads, and whether it has a CLS token."""
    tower = built.model.vision_tower
    lists = [one for one in tower.modules() if isinstance(one, nn.ModuleList)]
    layers = next(one for one in lists if type(one[0]).__name__ in _NAMES)
    heads = built.config.vision_config.num_attention_heads
    cls = built.config.vision_config.model_type != "siglip_vision_model"
    return tower, [PlainLayer(one) for one in layers], heads, cls


def begun(tower: Any, pixels: Tensor) -> Tensor:
    """[crops, T, C]; the tokens that the first layer sees."""
    tower = getattr(tower, "vision_model", tower)
    embedded = tower.embeddings(pixels)
    embedded = embedded[0] if isinstance(embedded, tuple) else embedded
    norm = getattr(tower, "pre_layrnorm", None)
    return embedded if norm is None else norm(embedded)


def squares(side: int, edge: int) -> list[list[int]]:
    """The patches of each square of `edge` x `edge` in a grid of `side` x `side`, row by row."""
    return [
        [(row + i) * side + column + j for i in range(edge) for j in range(edge)]
        for row in range(0, side, edge)
        for column in range(0, side, edge)
    ]


def single(count: int) -> list[list[int]]:
    """Every patch by itself."""
    return [[patch] for patch in range(count)]


def internvl(ratio: float = 0.5, attention: str = "sdpa") -> tuple[Any, dict[str, Tensor]]:
    """An InternVL whose layers scale what they add channel by channel, and a request of two tiles.

    Args:
        ratio: a visual token is made of a square of 1 / ratio patches a side, of 6 x 6.
        attention: of all layers.
    """
    torch.manual_seed(0)
    tower = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "use_qk_norm": True}
    each = round(36 * ratio**2)
    config = InternVLConfig(
        vision_config={**VISION, **tower},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=each,
        downsample_ratio=ratio,
        tie_word_embeddings=False,
    )
    built = unusual_scales(loud(InternVLForConditionalGeneration(config)))
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "lambda_" in name:
                weight.uniform_(0.5, 1.5)
    built.set_attn_implementation(attention)
    ids = torch.tensor([[61, 62, *[IMAGE] * 2 * each, 63, 64]])
    pixels = torch.randn(2, 3, SIDE, SIDE)
    return built, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }


def shuffled(built: Any, states: Tensor) -> Tensor:
    """States [crops, 37, C] of InternVL's tower as its projector gets them."""
    maps = built.model.vision_tower.layernorm(states)[:, 1:].unflatten(1, (6, 6))
    return built.model.pixel_shuffle(maps, built.config.downsample_ratio).flatten(1, 2)


def given_to_projector(built: Any, pruner: Any, inputs: Any) -> tuple[Tensor, Any]:
    """What the projector gets while a request is pruned, and the report."""
    seen: list[Tensor] = []
    hook = built.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad(), pruner(built) as handle:
        built(**inputs)
    hook.remove()
    # The contract proves the tower before anything happens in it.
    return seen[-1], handle.report
