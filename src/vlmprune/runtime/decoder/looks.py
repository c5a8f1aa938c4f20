"""What a method asked to see of a decoder layer: attention of a few queries, and keys.

A look sees queries and keys as the attention function gets them, after rotary embedding and
norms, and computes the softmax of the asked rows alone, in float32. To see them before a layer
has run, its own forward is begun and broken off where it would attend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, attention_of
from vlmprune.hosts.decoder import LayerCall
from vlmprune.runtime.attention.interception import Proceed, intercepting

# Queries a chunk: the extra memory is heads · CHUNK · columns.
CHUNK = 64


def asked_attention(call: AttentionCall, asked: Tensor, counted: Tensor) -> Tensor:
    """Post-softmax attention of some queries to each key, averaged over heads and queries.

    Args:
        call: a causal one.
        asked: [B, n] numbers of queries.
        counted: [B, n] bool; which of them count.

    Returns:
        [B, C] float32; 0 where no query counts.
    """
    batch, heads, _, width = call.query.shape
    total = torch.zeros(batch, call.key.shape[2], device=call.query.device)
    for some, counts in zip(asked.split(CHUNK, dim=1), counted.split(CHUNK, dim=1), strict=True):
        chosen = call.query.gather(2, some[:, None, :, None].expand(-1, heads, -1, width))
        # A row of padding may be no number, and does not count.
        weights = call.weights(chosen, call.lines(some, causal=True)).nan_to_num().mean(dim=1)
        total += (weights * counts[..., None]).sum(dim=1)
    return total / counted.sum(dim=1, keepdim=True).clamp(min=1)


class Look:
    """Watches one attention call.

    Attributes:
        attention: [B, C] as `asked_attention` computes it; None unless asked for.
        keys: [B, H', R, D] keys of the rows; None unless asked for.
        called: whether the layer attended.
    """

    def __init__(self, asked: Tensor | None, counted: Tensor | None, keys: bool) -> None:
        self.asked, self.counted, self.wants_keys = asked, counted, keys
        self.attention: Tensor | None = None
        self.keys: Tensor | None = None
        self.called = False

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        """Take what was asked for out of one attention call."""
        result = contract.run(proceed, call, causal=True)
        self.see(call)
        return result

    @torch.no_grad()
    def see(self, call: AttentionCall) -> None:
        """The same, before the call is made."""
        if self.called and contract.checks():
            raise contract.broken(call.module, "it attends more than once a layer")
        self.called = True
        if self.wants_keys:
            self.keys = call.sharing.joined(call.key[:, :, -call.query.shape[2] :].detach())
        if self.asked is not None and self.counted is not None:
            if call.foreign is not None:
                raise VlmpruneError(
                    f"the attention of {type(call.module).__name__} has sinks or biases "
                    f"({call.foreign}), which a method that drops rows does not know; prune before "
                    "the language model."
                )
            seen = asked_attention(call, self.asked, self.counted)
            self.attention = call.sharing.mean(seen)


class _SeenError(Exception):
    """Breaks a layer's forward off once its attention was seen."""


class _Glance:
    """Hands an attention call, with earlier keys in front, to a look, and breaks it off."""

    def __init__(self, look: Look, earlier: Tensor | None) -> None:
        self.look, self.earlier = look, earlier

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        """Look and raise."""
        if self.earlier is not None:
            call = replace(call, key=torch.cat((self.earlier.to(call.key.device), call.key), dim=2))
        elif contract.due(call, causal=True):
            contract.run(proceed, call, causal=True)
        self.look.see(call)
        raise _SeenError


@torch.no_grad()
def glance(layer: nn.Module, call: LayerCall, earlier: Tensor | None, look: Look) -> None:
    """Let `look` see how a layer would attend, without running it.

    Args:
        layer: a decoder layer.
        call: what it would be given.
        earlier: [B, H', P, D] keys of columns before, which its cache holds.
        look: sees the call.

    Raises:
        VlmpruneError: the layer does not attend through Transformers' registry.
    """
    # The layer must not add to its cache yet.
    args, kwargs = call.with_hidden(call.hidden.detach()).without_cache().unbuilt()
    try:
        with intercepting(_Glance(look, earlier), attention_of(layer)):
            layer.forward(*args, **kwargs)
    except _SeenError:
        return
    raise VlmpruneError(
        f"{type(layer).__name__} does not attend through Transformers' attention registry, so its "
        "attention cannot be seen; prune before the language model."
    )
