"""The attention rows that a method asked for, without slow attention and without L × L.

SDPA and flash attention return no weights. A tap sees the queries and keys of one layer as the
attention function gets them (after projections, norms and rotary embedding), computes the
softmax of the wanted rows alone in float32, and passes the call on unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import contract, masks
from vlmprune.hosts.attention import AttentionCall, attention_of
from vlmprune.hosts.decoder import states_of
from vlmprune.hosts.encoders import first_of
from vlmprune.hosts.towers import pooled_attention
from vlmprune.runtime.attention.interception import Proceed, intercepting
from vlmprune.runtime.hooks import Hooks
from vlmprune.views.settings import TapRows

# Queries a chunk when every row is needed: the extra memory is heads × CHUNK × N.
CHUNK = 128


def attention_rows(call: AttentionCall, rows: TapRows) -> Tensor:
    """Post-softmax attention that each key gets, averaged over heads.

    Args:
        call: of a tower, whose tokens see one another unless a mask hides them; of as many queries
            as keys, L. A token that no query sees is padding: it receives 0, and its own query
            does not count.
        rows: "cls", the row of query 0; "last", that of the last query, for towers that put
            their CLS token there; "received", the mean over the queries that see the key,
            computed in chunks so that memory stays linear in L.

    Returns:
        [B, L] float32; sums to 1 where all see all.
    """
    batch, _, length, _ = call.query.shape
    start = length - 1 if rows == "last" else 0
    stop = start + 1 if rows == "cls" else length
    total = torch.zeros(batch, length, device=call.query.device)
    seen_by = torch.zeros_like(total)
    for _, weights, seen in _weights(call, start, stop):
        total += weights.sum(dim=2).mean(dim=1)
        seen_by += weights.shape[2] if seen is None else seen.mean(dim=1).sum(dim=1)
    return total / seen_by.clamp(min=1)


def patch_attention(call: AttentionCall, cls: int | None) -> Tensor:
    """Attention among patches alone, by what each gets and what each gives, averaged over heads.

    Nothing is renormalised: what patches pay to a CLS token is missing from the sums. Computed in
    chunks of queries, so that memory stays linear in L.

    Args:
        call: as in `attention_rows`.
        cls: place of the CLS token, 0 or -1, which counts neither as query nor as key; None.

    Returns:
        [B, L, 2] float32; means over the patches that see one (columns), and over those that it
        sees (rows). 0 for the CLS token and for padding.
    """
    batch, _, length, _ = call.query.shape
    first, end = int(cls == 0), length - int(cls == -1)
    received = torch.zeros(batch, length, device=call.query.device)
    given, seen_by = torch.zeros_like(received), torch.zeros_like(received)
    for start, weights, seen in _weights(call, first, end):
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
    call: AttentionCall, start: int, stop: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Queries `start` to before `stop` of the attention matrix, a chunk at a time.

    Yields:
        The chunk's first query, its weights [B, H, n, L], and 1 where a query sees a key, of the
        same shape; None where all see all.
    """
    mask = call.mask if isinstance(call.mask, Tensor) else None
    # Keys as they are needed, once for all chunks.
    call = replace(call, key=call.key.detach().float(), mask=mask)
    _, heads, length, _ = call.query.shape
    numbers = torch.arange(length, device=call.query.device)[None]
    real = None if mask is None else masks.real(mask)
    for chunk in call.query.detach()[:, :, start:stop].split(CHUNK, dim=2):
        end = start + chunk.shape[2]
        if real is None:
            yield start, call.weights(chunk, None), None
        else:
            own = numbers[:, start:end]
            lines = masks.hidden(call.lines(own, causal=False), real[:, None, start:end, None])
            seen = masks.visible(lines).expand(-1, heads, -1, -1).float()
            yield start, call.weights(chunk, lines).nan_to_num(), seen
        start = end


