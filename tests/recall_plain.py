"""Attention to text, to what is read of visual tokens, and to one token for the others: plainly."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention.recalled import Recalled


def plain(asked: AttentionCall, held: Recalled, read: Tensor, stands: bool) -> Tensor:
    """[B, Hq, Dv] in float64, query by query: a softmax over text and what is read.

    Args:
        asked: one query of each sample and head.
        held: the visual tokens.
        read: [B, H, V] bool.
        stands: whether one token stands for what is not read.
    """
    keys, values = (states.double() for states in held.store.whole())
    (batch, queries), (heads, dim) = asked.query.shape[:2], values.shape[1::2]
    shown = keys.new_zeros(batch, 1, 1, asked.key.shape[2])
    if asked.mask is not None and asked.mask.dtype == torch.bool:
        shown = shown.masked_fill(~asked.mask, -torch.inf)
    elif asked.mask is not None:
        shown = shown + asked.mask
    guesses = None if held.sketch is None else held.sketch.scores(asked.query[:, :, 0], asked.scale)
    out = shown.new_empty(batch, queries, dim)
    for b in range(batch):
        for q in range(queries):
            h = q * heads // queries
            query = asked.query[b, q, 0].double() * asked.scale
            here, left = read[b, h], held.real[b] & ~read[b, h]
            weights = torch.cat(
                (asked.key[b, h].double() @ query + shown[b, 0, 0], keys[b, h][here] @ query)
            ).exp()
            given = torch.cat((asked.value[b, h].double(), values[b, h][here]))
            if stands and left.any():
                scores = keys[b, h] @ query if guesses is None else guesses[b, q].double()
                weights = torch.cat((weights, scores[left].exp().sum()[None]))
                given = torch.cat((given, values[b, h][left].mean(dim=0)[None]))
            out[b, q] = weights @ given / weights.sum()
    return out


def summed(values: Tensor, real: Tensor) -> Tensor:
    """[B, H, Dv] float32; the sum of values [B, H, V, Dv] of the tokens there are, [B, V]."""
    return (values.float() * real[:, None, :, None]).sum(dim=2)
