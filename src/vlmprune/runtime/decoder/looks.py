"""What a method asked to see of a decoder layer: attention of a few queries, and keys.

A watcher sees queries and keys as the attention function gets them, after rotary embedding and
norms, and computes the softmax of the asked rows alone, in float32. To see them before a layer
has run, its own forward is begun and broken off where it would attend.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, attention_of
from vlmprune.hosts.decoder import LayerCall
from vlmprune.runtime.attention.interception import watching
from vlmprune.runtime.scope import OwnThread

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
        called: whether the layer attended.
    """

    causal, whole = True, True

    def __init__(self, asked: Tensor | None, counted: Tensor | None, keys: bool) -> None:
        self.asked, self.counted, self.wants_keys = asked, counted, keys
        self.attention: Tensor | None = None
        self.keys: Tensor | None = None
        self.called = False
        self.thread = OwnThread()

    @torch.no_grad()
    def see(self, call: AttentionCall) -> None:
        """Take what was asked for out of one attention call."""
        if not self.thread.runs:
            return
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
            seen = asked_attention(
                call.query.detach(),
                call.key.detach(),
                call.scale,
                call.mask,
                self.asked,
                self.counted,
                call.softcap,
            )
            self.attention = call.sharing.mean(seen)


class _SeenError(Exception):
    """Breaks a layer's forward off once its attention was seen."""


class _Glance:
    """Hands an attention call, with earlier keys in front, to a look, and breaks it off."""

    causal = True

    def __init__(self, look: Look, earlier: Tensor | None) -> None:
        self.look, self.earlier = look, earlier
        self.whole = earlier is None

    def see(self, call: AttentionCall) -> None:
        """Look and raise."""
        if not self.look.thread.runs:
            return
        if self.earlier is not None:
            call = replace(call, key=torch.cat((self.earlier.to(call.key.device), call.key), dim=2))
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
    watcher = _Glance(look, earlier)
    # The layer must not add to its cache yet.
    args, kwargs = call.with_hidden(call.hidden.detach()).without_cache().unbuilt()
    try:
        with watching(attention_of(layer), watcher):
            layer.forward(*args, **kwargs)
    except _SeenError:
        return
    raise VlmpruneError(
        f"{type(layer).__name__} does not attend through Transformers' attention registry, so its "
        "attention cannot be seen; prune before the language model."
    )
