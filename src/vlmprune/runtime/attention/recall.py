"""Attention of a decode step to all text and to the few visual tokens that each KV head reads.

The visual tokens are scored on the sketch of their keys, chosen, and fetched; the query attends to
them and to text and later tokens, and the two results are merged by log-sum-exp.
`recall_triton` is loaded only where it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import ragged, recall_cpu
from vlmprune.runtime.attention.recalled import Recalled
from vlmprune.select import recall

Pair = tuple[Tensor, Tensor]
BACKENDS = ("reference", "cpu", "triton")


@dataclass(frozen=True, eq=False)
class Read:
    """What a step read of the visual tokens in one layer.

    Attributes:
        index: [B, H, k] int64 places of what was read; None for everything.
        seen: [B, 1, k] bool; False where a sample reads fewer; None where none does.
    """

    index: Tensor | None = None
    seen: Tensor | None = None

    def places(self, recalled: Recalled, heads: int) -> Tensor:
        """[B, H, k] int64 places of what was read, -1 where a head read fewer."""
        if self.index is None:
            every = torch.arange(recalled.images.shape[1], device=recalled.images.device)
            return torch.where(recalled.real, every, -1)[:, None].expand(-1, heads, -1)
        return self.index if self.seen is None else self.index.masked_fill(~self.seen, -1)

    def mask(self, recalled: Recalled, heads: int) -> Tensor:
        """[B, H, V] bool: which tokens were read."""
        real = recalled.real[:, None].expand(-1, heads, -1)
        if self.index is None:
            return real
        taken = torch.ones_like(self.index, dtype=torch.bool)
        if self.seen is not None:
            taken = taken & self.seen
        out = torch.zeros_like(real, dtype=torch.uint8)
        # What is not seen may name a place that is: the larger value stays.
        out = out.scatter_reduce(2, self.index, taken.to(torch.uint8), "amax")
        return out.bool() & real


def attend(
    call: AttentionCall, recalled: Recalled, whole: bool = False, backend: str = "auto"
) -> tuple[Tensor, Read]:
    """Attention of queries [B, Hq, Q, D] to visual tokens, and to text and what came later.

    Args:
        call: keys [B, H, T, D] and values [B, H, T, Dv] are those of text and later tokens; its
            mask, None or in four dimensions, is as in `ragged.dense_partial`. More than one query
            reads every visual token.
        recalled: the visual tokens.
        whole: whether one query, too, reads every visual token.
        backend: "reference", plain and slow; "cpu", whose scores are products in whole numbers;
            "triton", on CUDA, two launches; "auto", the last of them that runs.

    Returns:
        [B, Hq, Q, Dv] in the query's dtype, and what was read.

    Raises:
        ValueError: the backend is unknown or cannot run this.
    """
    step = not whole and call.query.shape[2] == 1 and not recalled.all_read
    backend = choose_backend(call, recalled, backend) if step else choose_whole(backend)
    if backend == "triton":
        out, *places = _triton().attend(
            call.query, recalled, call.key, call.value, call.mask, call.scale
        )
        return out, Read(*places)
    plain = backend == "reference"
    rest = ragged.dense_partial(call.query, call.key, call.value, call.mask, call.scale, plain)
    if not step:
        read = Read()
        keys, values = recalled.store.whole()
        seen = None if recalled.full else recalled.real[:, None, None]
        visual = ragged.dense_partial(call.query, keys, values, seen, call.scale, plain)
    else:
        scores = score(call.query[:, :, 0], recalled, call.scale, backend)
        read, total = choose(scores, recalled, rest[1][:, :, 0], backend)
        assert read.index is not None
        if backend == "cpu":
            visual, taken = recall_cpu.attend(
                call.query, recalled.store, read.index, read.seen, call.scale
            )
        else:
            keys, values = recalled.store.fetch(read.index)
            seen = None if read.seen is None else read.seen[:, :, None]
            visual = ragged.dense_partial(call.query, keys, values, seen, call.scale, plain)
            taken = recall_cpu.summed(values, read.seen)
        if recalled.total is not None and total is not None:
            rest = ragged.merge(rest, unread(scores, total, recalled, read, recalled.total - taken))
    return ragged.merge(visual, rest)[0], read


def choose_backend(call: AttentionCall, recalled: Recalled, backend: str = "auto") -> str:
    """What a backend's name means for a step that reads some of the visual tokens.

    Raises:
        ValueError: the backend is unknown or cannot run this.
    """
    on_cpu = recalled.store.device.type == "cpu"
    if backend == "auto":
        if on_cpu:
            return "cpu"
        return "triton" if call.query.is_cuda and _triton_runs(call, recalled) else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"The backend must be one of {', '.join(BACKENDS)}, not {backend}.")
    if backend == "cpu" and not on_cpu:
        raise ValueError(f"cpu needs tokens on the CPU, not on {recalled.store.device}.")
    if backend == "triton" and not _triton_runs(call, recalled):
        raise ValueError("triton needs CUDA, a sketch on the device and a mask for all heads.")
    return backend


def choose_whole(backend: str) -> str:
    """The same where every visual token is read."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"The backend must be one of {', '.join(BACKENDS)}, not {backend}.")
    return "reference" if backend == "reference" else "cpu"


def score(query: Tensor, recalled: Recalled, scale: float, backend: str) -> Tensor:
    """[B, Hq, V] float32: guessed scaled products of a step's queries [B, Hq, D] and all keys."""
    if backend == "cpu" and recalled.sketch is not None:
        return recall_cpu.scores(recalled.sketch, query, scale)
    return recalled.scores(query, scale)


def choose(
    scores: Tensor, recalled: Recalled, beside: Tensor, backend: str = "reference"
) -> tuple[Read, Tensor | None]:
    """What each KV head reads at a step.

    Args:
        scores: [B, Hq, V] float32; guessed scaled products with all visual keys.
        recalled: the visual tokens.
        beside: [B, Hq] log of the sum of exponentials of text and later tokens.
        backend: as above, but for "auto".

    Returns:
        What is read, and the log of the sum of exponentials of all scores [B, Hq], where one token
        is to stand for the rest.
    """
    real = None if recalled.full else recalled.real
    heads, wanted = recalled.store.keys.shape[1], recalled.total is not None
    found, total = recall.standing(scores, real, heads, beside, wanted)
    largest = recall_cpu.largest if backend == "cpu" else None
    return Read(*recall.best(found, recalled.groups, largest)), total


def unread(scores: Tensor, total: Tensor, recalled: Recalled, read: Read, left: Tensor) -> Pair:
    """Attention of a step's queries to what it does not read, as to one token.

    Args:
        scores: as `choose` takes them.
        total: as it returns it.
        recalled: the visual tokens.
        read: what is read.
        left: [B, H, Dv] float32; the sum of the other values.

    Returns:
        The mean of these [B, Hq, 1, Dv] in the store's dtype, and the log of the sum of
        exponentials of their scores, [B, Hq, 1] float32; -inf where everything is read.
    """
    assert read.index is not None
    mean, lse = recall.remainder(scores, total, read.index, read.seen, recalled.unread, left)
    return mean[:, :, None].to(recalled.store.values.dtype), lse[..., None]


@lru_cache(maxsize=1)
def _triton() -> Any:
    try:
        from vlmprune.runtime.attention import recall_triton
    except Exception:  # A triton that does not fit the machine fails in many ways.
        return None
    return recall_triton


def _triton_runs(call: AttentionCall, recalled: Recalled) -> bool:
    if _triton() is None:
        return False
    return bool(_triton().runs(call.query, recalled, call.mask))
