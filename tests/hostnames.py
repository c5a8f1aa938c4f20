"""What this release of transformers calls a KV cache, found apart from the library.

Former names are taken with a warning, and warnings are errors here.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import LlamaForCausalLM

CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(LlamaForCausalLM.forward).parameters
)


def cache_of(output: Any) -> Any:
    """The cache in what a model returned."""
    return getattr(output, CACHE)
