"""What a server kept, from the files of VLMPRUNE_VLLM_RECORD."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor


def digest(pixels: Tensor) -> str:
    """As the record names an image: SHA-256 of its pixels in float32."""
    return hashlib.sha256(pixels.float().contiguous().numpy().tobytes()).hexdigest()


def records(folder: Path, pixels: Tensor | None = None) -> list[dict[str, Any]]:
    """All records, or those of one image, in the order in which they were written."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    every = [json.loads(file.read_text()) for file in files]
    return [one for one in every if pixels is None or one["pixels"] == digest(pixels)]
