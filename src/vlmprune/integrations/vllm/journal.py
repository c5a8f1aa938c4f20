"""A journal of what was kept, for tests: one JSON file an image, if a folder is named for them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmprune.files import write
from vlmprune.hosts.families.media import Medium
from vlmprune.integrations.vllm.names import JOURNAL


class Journal:
    """Writes what is kept of each image or video that is encoded.

    A file holds the modality, the method, the visual tokens before, the kept ones' numbers, and
    the SHA-256 of the pixels in float32, by which a test finds its image.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder) if folder else None
        self.number = 0

    @staticmethod
    def from_environment() -> Journal:
        """By the variable VLMPRUNE_VLLM_RECORD."""
        return Journal(os.environ.get(JOURNAL, ""))

    def __call__(self, medium: Medium, inputs: Any, method: Any, kept: Tensor) -> None:
        """Write one file."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {
            "modality": medium.kind,
            "method": None if method is None else repr(method),
            "before": len(kept),
            "kept": kept.nonzero()[:, 0].tolist(),
            "pixels": digest(inputs[medium.inputs[0]]),
        }
        path = self.folder / f"{os.getpid()}-{self.number}.json"
        write(path, json.dumps(entry))
        self.number += 1


def digest(pixels: Tensor) -> str:
    """SHA-256 of pixels in float32, whatever their shape."""
    return hashlib.sha256(pixels.detach().float().cpu().numpy().tobytes()).hexdigest()
