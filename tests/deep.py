"""A tiny LLaVA of more decoder layers, its answers, and rows that leave between its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaConfig

from tiny import EOS, PAD, VOCABULARY, Request, dropped_columns, model
from vlmprune.pruner import Pruner
from vlmprune.views import Ask, Rows, RowView

STEPS = 7


def deep(attention: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    """A tiny LLaVA with more decoder layers."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    return model("llava", attention, seed=seed, text_config=text)


def generate(built: Any, inputs: Mapping[str, Tensor], **more: Any) -> Any:
    settings = {"max_new_tokens": STEPS, "do_sample": False, **more}
    return built.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


def dropped_by_layer(req: Request, report: Any) -> dict[int, Tensor]:
    return {layer.index: dropped_columns(req, layer.kept) for layer in report.layers}


@dataclass(frozen=True)
class Ordered(Pruner):
    """Of each sample, every third visual token leaves at first, then every other.

    Of those that stay at first, every fourth is doubled and comes behind the rest of its image.
    """

    positions: Any = "compact"

    stage: ClassVar[str] = "inside the language model"

    def asks(self, depth: int) -> Mapping[int, Ask]:
        return {1: Ask(), 3: Ask("own")}

    def drop(self, layer: int, view: RowView) -> Rows:
        at = torch.arange(view.images.shape[1]).expand_as(view.images)
        if layer == 3:
            return Rows(at % 2 == 0)
        last = at % 4 == 1
        states = torch.where(last[..., None], 2 * view.hidden, view.hidden)
        return Rows(at % 3 != 0, states, last)


def hooks(built: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in built.modules())
