"""The embedded model: a small trained vision-language model that needs no network.

It is an ordinary `LlavaForConditionalGeneration` folder inside the package: DINOv2-small sees
224 x 224 pixels as 16 x 16 = 256 visual tokens, and a small Llama decoder answers questions about
scenes of symbols. It stands for nothing else; `README.md` beside this file is its model card.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vlmprune.hosts.pretrained import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["clips", "held_out", "load", "path", "scenes"]


def path() -> Path:
    """Folder of the model, as `from_pretrained` takes it."""
    return Path(__file__).parent / "model"


def scenes() -> Path:
    """Folder of the demonstration scenes: pictures and `scenes.json` (questions, true answers)."""
    return Path(__file__).parent / "scenes"


def held_out() -> Path:
    """Folder of the held-out test scenes: pictures and `scenes.json`, as in `scenes`."""
    return Path(__file__).parent / "held_out"


def clips() -> Path:
    """Folder of held-out clips: frames and `questions.json`, as a folder task has it."""
    return Path(__file__).parent / "clips"


def load(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the embedded model and its processor from the package, offline.

    The processor turns one picture into `pixel_values` `[1, 3, 224, 224]` and each `<image>` of the
    prompt into 256 placeholders, one per 14 x 14 pixel patch, row by row from the top left.

    Args:
        dtype: type of the weights in memory; they are stored as float16.
        device: where to put the model; `None` leaves it on the CPU.
        attn_implementation: as in `from_pretrained`; `None` is Transformers' own choice.

    Returns:
        The model, in eval mode, and its processor.
    """
    from vlmprune.hosts import pretrained

    model, processor = pretrained.llava(path(), dtype, attn_implementation)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval(), processor
