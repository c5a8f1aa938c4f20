"""How the budget of an image travels to vLLM's model: as a field of numbers among its inputs.

Imports no vLLM.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from vlmprune.integrations.vllm.policy import ALL, Keep


def field_of(kind: str) -> str:
    """The field in which an image (or video) takes its budget to the model."""
    return f"vlmprune_{kind}"


def pack(keep: Keep, before: int, after: int) -> Tensor:
    """[4] int64: a budget, and the visual tokens without and with it."""
    if keep is None:
        kind, value = 0, 0
    elif keep == ALL:
        kind, value = 3, 0
    elif isinstance(keep, float):
        # The bits, as fields of floating point are cast to the model's type.
        kind, value = 2, struct.unpack("<q", struct.pack("<d", keep))[0]
    else:
        kind, value = 1, int(keep)
    return torch.tensor([kind, value, before, after])


def unpack(field: Tensor) -> tuple[Keep, int, int]:
    """The budget, and the visual tokens without and with it."""
    kind, value, before, after = field.tolist()
    if kind == 2:
        value = struct.unpack("<d", struct.pack("<q", value))[0]
    keep: Keep = {0: None, 3: ALL}.get(kind, value)
    return keep, before, after
