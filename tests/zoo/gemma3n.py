"""Gemma 3n, with convolutions of our own for a tower: timm is not needed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModelOutput

from zoo.base import (
    END,
    FAR,
    IMAGE,
    NEWLINE,
    START,
    TEXT,
    VOCABULARY,
    Entry,
    Media,
    Modality,
    flat,
    noise,
    one_each,
)
from zoo.placed import KINDS, mild

TOKENS, STRIDE = 16, 8  # visual tokens of an image, pixels between two of them


class Convolutions(nn.Module):
    """Stands in for the tower of timm: a few convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, STRIDE, STRIDE)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, pixel_values: Tensor, **_: Any) -> TimmWrapperModelOutput:
        made = self.second(self.first(pixel_values).tanh())
        return TimmWrapperModelOutput(last_hidden_state=made)


def gemma3n() -> Any:
    """Gemma 3n: a convolutional tower, four streams, last layers that share keys and values."""
    text = {
        **TEXT,
        "head_dim": 8,
        "sliding_window": FAR,
        "num_hidden_layers": len(KINDS),
        "layer_types": KINDS,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "activation_sparsity_pattern": None,
    }
    audio = {
        "hidden_size": 16,
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": (4, 4),
        "vocab_offset": 2 * VOCABULARY,
    }
    config = Gemma3nConfig(
        vision_config={
            "hidden_size": 24,
            "vocab_offset": VOCABULARY,
            "label_names": ["none"],
        },
        text_config=text,
        audio_config=audio,
        vision_soft_tokens_per_image=TOKENS,
        image_token_id=IMAGE,
        audio_token_id=50,
        boi_token_id=START,
        eoi_token_id=END,
        tie_word_embeddings=False,
    )
    usual = modeling_gemma3n.AutoModel.from_config

    # By place or, in early releases, by name.
    def made(*parts: Any, **named: Any) -> Any:
        part = parts[0] if parts else named["config"]
        return Convolutions(24) if part is config.vision_config else usual(*parts, **named)

    with mock.patch.object(modeling_gemma3n.AutoModel, "from_config", made):
        return mild(Gemma3nForConditionalGeneration(config))


def _squares(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    count, side = flat(rows, "image"), STRIDE * int(TOKENS**0.5)
    pixels = {"pixel_values": noise(generator, count, 3, side, side)} if count else {}
    pieces = [[NEWLINE, START, *[IMAGE] * TOKENS, END, NEWLINE]] * count
    return Media(pixels, pieces, one_each(rows))


FAMILIES: dict[str, Entry] = {"gemma3n": Entry("Gemma 3n", gemma3n, _squares, attends=False)}
