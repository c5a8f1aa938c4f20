"""What a processor returns for a request: its tensors, which are read by name here alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_IDS, _MASK, _SIZES = "input_ids", "attention_mask", "image_sizes"


def ids_of(inputs: Mapping[str, Any]) -> Tensor:
    """[B, L] token ids."""
    ids: Tensor = inputs[_IDS]
    return ids


def mask_of(inputs: Mapping[str, Any]) -> Tensor:
    """[B, L] the mask, 0 where a column is padding; ones where none came."""
    mask: Tensor | None = inputs.get(_MASK)
    return torch.ones_like(ids_of(inputs)) if mask is None else mask


def sizes_of(inputs: Mapping[str, Any]) -> Any:
    """[images, 2] (height, width) of the pictures as the processor saw them; None of most."""
    return inputs.get(_SIZES)


def present(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those inputs among some that came."""
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def with_prompt(inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """The inputs with another prompt."""
    return {**inputs, _IDS: ids, _MASK: mask}
