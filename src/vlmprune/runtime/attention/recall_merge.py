# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803
"""How the last program of `recall_kernels.read` makes one result of what all programs found.

Sizes in the comments are those of `recall_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def others(
    every,  # [DV] float32
    sums,  # [parts, DV] float32
    shares,  # [I, G] float32, base 2
    tokens,  # [I] int64
    keep,  # [I] int64
    parts,
    count,
    G,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE_V: tl.constexpr,
):
    """What one KV head does not read, as one token: top, total and sum of a running softmax."""
    g = tl.arange(0, ROWS)
    dv = tl.arange(0, WIDE_V)
    taken = tl.zeros([WIDE_V], tl.float32)
    for part in range(0, parts):
        # Of other programs: not from this processor's own cache.
        at = sums + part * DV + dv
        taken += tl.load(at, mask=dv < DV, other=0.0, cache_modifier=".cg")
    unread = 0
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i in range(0, count):
        unread += (tl.load(tokens + i) - tl.load(keep + i)).to(tl.int32)
        at = shares + i * G + g
        one = tl.load(at, mask=g < G, other=float("-inf"), cache_modifier=".cg")
        larger = tl.maximum(top, one)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        top = base + tl.log2(tl.exp2(top - base) + tl.exp2(one - base))
    left = tl.load(every + dv, mask=dv < DV, other=0.0) - taken
    # Where nothing is left, the difference is that of rounding alone.
    some = top > float("-inf")
    mean = left / tl.maximum(unread, 1).to(tl.float32)
    return top, some.to(tl.float32), tl.where(some[:, None], mean[None, :], 0.0)


@triton.jit
def merge(
    out,  # [parts, G, DV] float32
    lse,  # [G, columns] float32, base 2, at the first part
    merged,  # [G, DV]
    top,  # of a running softmax that goes on here, as total and acc
    total,
    acc,
    parts,
    columns,
    G,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE_V: tl.constexpr,
):
    """One result of all that was found of one KV head, and of what stands; 0 of nothing."""
    g = tl.arange(0, ROWS)
    dv = tl.arange(0, WIDE_V)
    seen = (g[:, None] < G) & (dv[None, :] < DV)
    place = g[:, None] * DV + dv[None, :]
    for part in range(0, parts):
        # Of other programs, as above.
        log = lse + g * columns + part
        one = tl.load(log, mask=g < G, other=float("-inf"), cache_modifier=".cg")
        found = tl.load(out + part * G * DV + place, mask=seen, other=0.0, cache_modifier=".cg")
        new = tl.maximum(top, one)
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(one - base)
        kept = tl.exp2(top - base)
        acc = acc * kept[:, None] + found * weight[:, None]
        total = total * kept + weight
        top = new
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(merged + place, result.to(merged.dtype.element_ty), mask=seen)
