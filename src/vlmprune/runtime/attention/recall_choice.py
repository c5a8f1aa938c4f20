# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803
"""What a program of `recall_kernels.read` chooses among the tokens of an image, and by what.

Sizes in the comments are those of `recall_kernels`; n tokens of an image, as many as a program has
room for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _total(lse, count, COLUMNS: tl.constexpr):
    """Log of the sum of exponentials, of base 2, of the first `count` of a row."""
    c = tl.arange(0, COLUMNS)
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    for at in range(0, count, COLUMNS):
        one = tl.load(lse + at + c, mask=at + c < count, other=float("-inf"))
        larger = tl.maximum(top, one)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        top = base + tl.log2(tl.exp2(top - base) + tl.exp2(one - base))
    largest = tl.max(top, axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return base + tl.log2(tl.sum(tl.exp2(top - base), axis=0))


@triton.jit
def weighed(
    guesses,  # [G, V] float32, base 2, of one KV head
    lse,  # [G, columns] float32, base 2, of the same
    place,  # [n] int32, tokens among V
    live,  # [n] bool
    V,
    G,
    columns,
    parts,  # columns that count
    IMAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALONE: tl.constexpr,
):
    """[n] float32; the mean attention of query heads to each token, or the scores of one."""
    if ALONE:
        # One query head's weights have the order of its scores.
        by = tl.load(guesses + place, mask=live, other=float("-inf"))
    else:
        by = tl.zeros([IMAGE], tl.float32)
        for g in range(0, G):
            total = _total(lse + g * columns, parts, COLUMNS)
            guess = tl.load(guesses + g * V + place, mask=live, other=float("-inf"))
            by += tl.where(live, tl.exp2(guess - total), 0.0)
        by = by / G
    return by


@triton.jit
def chosen(found, live, budget):
    """Which of some floats are the `budget` largest, ties to the lower place.

    Bits of a float make an integer of the same order, those of a negative one turned. The least
    that is chosen is built from the highest bit down: a bit is set where enough are as large.
    """
    # Sums that start from zero are never its negative, which would be lower than it is.
    bits = found.to(tl.int32, bitcast=True)
    bits = tl.where(live, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)
    enough = tl.sum((bits >= 0).to(tl.int32), axis=0) >= budget
    least = tl.where(enough, 0, -2147483648)
    for place in tl.static_range(31):
        larger = least | (1 << (30 - place))
        enough = tl.sum((bits >= larger).to(tl.int32), axis=0) >= budget
        least = tl.where(enough, larger, least)
    above = live & (bits > least)
    equal = (live & (bits == least)).to(tl.int32)
    left = budget - tl.sum(above.to(tl.int32), axis=0)
    # How many equal ones stand before each.
    before = tl.cumsum(equal, axis=0) - equal
    return above | ((equal != 0) & (before < left))


@triton.jit
def remaining(
    guesses,  # [G, V] float32, base 2, of one KV head
    place,  # [n] int32, tokens among V
    left,  # [n] bool; which are not read
    out,  # [G] float32
    V,
    G,
    first,
    splits,
):
    """Log of the sum of exponentials, of base 2, of what is not read; -inf where all is.

    The programs of an image share its query heads: this one has every `splits`-th from `first`.
    """
    for g in range(first, G, splits):
        guess = tl.load(guesses + g * V + place, mask=left, other=float("-inf"))
        top = tl.max(guess, axis=0)
        base = tl.where(top == float("-inf"), 0.0, top)
        tl.store(out + g, base + tl.log2(tl.sum(tl.exp2(guess - base), axis=0)))
