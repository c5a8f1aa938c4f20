"""The embedded model: a small trained vision-language model that needs no network.

It is an ordinary `LlavaForConditionalGeneration` folder: DINOv2-small sees 224 x 224 pixels as
16 x 16 = 256 visual tokens, and a small Llama decoder answers questions about scenes of symbols.
It stands for nothing else; `README.md` in its package is its model card.

The folders are a distribution of their own, `vlmprune_embedded`, which is looked for when one is
asked for. Where it is not installed, every function raises `VlmpruneError`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from vlmprune.hosts.pretrained import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["clips", "held_out", "load", "path", "scenes"]

MISSING = (
    "this needs the embedded model, a package of its own, which is not installed; run `pip install "
    "./packages/vlmprune-embedded` in a clone of the repository."
)
"""What to do where it is not there."""


def path() -> Path:
    """Folder of the model, as `from_pretrained` takes it."""
    return _folder("path")


def scenes() -> Path:
    """Folder of the demonstration scenes: pictures and `scenes.json` (questions, true answers)."""
    return _folder("scenes")


def held_out() -> Path:
    """Folder of the held-out test scenes: pictures and `scenes.json`, as in `scenes`."""
    return _folder("held_out")


def clips() -> Path:
    """Folder of held-out clips: frames and `questions.json`, as a folder task has it."""
    return _folder("clips")


def learned() -> Path:
    """Folder of the weights that methods learned on the model, one folder each."""
    return _folder("learned")


def installed() -> bool:
    """Whether the embedded model is there."""
    return _package() is not None


def _folder(name: str) -> Path:
    """One of the package's folders.

    Raises:
        VlmpruneError: it is not installed.
    """
    package = _package()
    if package is None:
        raise VlmpruneError(MISSING)
    found: Path = getattr(package, name)()
    return found


def _package() -> Any:
    """The distribution's module; None where it is not installed."""
    try:
        import vlmprune_embedded
    except ModuleNotFoundError as error:
        if error.name != "vlmprune_embedded":
            raise
        return None
    return vlmprune_embedded


def load(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the embedded model and its processor from their package, offline.

    The processor turns one picture into `pixel_values` `[1, 3, 224, 224]` and each `<image>` of the
    prompt into 256 placeholders, one per 14 x 14 pixel patch, row by row from the top left.

    Args:
        dtype: type of the weights in memory; they are stored as float16.
        device: where to put the model; `None` leaves it on the CPU.
        attn_implementation: as in `from_pretrained`; `None` is Transformers' own choice.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        VlmpruneError: the package is not installed.
    """
    from vlmprune.hosts import pretrained

    model, processor = pretrained.llava(path(), dtype, attn_implementation)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval(), processor
