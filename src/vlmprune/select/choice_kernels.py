# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803
"""The kernels of `choice_triton`: whole choices, one crop a program.

Sizes in the comments: B crops, N visual tokens of each, K of them kept. WIDE is a power of 2 of at
least N, BLOCK the other side of a tile. Of equal values the lower index comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What no finite number lies below, and the last number above it.
LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _bits(value):
    """int32 numbers in the order of float32 values; -0.0 counts as 0.0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _first_max(value, n, N):
    """Number of the largest value, of equals the lowest."""
    top = tl.max(value, axis=0)
    return tl.minimum(tl.min(tl.where(value == top, n, N), axis=0), N - 1)


@triton.jit
def _listed(taken, n, kept):
    """Write the numbers of what is taken, ascending."""
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(kept + place, n.to(tl.int64), mask=taken)


@triton.jit(do_not_specialize=["N", "keep", "important", "ROUND"])
def thin(
    attention,  # [B, N] float32
    similarity,  # [B, N, N] float32, symmetric
    lists,  # [B, 2, N] int32, to work in
    closest,  # [B, N] int32, to work in
    stays,  # [B, N] int8, to work in
    kept,  # [B, K] int64
    N,
    keep,
    important,
    ROUND,
    WIDE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """VisPruner's choice: the most attended, then rounds that drop the closest duplicates.

    HALF is a power of 2 of at least half of what is not important, rounded up.
    """
    b = tl.program_id(0).to(tl.int64)
    attention += b * N
    similarity += b * N * N
    lists += b * 2 * N
    closest += b * N
    stays += b * N
    n = tl.arange(0, WIDE)
    j = tl.arange(0, BLOCK)
    there = n < N
    own = _bits(tl.load(attention + n, mask=there, other=0.0))
    place = tl.zeros([WIDE], tl.int32)
    for start in range(0, N, BLOCK):
        m = start + j
        other = _bits(tl.load(attention + m, mask=m < N, other=0.0))
        before = (other[None, :] > own[:, None]) | (
            (other[None, :] == own[:, None]) & (m[None, :] < n[:, None])
        )
        place += tl.sum((before & (m[None, :] < N)).to(tl.int32), axis=1)
    tl.store(stays + n, (place < important).to(tl.int8), mask=there)
    tl.store(lists + place - important, n, mask=there & (place >= important))
    tl.debug_barrier()

    length = N - important
    left = keep - important
    at = 0
    i = tl.arange(0, HALF)
    while length > left:
        evens = (length + 1) // 2
        odds = length // 2
        drop = tl.minimum(tl.minimum(ROUND, length - left), evens)
        now = lists + at * N
        even = tl.load(now + 2 * i, mask=i < evens, other=0)
        best = tl.full([HALF], -2147483648, tl.int32)
        for start in range(0, odds, BLOCK):
            o = start + j
            odd = tl.load(now + 2 * o + 1, mask=o < odds, other=0)
            pair = (i[:, None] < evens) & (o[None, :] < odds)
            # The matrix is symmetric; a row of it for each odd token.
            cosine = tl.load(
                similarity + odd[None, :].to(tl.int64) * N + even[:, None], mask=pair, other=0.0
            )
            found = tl.where(pair, _bits(cosine), -2147483648)
            best = tl.maximum(best, tl.max(found, axis=1))
        tl.store(closest + i, best, mask=i < evens)
        tl.debug_barrier()
        rank = tl.zeros([HALF], tl.int32)
        for start in range(0, evens, BLOCK):
            o = start + j
            token = tl.load(now + 2 * o, mask=o < evens, other=0)
            other = tl.load(closest + o, mask=o < evens, other=0)
            before = (other[None, :] > best[:, None]) | (
                (other[None, :] == best[:, None]) & (token[None, :] < even[:, None])
            )
            rank += tl.sum((before & (o[None, :] < evens)).to(tl.int32), axis=1)
        following = lists + (1 - at) * N
        tl.store(following + rank - drop, even, mask=(i < evens) & (rank >= drop))
        odd = tl.load(now + 2 * i + 1, mask=i < odds, other=0)
        tl.store(following + evens - drop + i, odd, mask=i < odds)
        tl.debug_barrier()
        length -= drop
        at = 1 - at
    token = tl.load(lists + at * N + n, mask=n < left, other=0)
    tl.store(stays + token, tl.full([WIDE], 1, tl.int8), mask=n < left)
    tl.debug_barrier()
    _listed(tl.load(stays + n, mask=there, other=0) != 0, n, kept + b * keep)


@triton.jit(do_not_specialize=["N", "keep"])
def spread(
    similarity,  # [B, N, N] float32
    kept,  # [B, K] int64
    N,
    keep,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DivPrune's choice: each next token is the one farthest from all chosen so far."""
    b = tl.program_id(0).to(tl.int64)
    similarity += b * N * N
    n = tl.arange(0, WIDE)
    j = tl.arange(0, BLOCK)
    there = n < N
    nearest = tl.full([WIDE], float("-inf"), tl.float32)
    for start in range(0, N, BLOCK):
        m = start + j
        pair = there[:, None] & (m[None, :] < N) & (m[None, :] != n[:, None])
        cosine = tl.load(
            similarity + m[None, :].to(tl.int64) * N + n[:, None], mask=pair, other=float("-inf")
        )
        nearest = tl.maximum(nearest, tl.max(cosine, axis=1))
    newest = _first_max(tl.where(there, -nearest, float("-inf")), n, N)
    # The distance to the nearest chosen token; chosen ones are ruled out for good.
    distance = tl.where(there, float("inf"), float("-inf"))
    taken = n == newest
    for _ in range(1, keep):
        row = tl.load(similarity + newest.to(tl.int64) * N + n, mask=there, other=0.0)
        distance = tl.where(taken, float("-inf"), tl.minimum(distance, 1.0 - row))
        newest = _first_max(distance, n, N)
        taken = taken | (n == newest)
    _listed(taken & there, n, kept + b * keep)


@triton.jit(do_not_specialize=["N", "keep"])
def explain(
    similarity,  # [B, N, N] float32
    relevance,  # [B, N] float32
    rows,  # [B, K, N] float32, to work in: the part of each kernel row that is explained
    kept,  # [B, K] int64
    N,
    keep,
    WIDE: tl.constexpr,
):
    """CDPruner's choice: greedy MAP of a determinantal point process, weighted by relevance."""
    b = tl.program_id(0).to(tl.int64)
    similarity += b * N * N
    rows += b * keep * N
    n = tl.arange(0, WIDE)
    there = n < N
    weight = tl.load(relevance + b * N + n, mask=there, other=0.0)
    # What each token would add.
    gain = weight * tl.load(similarity + n.to(tl.int64) * N + n, mask=there, other=0.0) * weight
    gain = tl.where(there, gain, float("-inf"))
    taken = n < 0
    for step in range(0, keep):
        newest = _first_max(gain, n, N)
        own = tl.load(relevance + b * N + newest)
        left = tl.max(tl.where(n == newest, gain, float("-inf")), axis=0)
        row = tl.load(similarity + newest.to(tl.int64) * N + n, mask=there, other=0.0)
        row = own * row * weight
        known = tl.zeros([WIDE], tl.float32)
        for earlier in range(0, step):
            before = rows + earlier * N
            known += tl.load(before + newest) * tl.load(before + n, mask=there, other=0.0)
        row = row - known
        # Where rounding is all that is left to explain, dividing by it would only blow it up.
        enough = left > 1e-20
        row = tl.where(enough, row / tl.sqrt(tl.where(enough, left, 1.0)), 0.0)
        tl.store(rows + step * N + n, row, mask=there)
        tl.debug_barrier()
        taken = taken | (n == newest)
        # Tokens chosen before stay below every other, however little another would add.
        gain = tl.maximum(gain - row * row, LEAST)
        gain = tl.where(taken | (n >= N), float("-inf"), gain)
    _listed(taken & there, n, kept + b * keep)
