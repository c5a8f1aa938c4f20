"""The attention rows that a method asked for, without slow attention and without L × L.

SDPA and flash attention return no weights. A tap sees the queries and keys of one layer as the
attention function gets them (after projections, norms and rotary embedding), computes the
softmax of the wanted rows alone in float32, and passes the call on unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmprune.dispatch import attention_of, watching

Rows = Literal["cls", "received"]

# Queries a chunk when every row is needed: the extra memory is heads × CHUNK × N.
CHUNK = 128


def attention_rows(query: Tensor, key: Tensor, scaling: float, rows: Rows) -> Tensor:
    """Post-softmax attention that each key gets, averaged over heads.

    Args:
        query: [B, H, L, D].
        key: [B, H', L, D], H' a divisor of H.
        scaling: factor of the dot products.
        rows: "cls", the row of query 0; "received", the mean over all queries, computed in
            chunks so that memory stays linear in L.

    Returns:
        [B, L] float32; sums to 1.
    """
    query, key = query.detach(), key.detach()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    key = key.float().transpose(2, 3)
    if rows == "cls":
        return (query[:, :, :1].float() @ key * scaling).softmax(dim=-1).mean(dim=1)[:, 0]
    total = torch.zeros(query.shape[0], query.shape[2], device=query.device)
    for chunk in query.split(CHUNK, dim=2):
        total += (chunk.float() @ key * scaling).softmax(dim=-1).sum(dim=2).mean(dim=1)
    return total / query.shape[2]


class Tap:
    """Records rows of one attention layer; `rows_seen` holds a [B, L] tensor a forward.

    A tap belongs to the thread that made it: what other threads run through the same layer
    meanwhile is not recorded.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows: Rows = rows
        self.rows_seen: list[Tensor] = []
        self.thread = threading.get_ident()

    @property
    def here(self) -> bool:
        """Whether the running thread is the tap's own."""
        return threading.get_ident() == self.thread

    def see(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Take the rows out of one attention call of the tap's own thread."""
        if not self.here:
            return
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        self.rows_seen.append(attention_rows(query, key, scaling, self.rows))


@contextmanager
def tapped(layer: nn.Module, tap: Tap) -> Iterator[None]:
    """Record with `tap` whenever `layer` (an encoder or decoder layer) runs.

    The dispatcher is in place only while the layer's own forward runs, so that other layers,
    models and threads keep the plain function. Everything is undone on exit and on error.

    Raises:
        LookupError: the layer holds no attention that goes through Transformers' registry.
    """
    module = attention_of(layer)
    entered: list[AbstractContextManager[None]] = []

    # Other threads run these hooks too, and must not take the dispatcher away from this one.
    def before(*_: Any) -> None:
        if tap.here:
            watch = watching(module, tap)
            watch.__enter__()
            entered.append(watch)

    def after(*_: Any) -> None:
        if tap.here and entered:
            entered.pop().__exit__(None, None, None)

    handles = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while entered:
            entered.pop().__exit__(None, None, None)
