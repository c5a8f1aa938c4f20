"""Short answers with the logits of each step, and how far two of them may lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-5  # of answers that are equal
DIFFERENT = 1e-3  # of a control


def generate(built: Any, inputs: Mapping[str, Tensor], **more: Any) -> Any:
    settings = {"max_new_tokens": 6, "do_sample": False, **more}
    return built.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


def distance(left: Any, right: Any) -> float:
    """The largest difference of two answers' logits."""
    return max(float((a - b).abs().max()) for a, b in zip(left.logits, right.logits, strict=True))


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal but for how their sums were rounded."""
    return left.shape == right.shape and torch.allclose(left, right, rtol=0, atol=TOLERANCE)
