"""What a step chooses by, and chooses, on the CPU.

Torch has a product of int8 matrices that runs at the speed of memory (`torch._int_mm`); its
packed products of 4-bit weights do so in bfloat16 alone, and would round the scores to 8 bits,
among which hundreds of tokens are alike. So each value of a query becomes a few signed bytes, a
number with as many digits, and the codes need not be taken apart: the bytes of a sketch are
numbers themselves, and so is what a mask leaves of their lower bits. A code is the difference of
two of these, shifted, so that the product with it is a sum of products with them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmprune.runtime.attention import ragged
from vlmprune.runtime.attention.recalled import Store
from vlmprune.select import recall
from vlmprune.select.recall import Groups
from vlmprune.select.sketch import Sketch

# Digits of a query's values: these have as many bits as float32.
_DIGITS = 3
_MOST = 127.0
# What is left of a digit is half at most, so that it never exceeds the largest digit.
_BASE = 2 * _MOST
# Torch's product is wrong where one value is all that it sums (2.13).
_LEAST_WIDTH = 2
# Bytes that are fetched at a time: measured, attention to them then finds them in the cache.
_AT_ONCE = 3 * 2**19
# What the bytes of codes are less in int8.
_LESS = 128.0


def scores(sketch: Sketch, query: Tensor, scale: float) -> Tensor:
    """Guesses of a query's products with the keys, as `Sketch.scores` has them.

    Args:
        sketch: with codes in int8.
        query: [B, Hq, D], Hq a multiple of H.
        scale: factor of the products.

    Returns:
        [B, Hq, V] float32.
    """
    batch, heads, tokens, width = sketch.codes.shape
    if width < _LEAST_WIDTH:
        return sketch.scores(query, scale)
    places = 8 // sketch.bits
    asked = query.float().view(batch, heads, -1, sketch.width) * scale
    group = asked.shape[2]
    # Of codes, not of keys: [B · H, places, G, W], a channel where its code is.
    wanted = torch.nn.functional.pad(
        asked * sketch.channel[:, :, None], (0, places * width - sketch.width)
    )
    wanted = wanted.view(-1, group, places, width).transpose(1, 2)
    # Of what masks leave: code i is (lower i + 1 codes - lower i codes) / 2 ** (bits * i).
    unit = 2.0 ** -(sketch.bits * torch.arange(places, device=query.device))
    given = wanted * unit.view(-1, 1, 1)
    given = torch.cat((given[:, :-1] - given[:, 1:], given[:, -1:]), dim=1)
    digits, factors = _digits(given)
    # What codes are more than levels, and bytes less than codes.
    offset = _LESS * given[:, -1].sum(dim=2) - (2**sketch.bits - 1) / 2 * wanted.sum(dim=(1, 3))

    whole = torch.empty(*digits.shape[1:3], tokens, dtype=torch.int32, device=query.device)
    parts = torch.empty(whole.shape, device=query.device)
    row = parts.view(places * _DIGITS, group * tokens)
    left = torch.empty(tokens, width, dtype=torch.int8, device=query.device)
    out = offset[..., None].repeat(1, 1, tokens)
    flat, flat_out = sketch.codes.view(-1, tokens, width), out.view(-1, 1, group * tokens)
    masks = [2 ** (sketch.bits * place) - 1 for place in range(1, places)]
    # Head by head, so that what lies between is still in the processor's cache.
    for codes, own, factor, to in zip(flat, digits, factors, flat_out, strict=True):
        for place, mask in enumerate(masks):
            torch.bitwise_and(codes, mask, out=left)
            torch._int_mm(own[place], left.t(), out=whole[place])
        torch._int_mm(own[-1], codes.t(), out=whole[-1])
        parts.copy_(whole)
        to.addmm_(factor, row)
    beside = (asked * sketch.mean[:, :, None]).sum(dim=3, keepdim=True)
    out = out.view(batch, heads, group, tokens)
    step = sketch.scale[:, :, None].float()
    return torch.addcmul(beside, out, step, out=out).flatten(1, 2)


def _digits(given: Tensor) -> tuple[Tensor, Tensor]:
    """Values [R, places, G, W] in signed bytes.

    Returns:
        Digits [R, places, digits · G, W] int8; and what one of each is worth,
        [R, 1, places · digits].
    """
    peak = given.abs().amax(dim=(2, 3), keepdim=True)
    left = given * (_MOST / torch.where(peak > 0, peak, 1.0))
    digits = []
    for _ in range(_DIGITS):
        digits.append(left.round())
        left = (left - digits[-1]) * _BASE
    worth = _BASE ** -torch.arange(_DIGITS, device=given.device)
    factors = (peak[:, :, 0] / _MOST * worth).flatten(1)[:, None]
    return torch.stack(digits, dim=2).to(torch.int8).flatten(2, 3), factors


def largest(rows: Tensor, groups: Groups) -> Tensor:
    """What `recall.in_order` finds; not in order where all images are read alike."""
    least_place = groups.shape[1] - groups.most
    if not groups.even or not least_place or not rows.numel():
        return recall.in_order(rows, groups)
    # NumPy's choice compares many numbers at once: measured, it takes a fifth of torch's time.
    order = torch.from_numpy(np.argpartition(rows.numpy(), least_place, axis=3))[..., least_place:]
    least = rows.gather(3, order[..., :1])
    if int((rows >= least).sum()) > order.numel():
        return recall.in_order(rows, groups)
    return order


def attend(
    query: Tensor, store: Store, index: Tensor, seen: Tensor | None, scale: float
) -> tuple[ragged.Pair, Tensor]:
    """Attention of a step's queries [B, Hq, 1, D] to some tokens of each KV head.

    Args:
        query: as above.
        store: of all tokens.
        index: [B, H, k] int64; which.
        seen: [B, 1, k] bool; False where a sample reads fewer; None where none does.
        scale: factor of the products.

    Returns:
        What `ragged.partial` does, and the sum of the values that are read, [B, H, Dv] float32.
    """
    batch, heads, count = index.shape
    rows = query.reshape(batch * heads, -1, 1, query.shape[3])
    if seen is not None:
        seen = seen.expand(-1, heads, -1).reshape(batch * heads, 1, 1, count)
    places = store.places(index)
    many = max(1, _AT_ONCE // max(1, count * store.token_bytes))
    found, taken = [], []
    for first in range(0, batch * heads, many):
        part = slice(first, first + many)
        keys, values = store.rows(places[part])
        mask = None if seen is None else seen[part]
        found.append(ragged.dense_partial(rows[part], keys[:, None], values[:, None], mask, scale))
        taken.append(summed(values, None if mask is None else mask[:, 0, 0]))
    out, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
    pair = out.view(*query.shape[:3], -1), lse.view(query.shape[:3])
    return pair, torch.cat(taken).view(batch, heads, -1)


def summed(values: Tensor, seen: Tensor | None) -> Tensor:
    """[..., Dv] float32: the sum of values [..., k, Dv], of those that are seen [..., k]."""
    # In half precision a sum of many would be rounded, or overflow.
    given = values.float()
    weights = given.new_ones(given.shape[:-1]) if seen is None else seen.float()
    return (weights.expand(given.shape[:-1])[..., None, :] @ given)[..., 0, :]
