"""The attention rows that a method asked for, without slow attention and without L × L.

SDPA and flash attention return no weights. A tap sees the queries and keys of one layer as the
attention function gets them (after projections, norms and rotary embedding), computes the
softmax of the wanted rows alone in float32, and passes the call on unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, attention_of
from vlmprune.hosts.decoder import states_of
from vlmprune.hosts.encoders import first_of
from vlmprune.hosts.towers import pooled_attention
from vlmprune.runtime.attention.interception import watching
from vlmprune.runtime.scope import OwnThread
from vlmprune.views.settings import TapRows

# Queries a chunk when every row is needed: the extra memory is heads × CHUNK × N.
CHUNK = 128


def attention_rows(
    query: Tensor, key: Tensor, scaling: float, rows: TapRows, mask: Tensor | None = None
) -> Tensor:
    """Post-softmax attention that each key gets, averaged over heads.

    Args:
        query: [B, H, L, D].
        key: [B, H', L, D], H' a divisor of H.
        scaling: factor of the dot products.
        rows: "cls", the row of query 0; "last", that of the last query, for towers that put
            their CLS token there; "received", the mean over the queries that see the key,
            computed in chunks so that memory stays linear in L.
        mask: None, [B, L] of which 0 is padding, or [B or 1, 1 or H, L or 1, L], bool (True is
            seen) or additive. A token that no query sees is padding: it receives 0, and its own
            query does not count.

    Returns:
        [B, L] float32; sums to 1 where all see all.
    """
    query, key = query.detach(), key.detach()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    key = key.float().transpose(2, 3)
    start = query.shape[2] - 1 if rows == "last" else 0
    stop = start + 1 if rows == "cls" else query.shape[2]
    total = torch.zeros(query.shape[0], query.shape[2], device=query.device)
    seen_by = torch.zeros_like(total)
    for _, weights, seen in _weights(query, key, scaling, start, stop, mask):
        total += weights.sum(dim=2).mean(dim=1)
        seen_by += weights.shape[2] if seen is None else seen.mean(dim=1).sum(dim=1)
    return total / seen_by.clamp(min=1)


def patch_attention(
    query: Tensor, key: Tensor, scaling: float, cls: int | None, mask: Tensor | None = None
) -> Tensor:
    """Attention among patches alone, by what each gets and what each gives, averaged over heads.

    Nothing is renormalised: what patches pay to a CLS token is missing from the sums. Computed in
    chunks of queries, so that memory stays linear in L.

    Args:
        query: [B, H, L, D].
        key: [B, H', L, D], H' a divisor of H.
        scaling: factor of the dot products.
        cls: place of the CLS token, 0 or -1, which counts neither as query nor as key; None.
        mask: as in `attention_rows`.

    Returns:
        [B, L, 2] float32; means over the patches that see one (columns), and over those that it
        sees (rows). 0 for the CLS token and for padding.
    """
    query, key = query.detach(), key.detach()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    key = key.float().transpose(2, 3)
    first, end = int(cls == 0), query.shape[2] - int(cls == -1)
    received = torch.zeros(query.shape[0], query.shape[2], device=query.device)
    given, seen_by = torch.zeros_like(received), torch.zeros_like(received)
    for start, weights, seen in _weights(query, key, scaling, first, end, mask):
        rows = slice(start, start + weights.shape[2])
        among = weights[..., first:end]
        received[:, first:end] += among.sum(dim=2).mean(dim=1)
        if seen is None:
            seen_by += weights.shape[2]
            given[:, rows] = among.mean(dim=3).mean(dim=1)
        else:
            counts = seen[..., first:end].sum(dim=3)
            seen_by += seen.mean(dim=1).sum(dim=1)
            given[:, rows] = (among.sum(dim=3) / counts.clamp(min=1)).mean(dim=1)
    return torch.stack((received / seen_by.clamp(min=1), given), dim=-1)


def _weights(
    query: Tensor, key: Tensor, scaling: float, start: int, stop: int, mask: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Rows `start` to `stop` of the attention matrix, a chunk at a time.

    Args:
        query: [B, H, L, D].
        key: [B, H, D, L] float32.
        scaling: factor of the dot products.
        start: first query.
        stop: query behind the last.
        mask: as in `attention_rows`.

    Yields:
        The chunk's first query, its weights [B, H, n, L], and 1 where a query sees a key, of the
        same shape; None where all see all.
    """
    real = None
    if mask is not None:
        mask = mask.detach()[:, None, None].bool() if mask.ndim == 2 else mask.detach()
        mask = mask.expand(-1, -1, query.shape[2], -1)
        real = _seen(mask).flatten(1, 2).any(dim=1)
    for chunk in query[:, :, start:stop].split(CHUNK, dim=2):
        scores = chunk.float() @ key * scaling
        end = start + chunk.shape[2]
        if mask is None:
            yield start, scores.softmax(dim=-1), None
        else:
            assert real is not None
            seen = _seen(mask[:, :, start:end]) & real[:, None, start:end, None]
            added = scores if mask.dtype == torch.bool else scores + mask[:, :, start:end].float()
            weights = added.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num()
            yield start, weights, seen.expand(-1, scores.shape[1], -1, -1).float()
        start = end


def _seen(mask: Tensor) -> Tensor:
    """A mask as bool, True where a query sees a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


class Tap:
    """Records rows of one attention layer; `rows_seen` holds a [B, L] tensor a forward.

    A subclass may look at something else, with one row a token.

    A tap belongs to the thread that made it: what other threads run through the same layer
    meanwhile is not recorded.
    """

    # A tower's tokens see one another unless a mask hides them.
    causal, whole = False, True

    def __init__(self, rows: TapRows) -> None:
        self.rows: TapRows = rows
        self.rows_seen: list[Tensor] = []
        # How many queries were seen in the layer's present run.
        self.tokens = 0
        self.thread = OwnThread()

    @property
    def here(self) -> bool:
        """Whether the running thread is the tap's own."""
        return self.thread.runs

    def see(self, call: AttentionCall) -> None:
        """Take the rows out of one attention call of the tap's own thread."""
        if not self.here:
            return
        mask = call.mask if isinstance(call.mask, Tensor) else None
        ends = call.ends
        self.tokens += call.query.shape[0] * call.query.shape[2]
        # What is looked at is a mean over heads, of which another process may have some.
        mean = call.sharing.mean
        if ends is None:
            self.rows_seen.append(mean(self.look(call.query, call.key, call.scale, mask)))
            return
        # Flash attention gets several images packed into one sequence.
        lengths = (ends[1:] - ends[:-1]).tolist()
        parts = (call.query.split(lengths, dim=2), call.key.split(lengths, dim=2))
        for query, key in zip(*parts, strict=True):
            self.rows_seen.append(mean(self.look(query, key, call.scale, None)))

    def look(self, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        """What is recorded of one call: a mean over the heads that are there."""
        return attention_rows(query, key, scaling, self.rows, mask)


class PatchTap(Tap):
    """Records attention among patches, [B, L, 2] a forward, as `patch_attention` has it."""

    def __init__(self, cls: int | None) -> None:
        super().__init__("received")
        self.cls = cls

    def look(self, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        """What each patch gets and gives."""
        return patch_attention(query, key, scaling, self.cls, mask)


class KeyTap(Tap):
    """Records keys averaged over (KV) heads, [B, L, D] float32 a forward."""

    def __init__(self) -> None:
        super().__init__("received")

    def look(self, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        """The keys, as the attention function gets them."""
        return key.detach().float().mean(dim=1)


@contextmanager
def tapped(layer: nn.Module, tap: Tap) -> Iterator[None]:
    """Record with `tap` whenever `layer` (an encoder or decoder layer) runs.

    The dispatcher is in place only while the layer's own forward runs, so that other layers,
    models and threads keep the plain function. Everything is undone on exit and on error.

    Raises:
        LookupError: the layer holds no attention that goes through Transformers' registry.
    """
    module = attention_of(layer)
    entered, due = list[AbstractContextManager[None]](), list[int]()

    # Other threads run these hooks too, and must not take the dispatcher away from this one.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if tap.here:
            tap.tokens = 0
            due.append(first_of(args, kwargs)[..., 0].numel())
            watch = watching(module, tap)
            watch.__enter__()
            entered.append(watch)

    def after(module: nn.Module, _: Any, output: Any = None) -> None:
        if tap.here and entered:
            entered.pop().__exit__(None, None, None)
            wanted = due.pop()
            # Where it failed, its error is on its way.
            if output is not None and tap.tokens != wanted and contract.checks():
                raise contract.broken(
                    module,
                    f"{tap.tokens} of its {wanted} tokens attend through the attention registry",
                )

    hooks = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while entered:
            entered.pop().__exit__(None, None, None)


@contextmanager
def passing(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record what leaves an encoder layer, [B, L, C] a call in this thread, with gradients."""
    seen: list[Tensor] = []
    thread = OwnThread()

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if thread.runs:
            states = states_of(output)
            # A tower that packs all images into one sequence has no batch.
            seen.append(states if states.ndim == 3 else states[None])

    hook = layer.register_forward_hook(after)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def pooling(head: Any, tap: Tap) -> Iterator[None]:
    """Record with `tap` what the query of a pooling head attends to, averaged over heads.

    Args:
        head: as `hosts.towers.pooling_head` finds it, called with hidden states [B, N, C].
        tap: gets [B, N] float32 a call.
    """

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        if tap.here:
            tap.rows_seen.append(pooled_attention(head, args[0]))

    hook = head.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
