"""The reference for rows dropped between decoder layers: the full model, later layers masked.

Written apart from the library: nothing leaves, but from a layer on nobody sees what left before
it. Every query is told so, those of the prompt too.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def hiding(built: Any, dropped: dict[int, Tensor], held: int = 0) -> Iterator[None]:
    """Hide columns in decoder layers; for one call of `generate` or one plain forward.

    Args:
        built: the model.
        dropped: for each layer [B, L] bool: which of the first L columns it does not see.
        held: columns that a cache holds before the call.
    """
    name = built.config.get_text_config()._attn_implementation
    decoder = built.get_decoder()
    layers = {
        layer.self_attn: i for i, layer in enumerate(getattr(decoder, "model", decoder).layers)
    }
    before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
    plain = ALL_ATTENTION_FUNCTIONS.get(name)
    # Columns so far, by layer: a layer with a sliding window has the keys of the last ones alone.
    total: Counter[int] = Counter()

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        function, mask = plain, attention_mask
        if function is None:
            called = inspect.unwrap(type(module).forward).__code__.co_names
            own = [n for n in called if n.endswith("eager_attention_forward")]
            function = getattr(sys.modules[type(module).__module__], own[0])
        index = layers.get(module, -1)
        if index in dropped:
            hidden = dropped[index]
            queries, columns = query.shape[2], key.shape[2]
            total[index] += queries
            seen = torch.ones(query.shape[0], held + total[index], dtype=torch.bool)
            seen[:, : hidden.shape[1]] = ~hidden.repeat_interleave(len(query) // len(hidden), dim=0)
            seen = seen[:, None, None, -columns:]
            if mask is None:
                mask = torch.ones(queries, columns, dtype=torch.bool).tril(columns - queries)
            if mask.dtype == torch.bool:
                mask = mask & seen
            else:
                mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        return function(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = before
