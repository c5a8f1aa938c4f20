# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803
"""One decode step over a ragged KV cache on a GPU, reading each kept key and value once.

A program takes one chunk of one (sample, KV head) with all query heads of its group; the last
program of each takes the dense tail. A second kernel merges what they found. Nothing that
changes from step to step is compiled in.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.runtime.attention.ragged_tokens import Ragged

# Shorter chunks cost more in partial results than they gain in parallel work.
CHUNK = 128
# Programs wanted for each multiprocessor, so that memory is kept busy.
WAVES = 4
# Bytes of keys and values in flight in one program; fits the smallest shared memory in use.
STAGE = 32768

NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2


@triton.jit
def rows(query, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The queries [G, D] of one KV head as a block [ROWS, WIDE]."""
    g = tl.arange(0, ROWS)
    d = tl.arange(0, WIDE)
    seen = (g[:, None] < G) & (d[None, :] < D)
    return tl.load(query + g[:, None] * D + d[None, :], mask=seen, other=0.0)


@triton.jit
def attended(
    q,  # [ROWS, WIDE]
    keys,  # of one head, a row every key_row
    key_row,
    values,
    value_row,
    index,  # rows of keys and values, int64, where INDEXED
    start,
    end,
    mask,  # of one sample, an entry every mask_t, for the first `masked` rows
    mask_t,
    masked,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Attention to the keys from `start` to `end`: top, total and sum of a running softmax."""
    d = tl.arange(0, WIDE)
    dv = tl.arange(0, WIDE_V)
    n = tl.arange(0, BLOCK)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDE_V], tl.float32)
    for at in range(start, end, BLOCK):
        live = at + n < end
        row = tl.load(index + at + n, mask=live, other=0) if INDEXED else (at + n).to(tl.int64)
        k = tl.load(
            keys + row[:, None] * key_row + d[None, :],
            mask=live[:, None] & (d[None, :] < D),
            other=0.0,
        )
        v = tl.load(
            values + row[:, None] * value_row + dv[None, :],
            mask=live[:, None] & (dv[None, :] < DV),
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASK == 1:
            seen = tl.load(mask + row * mask_t, mask=at + n < masked, other=1)
            live = live & (seen != 0)
        if MASK == 2:
            added = tl.load(mask + row * mask_t, mask=at + n < masked, other=0.0)
            scores += added.to(tl.float32)[None, :] * 1.4426950408889634
        scores = tl.where(live[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        # Rows that saw nothing yet stay at -inf, and must not become NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(weights, axis=1)
        acc = acc * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new
    return top, total, acc


@triton.jit
def divided(top, total, acc):
    """What a running softmax found, and its log-sum-exp of base 2; 0 and -inf of nothing."""
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    return acc / divisor[:, None], tl.where(some, top + tl.log2(divisor), float("-inf"))


@triton.jit(do_not_specialize=["T", "splits", "chunk", "mask_b", "mask_t"])
def _split(
    query,  # [B * H, G, D]
    keys,  # [S, D]
    values,  # [S, DV]
    offsets,  # [B * H + 1]
    tail_keys,  # [B, H, T, D], strides below
    tail_values,  # [B, H, T, DV]
    mask,  # [B, T], strides below
    out,  # [B * H, splits + 1, G, DV] float32
    lse,  # [B * H, splits + 1, G] float32, base 2
    scale,  # with log2(e), as the exponentials are of base 2
    H,
    T,
    splits,
    chunk,
    key_b,
    key_h,
    key_t,
    value_b,
    value_h,
    value_t,
    mask_b,
    mask_t,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
):
    # 64 bits from here on, as the products below pass 2^31 in a large cache.
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = head // H
    h = head % H
    if split == splits:
        key_base = tail_keys + b * key_b + h * key_h
        value_base = tail_values + b * value_b + h * value_h
        key_row = key_t * 1
        value_row = value_t * 1
        start = T * 0
        end = T * 1
        masked = T * 1
    else:
        first = tl.load(offsets + head)
        key_base = keys + first.to(tl.int64) * D
        value_base = values + first.to(tl.int64) * DV
        key_row = D
        value_row = DV
        start = split * chunk
        end = tl.minimum(start + chunk, tl.load(offsets + head + 1) - first)
        masked = T * 0

    top, total, acc = attended(
        rows(query + head * G * D, G, D, ROWS, WIDE),
        key_base,
        key_row,
        value_base,
        value_row,
        offsets,
        start,
        end,
        mask + b * mask_b,
        mask_t,
        masked,
        scale,
        D,
        DV,
        ROWS,
        WIDE,
        WIDE_V,
        BLOCK,
        MASK,
        False,
    )
    found, log = divided(top, total, acc)
    g = tl.arange(0, ROWS)
    dv = tl.arange(0, WIDE_V)
    place = (head * (splits + 1) + split) * G + g
    tl.store(lse + place, log, mask=g < G)
    tl.store(
        out + place[:, None] * DV + dv[None, :],
        found,
        mask=(g[:, None] < G) & (dv[None, :] < DV),
    )


@triton.jit(do_not_specialize=["parts"])
def _merge(
    out,  # [B * H, parts, G, DV] float32
    lse,  # [B * H, parts, G] float32, base 2
    merged,  # [B * H, G, DV]
    parts,
    G: tl.constexpr,
    DV: tl.constexpr,
    WIDE_V: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    dv = tl.arange(0, WIDE_V)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([WIDE_V], tl.float32)
    for part in range(0, parts):
        place = (head * parts + part) * G + g
        one = tl.load(lse + place + tl.arange(0, 1))
        new = tl.maximum(top, one)
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(one - base)
        kept = tl.exp2(top - base)
        found = tl.load(out + place * DV + dv, mask=dv < DV, other=0.0)
        acc = acc * kept + found * weight
        total = total * kept + weight
        top = new
    result = acc / tl.where(total > 0, total, 1.0)
    place = merged + (head * G + g) * DV + dv
    tl.store(place, result.to(merged.dtype.element_ty), mask=dv < DV)


def runs(query: Tensor, prefix: Ragged, mask: Tensor | None) -> bool:
    """Whether the kernels can do it."""
    device, dtype = query.device, prefix.keys.dtype
    if (
        query.shape[2] != 1
        or max(query.shape[3], prefix.values.shape[1]) > 256
        or (mask is not None and mask.shape[1] != 1)
        or dtype not in (torch.float32, torch.float16, torch.bfloat16)
        or dtype != prefix.values.dtype
    ):
        return False
    if not isinstance(_split, triton.JITFunction):
        # The interpreter multiplies matrices of bfloat16 as if they were integers.
        return dtype != torch.bfloat16
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def attend(
    query: Tensor,
    prefix: Ragged,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of one query to the whole prefix and to a dense tail.

    Args:
        query: [B, Hq, 1, D], D up to 256.
        prefix: what was kept.
        tail_keys: [B, H, T, D]; may be a view of a larger buffer.
        tail_values: [B, H, T, Dv].
        tail_mask: None, or [B or 1, 1, 1, T], bool (True: attend) or added to the scores.
        scaling: factor of the dot products.

    Returns:
        [B, Hq, 1, Dv] in the query's dtype; 0 where nothing is seen.
    """
    (B, Hq, _, D), H, T = query.shape, prefix.heads, tail_keys.shape[2]
    DV, G, dtype = prefix.values.shape[1], Hq // max(H, 1), prefix.keys.dtype
    merged = query.new_empty(B, Hq, 1, DV)
    if not merged.numel():
        return merged
    tail_keys, tail_values = even(tail_keys, dtype), even(tail_values, dtype)
    mask, kind, mask_b, mask_t = read_mask(tail_mask, query, T)
    wide, wide_v, block = sizes(D, DV, dtype)
    splits = min(-(-WAVES * processors(query.device) // (B * H)), prefix.longest // CHUNK)
    splits = max(splits, 1)
    chunk = -(-prefix.longest // (splits * block)) * block
    out = torch.empty(B * H, splits + 1, G, DV, dtype=torch.float32, device=query.device)
    lse = torch.empty(B * H, splits + 1, G, dtype=torch.float32, device=query.device)
    # Triton launches on the current device, which is not always the tensors' own.
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        _split[(B * H, splits + 1)](
            query.to(dtype).reshape(B * H, G, D).contiguous(),
            prefix.keys,
            prefix.values,
            prefix.offsets,
            tail_keys,
            tail_values,
            mask,
            out,
            lse,
            scaling * 1.4426950408889634,
            H,
            T,
            splits,
            chunk,
            *tail_keys.stride()[:3],
            *tail_values.stride()[:3],
            mask_b,
            mask_t,
            G=G,
            D=D,
            DV=DV,
            ROWS=max(16, triton.next_power_of_2(G)),
            WIDE=wide,
            WIDE_V=wide_v,
            BLOCK=block,
            MASK=kind,
            num_warps=4,
            num_stages=2,
        )
        _merge[(B * H, G)](out, lse, merged, splits + 1, G=G, DV=DV, WIDE_V=wide_v)
    return merged


def read_mask(mask: Tensor | None, query: Tensor, tail: int) -> tuple[Tensor, int, int, int]:
    """A mask [B or 1, 1, 1, T], its kind, and its strides over samples and tokens."""
    if mask is None or not tail:
        return query, NO_MASK, 0, 0
    mask = mask.expand(query.shape[0], 1, 1, tail)
    strides = mask.stride(0), mask.stride(3)
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), BOOL_MASK, *strides
    return mask, ADDED_MASK, *strides


def sizes(width: int, width_v: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Blocks' channels of keys and of values, and the tokens of which both fit in one stage."""
    wide, wide_v = (max(16, triton.next_power_of_2(dim)) for dim in (width, width_v))
    block = STAGE // ((wide + wide_v) * dtype.itemsize)
    return wide, wide_v, max(16, min(128, 1 << block.bit_length() - 1))


def even(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel takes any strides but the last."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few of anything else."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
