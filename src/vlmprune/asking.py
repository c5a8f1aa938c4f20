"""What a method asked to see of a decoder layer: attention of a few queries, and keys.

A watcher sees queries and keys as the attention function gets them, after rotary embedding and
norms, and computes the softmax of the asked rows alone, in float32. To see them before a layer
has run, its own forward is begun and broken off where it would attend.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.dispatch import attention_of, watching
from vlmprune.errors import VlmpruneError
from vlmprune.hosts.release import with_cache

# Queries a chunk: the extra memory is heads · CHUNK · columns.
CHUNK = 64


def asked_attention(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None,
    asked: Tensor,
    counted: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Post-softmax attention of some queries to each key, averaged over heads and queries.

    Args:
        query: [B, H, R, D].
        key: [B, H', C, D], H' a divisor of H; the last R keys are those of the queries.
        scaling: factor of the dot products.
        mask: as the attention function gets it: None (causal), [B, C] of which 0 is padding, or
            [B or 1, 1 or H, R, C], bool or additive.
        asked: [B, n] numbers of queries.
        counted: [B, n] bool; which of them count.
        softcap: cap of the scores, where the model has one.

    Returns:
        [B, C] float32; 0 where no query counts.
    """
    batch, heads, rows, width = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    transposed = key.float().transpose(2, 3)
    total = torch.zeros(batch, columns, device=query.device)
    for some, counts in zip(asked.split(CHUNK, dim=1), counted.split(CHUNK, dim=1), strict=True):
        n = some.shape[1]
        chosen = query.gather(2, some[:, None, :, None].expand(-1, heads, -1, width)).float()
        scores = chosen.reshape(batch, kv_heads, -1, width) @ transposed * scaling
        scores = scores.view(batch, heads, n, columns)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        if mask is None or mask.ndim == 2:
            at = torch.arange(columns, device=query.device)
            seen = (at <= some[..., None] + (columns - rows))[:, None]
            if mask is not None:
                seen = seen & mask[:, None, None, -columns:].bool()
        else:
            index = some[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            seen = mask.expand(batch, -1, -1, -1).gather(2, index)[..., :columns]
        if seen.dtype == torch.bool:
            scores = scores.masked_fill(~seen, -torch.inf)
        else:
            hidden = seen <= torch.finfo(seen.dtype).min / 2
            scores = (scores + seen.float()).masked_fill(hidden, -torch.inf)
        # A row of padding alone sees nothing, and its attention is none.
        weights = scores.softmax(dim=-1).nan_to_num().mean(dim=1)
        total += (weights * counts[..., None]).sum(dim=1)
    return total / counted.sum(dim=1, keepdim=True).clamp(min=1)


class Look:
    """Watches one attention call of its own thread.

    Attributes:
        attention: [B, C] as `asked_attention` computes it; None unless asked for.
        keys: [B, H', R, D] keys of the rows; None unless asked for.
    """

    def __init__(self, asked: Tensor | None, counted: Tensor | None, keys: bool) -> None:
        self.asked, self.counted, self.wants_keys = asked, counted, keys
        self.attention: Tensor | None = None
        self.keys: Tensor | None = None
        self.thread = threading.get_ident()

    @torch.no_grad()
    def see(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        """Take what was asked for out of one attention call."""
        if threading.get_ident() != self.thread:
            return
        if self.wants_keys:
            self.keys = key[:, :, -query.shape[2] :].detach()
        if self.asked is not None and self.counted is not None:
            if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
                raise VlmpruneError(
                    f"the attention of {type(module).__name__} has sinks or biases, which a "
                    "method that drops rows does not know; prune before the language model."
                )
            scaling = kwargs.get("scaling")
            self.attention = asked_attention(
                query.detach(),
                key.detach(),
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                mask,
                self.asked,
                self.counted,
                kwargs.get("softcap"),
            )


class _SeenError(Exception):
    """Breaks a layer's forward off once its attention was seen."""


class _Glance:
    """Hands an attention call, with earlier keys in front, to a look, and breaks it off."""

    def __init__(self, look: Look, earlier: Tensor | None) -> None:
        self.look, self.earlier = look, earlier

    def see(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        """Look and raise."""
        if threading.get_ident() != self.look.thread:
            return
        if self.earlier is not None:
            key = torch.cat((self.earlier.to(key.device), key), dim=2)
        self.look.see(module, query, key, mask, kwargs)
        raise _SeenError


@torch.no_grad()
def glance(
    layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], earlier: Tensor | None, look: Look
) -> None:
    """Let `look` see how a layer would attend, without running it.

    Args:
        layer: a decoder layer.
        hidden: [B, R, D] its input.
        kwargs: its other arguments.
        earlier: [B, H', P, D] keys of columns before, which its cache holds.
        look: sees the call.

    Raises:
        VlmpruneError: the layer does not attend through Transformers' registry.
    """
    watcher = _Glance(look, earlier)
    # The layer must not add to its cache yet.
    alone = with_cache(type(layer), kwargs, None) | {"use_cache": False}
    try:
        with watching(attention_of(layer), watcher):
            layer.forward(hidden.detach(), **alone)
    except _SeenError:
        return
    raise VlmpruneError(
        f"{type(layer).__name__} does not attend through Transformers' attention registry, so its "
        "attention cannot be seen; prune before the language model."
    )
