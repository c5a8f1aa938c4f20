"""The full model, whose layers hide columns and let rows attend to nothing, as ZipVL's do."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from masked import kept_columns
from tiny import EOS, IMAGE, PAD, VOCABULARY


def text_config(cls: Any = LlamaConfig, **changes: Any) -> Any:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
    return cls(**{**shape, **heads, **tokens, "max_position_embeddings": 512, **changes})


Calls = dict[int, list[tuple[Tensor, Tensor, Tensor]]]


@contextmanager
def reference(built: Any, keep: dict[int, Tensor]) -> Iterator[Calls]:
    """The full model, of which each layer hides columns and lets rows attend to nothing.

    Written apart from the library. Gives, per layer and call, scaled queries, keys and what
    was visible before anything was hidden.

    Args:
        built: the model.
        keep: for each layer [B, L] bool over the first L columns: False is hidden, and gets 0 as
            the result of its attention. Layers that are missing are whole.
    """
    name = built.config.get_text_config()._attn_implementation
    decoder = built.get_decoder()
    inner = getattr(decoder, "model", decoder).layers
    layers = {layer.self_attn: i for i, layer in enumerate(inner) if hasattr(layer, "self_attn")}
    before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
    plain = ALL_ATTENTION_FUNCTIONS.get(name)
    calls: Calls = {}

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        index = layers.get(module)
        if index is None:
            called = inspect.unwrap(type(module).forward).__code__.co_names
            own = [n for n in called if n.endswith("eager_attention_forward")]
            function = plain or getattr(sys.modules[type(module).__module__], own[0])
            return function(module, query, key, value, attention_mask, **kwargs)
        queries, columns = query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        visible = torch.ones(len(query), 1, queries, columns, dtype=torch.bool)
        if attention_mask is None:
            visible = visible.tril(columns - queries)
        else:
            given = attention_mask
            visible = visible & (given if given.dtype == torch.bool else given > -1)
        calls.setdefault(index, []).append((query * kwargs["scaling"], key, visible))
        stays = torch.ones(len(query), columns, dtype=torch.bool)
        if index in keep:
            own = keep[index].repeat_interleave(len(query) // len(keep[index]), 0)[:, :columns]
            stays[:, : own.shape[1]] = own
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        scores = scores.masked_fill(~(visible & stays[:, None, None]), -torch.inf)
        out = scores.softmax(-1).nan_to_num() @ value
        out = out * stays[:, None, columns - queries :, None]
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield calls
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = before


def stays(report: Any, ids: Tensor, before: int = 0, token: int = IMAGE) -> dict[int, Tensor]:
    """[B, L] per layer; all KV heads keep the same."""
    heads = kept_columns(report, ids, token, before)
    assert all((mask == mask[:, :1]).all() for mask in heads.values())
    return {index: mask[:, 0] for index, mask in heads.items()}
