"""What a method is told of layers whose prompt is complete."""

from __future__ import annotations

import pytest
import torch

from tiny import model, request
from vlmprune import PLPHP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_the_type(dtype: torch.dtype) -> None:
    built = model().to(dtype)
    inputs = request(built, [1, 2]).inputs
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with PLPHP()(built) as handle:
        built.generate(**inputs, max_new_tokens=2, do_sample=False)
    text = built.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    for layer in handle.report.layers:
        kept = int(layer.mask.sum())
        assert kept and layer.kv_bytes == kept * 2 * width * dtype.itemsize
