"""LLaVAs of Transformers with the weights and the inputs of the golden files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import golden_inputs as seeded

IMAGE = 1
# What float32 rounds in other orders of sums over up to 32 layers, of states of about 1 to 5.
CLOSE = 2e-4


def golden(method: str, **inputs: Tensor) -> dict[str, Tensor]:
    """What a release gave, after a look at whether its inputs were these."""
    with safe_open(Path(__file__).parent / "golden" / f"{method}.safetensors", "pt") as file:
        about = file.metadata()
        assert about["inputs"] == seeded.checksum(*inputs.values())
        assert len(about["commit"]) == 40 and about["repository"].startswith("https://github.com/")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class Given(nn.Module):
    """A projector that gives every image the same visual tokens."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens)

    def forward(self, features: Tensor) -> Tensor:
        return self.tokens.expand(len(features), -1, -1)


def text_config(layers: int) -> Any:
    return LlamaConfig(**seeded.DECODER, num_hidden_layers=layers)


def decoder_host(name: str, layers: int, image: int) -> Any:
    """A LLaVA whose image is `image` seeded tokens, whatever the pixels."""
    side = int(image**0.5)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        image_size=2 * side, patch_size=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(layers), image_token_id=IMAGE
    )
    built: Any = LlavaForConditionalGeneration(config).eval()
    seeded.fill(built.get_decoder(), name, 2.0)
    built.model.multi_modal_projector = Given(seeded.visual(name, image))
    return built


def prompt(built: Any, name: str, before: int, image: int, behind: int) -> dict[str, Tensor]:
    """The request of the golden file."""
    words = seeded.whole(name, before + behind, seeded.VOCABULARY)
    ids = torch.cat((words[:before], torch.full((image,), IMAGE), words[before:]))[None]
    side = built.config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, 3, side, side),
    }


def embedded(built: Any, name: str, inputs: dict[str, Tensor]) -> Tensor:
    """[1, L, D] what the release was given."""
    ids = inputs["input_ids"]
    words = built.get_input_embeddings()(ids).detach().clone()
    words[ids == IMAGE] = seeded.visual(name, int((ids == IMAGE).sum()))
    return words


def tower_host(name: str, peak: float, grid: tuple[int, int] | None = None) -> Any:
    """A LLaVA whose tower is the golden file's, or a LLaVA-NeXT that cuts images into a grid."""
    vision = CLIPVisionConfig(**seeded.TOWER)
    common = {
        "vision_config": vision,
        "text_config": text_config(2),
        "image_token_id": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if grid is None:
        built: Any = LlavaForConditionalGeneration(LlavaConfig(**common))
    else:
        pinpoints = [[rows * vision.image_size for rows in grid]]
        built = LlavaNextForConditionalGeneration(
            LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        )
    seeded.fill(built.model.vision_tower, name, peak)
    projector = built.model.multi_modal_projector
    for own, made in zip(
        (projector.linear_1, projector.linear_2), seeded.projector()[::2], strict=True
    ):
        own.load_state_dict(made.state_dict())
    return built.eval()


@torch.no_grad()
def visual_tokens(built: Any, pruner: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Any]:
    """What the language model gets of each row's image, and the report."""
    seen: list[Tensor] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["inputs_embeds"])

    hook = built.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    with pruner(built) as handle:
        built(**inputs)
    hook.remove()
    assert handle.report is not None
    # A word before the image and one behind it, and padding at the left.
    counts = [len(kept) for kept in handle.report.kept]
    rows = [row[-1 - count : -1] for row, count in zip(seen[0], counts, strict=True)]
    return rows, handle.report


def request(count: int, images: int) -> dict[str, Tensor]:
    """Rows of a word, an image of `count` tokens and a word."""
    ids = torch.tensor([[2, *[IMAGE] * count, 3]] * images)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
