"""Turns of a conversation over one cache: filled, gone on with, compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stock import CACHE

WORD = torch.tensor([[43, 49, 41]])
OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
MISREAD = "the model alone would misread it"


def filled(built: Any, inputs: Any, cache: Any = None) -> tuple[Any, Tensor]:
    """A cache that `generate` filled, and its answer."""
    cache = DynamicCache(config=built.config.get_text_config()) if cache is None else cache
    return cache, built.generate(**inputs, **{CACHE: cache}, **OPTIONS)


def later(sequences: Tensor, inputs: Any) -> dict[str, Tensor]:
    """Ids and mask of the next turn, all columns of them."""
    ids = torch.cat((sequences, WORD.expand(len(sequences), -1)), dim=1)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    ones = torch.ones(len(ids), new, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat((inputs["attention_mask"], ones), 1)}


def said(built: Any, cache: Any, turn: dict[str, Tensor]) -> Any:
    return built.generate(
        **turn,
        **{CACHE: cache},
        **OPTIONS,
        return_dict_in_generate=True,
        output_logits=True,
    )


def apart(left: Any, right: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left.logits, right.logits, strict=True))