class Tap:
    """Records rows of one attention layer; `rows_seen` holds a [B, L] tensor a forward.

    A subclass may look at something else, with one row a token.
    """

    def __init__(self, rows: TapRows) -> None:
        self.rows: TapRows = rows
        self.rows_seen: list[Tensor] = []
        # How many queries were seen in the layer's present run.
        self.tokens = 0

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        """Take the rows out of one attention call."""
        result = contract.run(proceed, call, causal=False)
        self.see(call)
        return result

    def see(self, call: AttentionCall) -> None:
        """The same of a call that somebody else makes."""
        ends = call.ends
        self.tokens += call.query.shape[0] * call.query.shape[2]
        # What is looked at is a mean over heads, of which another process may have some.
        mean = call.sharing.mean
        if ends is None:
            self.rows_seen.append(mean(self.look(call)))
            return
        # Flash attention gets several images packed into one sequence.
        lengths = (ends[1:] - ends[:-1]).tolist()
        parts = (states.split(lengths, dim=2) for states in (call.query, call.key, call.value))
        for one in zip(*parts, strict=True):
            self.rows_seen.append(mean(self.look(call.alone(*one))))

    def look(self, call: AttentionCall) -> Tensor:
        """What is recorded of one call: a mean over the heads that are there."""
        return attention_rows(call, self.rows)


class PatchTap(Tap):
    """Records attention among patches, [B, L, 2] a forward, as `patch_attention` has it."""

    def __init__(self, cls: int | None) -> None:
        super().__init__("received")
        self.cls = cls

    def look(self, call: AttentionCall) -> Tensor:
        """What each patch gets and gives."""
        return patch_attention(call, self.cls)


class KeyTap(Tap):
    """Records keys averaged over (KV) heads, [B, L, D] float32 a forward."""

    def __init__(self) -> None:
        super().__init__("received")

    def look(self, call: AttentionCall) -> Tensor:
        """The keys, as the attention function gets them."""
        return call.key.detach().float().mean(dim=1)


class JoinedTap(Tap):
    """Records attention and keys of all heads as one, [B, L, 1 + H · D] float32 a forward.

    The first number of a token is the attention that it gets, the others are its key.
    """

    def look(self, call: AttentionCall) -> Tensor:
        """What each token gets, and its key."""
        one = call.of_one_head()
        keys = one.key.detach().float()[:, 0]
        return torch.cat((attention_rows(one, self.rows)[..., None], keys), dim=-1)


@contextmanager
def tapped(layer: nn.Module, tap: Tap) -> Iterator[None]:
    """Record with `tap` whenever `layer` (an encoder or decoder layer) runs in this thread.

    The dispatcher is in place only while the layer's own forward runs, so that other layers,
    models and threads keep the plain function. Everything is undone on exit and on error.

    Raises:
        LookupError: the layer holds no attention that goes through Transformers' registry.
    """
    entered, due = list[AbstractContextManager[None]](), list[int]()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap.tokens = 0
        due.append(first_of(args, kwargs)[..., 0].numel())
        entered.append(intercepting(tap, module))
        entered[-1].__enter__()

    def leave() -> None:
        while entered:
            entered.pop().__exit__(None, None, None)

    def after(module: nn.Module, _: Any, __: Any, output: Any) -> None:
        if not entered:
            return
        entered.pop().__exit__(None, None, None)
        wanted = due.pop()
        # Where it failed, its error is on its way.
        if output is not None and tap.tokens != wanted and contract.checks():
            raise contract.broken(
                module,
                f"{tap.tokens} of its {wanted} tokens attend through the attention registry",
            )

    module = attention_of(layer)
    with Hooks() as hooks:
        hooks.callback(leave)
        hooks.before(module, before)
        hooks.after(module, after, always=True)
        yield


@contextmanager
def passing(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record what leaves an encoder layer, [B, L, C] a call in this thread, with gradients."""
    seen: list[Tensor] = []

    def after(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        states = states_of(output)
        # A tower that packs all images into one sequence has no batch.
        seen.append(states if states.ndim == 3 else states[None])

    with Hooks() as hooks:
        hooks.after(layer, after)
        yield seen


@contextmanager
def pooling(head: Any, tap: Tap) -> Iterator[None]:
    """Record with `tap` what the query of a pooling head attends to, averaged over heads.

    Args:
        head: as `hosts.towers.pooling_head` finds it, called with hidden states [B, N, C].
        tap: gets [B, N] float32 a call.
    """

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap.rows_seen.append(pooled_attention(head, first_of(args, kwargs)))

    with Hooks() as hooks:
        hooks.before(head, look)
        yield
