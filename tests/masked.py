"""The reference for cut caches: the full cache, with what a head dropped masked in its attention.

Written apart from the library: plain softmax in float32, no cache class of ours.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def masking(built: Any, keep: dict[int, Tensor]) -> Iterator[None]:
    """Hide columns from heads in decoder layers.

    Args:
        built: the model.
        keep: for each layer [B, H, L] bool: what heads see of the first L columns, from the first
            query on that comes after them. Layers that are missing see everything.
    """
    name = built.config.get_text_config()._attn_implementation
    decoder = built.get_decoder()
    layers = {
        getattr(layer, "self_attn", None) or layer.mixer: i
        for i, layer in enumerate(getattr(decoder, "model", decoder).layers)
        # Nemotron's layers have one part each, under one name.
        if hasattr(layer, "self_attn") or hasattr(layer, "mixer")
    }
    before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
    plain = ALL_ATTENTION_FUNCTIONS.get(name)

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        mask = attention_mask
        seen = keep.get(layers.get(module, -1))
        queries, columns = query.shape[2], key.shape[2]
        if seen is None or columns - queries < seen.shape[2]:
            if plain is not None:
                return plain(module, query, key, value, mask, **kwargs)
            # Llama 4's tower has one of its own in the same file.
            called = inspect.unwrap(type(module).forward).__code__.co_names
            own = [n for n in called if n.endswith("eager_attention_forward")]
            eager = getattr(sys.modules[type(module).__module__], own[0])
            return eager(module, query, key, value, mask, **kwargs)
        group = query.shape[1] // key.shape[1]
        times = query.shape[0] // seen.shape[0]
        visible = torch.ones(query.shape[0], key.shape[1], queries, columns, dtype=torch.bool)
        visible[..., : seen.shape[2]] = seen.repeat_interleave(times, 0)[:, :, None]
        visible = visible.repeat_interleave(group, 1)
        causal = torch.ones(queries, columns, dtype=torch.bool).tril(columns - queries)
        visible &= causal
        if mask is not None:
            visible &= mask if mask.dtype == torch.bool else mask > -1
        scores = query.float() @ key.float().repeat_interleave(group, 1).transpose(2, 3)
        scores = (scores * kwargs["scaling"]).masked_fill(~visible, -torch.inf)
        out = scores.softmax(-1).nan_to_num() @ value.float().repeat_interleave(group, 1)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = before


def kept_columns(report: Any, ids: Tensor, image_token: int, before: int = 0) -> dict[int, Tensor]:
    """[B, H, L] per layer from a report's `kept`, which counts the visual tokens of each row.

    Args:
        report: after one call.
        ids: [B, L] the prompt as the language model saw it, where `kept` counts its tokens.
        image_token: id of a visual token.
        before: columns of earlier turns, all of which stay.
    """
    out = {}
    for layer in report.layers:
        heads = len(layer.kept)
        keep = torch.ones(ids.shape[0], heads, ids.shape[1], dtype=torch.bool)
        for row in range(ids.shape[0]):
            places = (ids[row] == image_token).nonzero()[:, 0]
            places = places[places >= before]
            for head in range(heads):
                dropped = set(range(len(places))) - set(layer.kept[head][row].tolist())
                keep[row, head, places[sorted(dropped)]] = False
        out[layer.index] = keep
    return out
