"""What the installed release of transformers is like, found apart from the library."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from packaging.version import Version
from transformers import LlamaForCausalLM

# What it calls a KV cache. Former names are taken with a warning, and warnings are errors here.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(LlamaForCausalLM.forward).parameters
)


def cache_of(output: Any) -> Any:
    """The cache in what a model returned."""
    return getattr(output, CACHE)


def repeated_alike(built: Any, inputs: dict[str, Any]) -> bool:
    """Whether a row that `generate` repeats has the logits that it has alone.

    Args:
        built: a model, pruned or not.
        inputs: a batch of more than one row.
    """
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    once = built.generate(**inputs, do_sample=False, **options).logits[0]
    twice = built.generate(**inputs, do_sample=True, num_return_sequences=2, **options).logits[0]
    assert float((once[0] - once[1]).abs().max()) > 1e-3
    return float((twice - once.repeat_interleave(2, 0)).abs().max()) < 1e-4


def repeats_rows(built: Any, inputs: dict[str, Any]) -> bool:
    """Whether `generate` gives repeated rows (beams, samples) the images of their own.

    Several releases before 5.20 mix up those of rows with several images, or fail; then there is no
    stock answer to compare with, and a test may be skipped. From 5.20 on this is always so.
    """
    try:
        right = repeated_alike(built, inputs)
    except ValueError:
        right = False
    assert right or Version(transformers.__version__) < Version("5.20")
    return right
