"""One decode step that reads a few visual tokens, in two launches on a GPU.

The first scores the packed sketch, a block of tokens a program, and beside it attends to text and
later tokens. In the second, a few programs a KV head and image find which of the image's tokens
are read, each for itself, and attend to their part of them; the last program of each head merges
what all found, and one token for what is not read where `rest` is "mean": each program of the
second launch leaves the sum of the values that it reads and, of some query heads, that of the
exponentials of the scores that it does not. The host waits for nothing between them, and nothing
that changes from step to step is compiled in.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from vlmprune.runtime.attention import recall_kernels
from vlmprune.runtime.attention.ragged_triton import (
    CHUNK,
    WAVES,
    even,
    processors,
    read_mask,
    sizes,
)
from vlmprune.runtime.attention.recalled import Recalled

# Values of the sketch that a program of the first launch unpacks. With twice as many, its
# registers would let half as many programs run at once.
UNPACKED = 2048
# Tokens of an image that one program chooses among: all its threads' registers hold them.
LARGEST = 32768
# Chosen tokens for which a program of the second launch is worth its choice.
SHARE = 128
_LOG2E = 1.4426950408889634


def runs(query: Tensor, recalled: Recalled, mask: Tensor | None) -> bool:
    """Whether the kernels can do it.

    Args:
        query: [B, Hq, Q, D].
        recalled: the visual tokens.
        mask: of text and later tokens, in four dimensions, or None.
    """
    store, dtype = recalled.store, recalled.store.keys.dtype
    if (
        query.shape[2] != 1
        or recalled.sketch is None
        or recalled.all_read
        or store.place != "device"
        or max(query.shape[3], store.values.shape[3]) > 256
        or (mask is not None and (mask.dim() != 4 or mask.shape[1] != 1))
        or dtype not in (torch.float32, torch.float16, torch.bfloat16)
        or dtype != store.values.dtype
        or not (store.keys.is_contiguous() and store.values.is_contiguous())
        or recalled.groups.shape[1] > LARGEST
    ):
        return False
    if not isinstance(recall_kernels.look, triton.JITFunction):
        # The interpreter multiplies matrices of bfloat16 as if they were integers.
        return dtype != torch.bfloat16
    if query.device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend(
    query: Tensor,
    recalled: Recalled,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    standing: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of one query to a few visual tokens, and to text and what came later.

    Args:
        query: [B, Hq, 1, D], D up to 256.
        recalled: the visual tokens, with a sketch.
        keys: [B, H, T, D] of text and later tokens; may be a view of a larger buffer.
        values: [B, H, T, Dv].
        mask: None, or [B or 1, 1, 1, T], bool (True: attend) or added to the scores.
        scaling: factor of the dot products.
        standing: [B, H, V] float32, to be filled with what the choice went by: a KV head's mean
            attention or, of one query head, its scores of base 2. Where no token is it stays.

    Returns:
        [B, Hq, 1, Dv] in the query's dtype, 0 where nothing is seen; places [B, H, k] int64 of
        what was read, those of each image ascending; and [B, 1, k] bool, False where an image has
        fewer to be read, None where none has.
    """
    sketch, store, groups = recalled.sketch, recalled.store, recalled.groups
    assert sketch is not None
    (B, Hq, _, D), (_, H, V, DV), T = query.shape, store.values.shape, keys.shape[2]
    G, dtype, device = Hq // max(H, 1), store.keys.dtype, query.device
    (count, longest), most = groups.shape, groups.most
    keys, values = even(keys, dtype), even(values, dtype)
    mask, kind, mask_b, mask_t = read_mask(mask, query, T)
    wide, wide_v, block = sizes(D, DV, dtype)
    wide_w = max(16, triton.next_power_of_2(sketch.codes.shape[3]))
    tokens = max(16, min(256, UNPACKED // wide_w))
    image = max(16, triton.next_power_of_2(longest))
    blocks = -(-V // tokens)
    texts, text_chunk = _divided(T, CHUNK, WAVES * processors(device) // max(B * H, 1), block)
    splits, chunk = _divided(most, SHARE, processors(device) // max(B * H * count, 1), block)
    splits = max(splits, 1)
    parts = count * splits
    merged = query.new_empty(B, Hq, 1, DV)
    index = torch.empty(B, H, count * most, dtype=torch.int64, device=device)
    seen = torch.empty(B, 1, count * most, dtype=torch.bool, device=device)
    read = merged, index, None if groups.even else seen
    if not merged.numel():
        return read
    guesses = torch.empty(B * H, G, V, dtype=torch.float32, device=device)
    out = torch.empty(B * H, texts + parts, G, DV, dtype=torch.float32, device=device)
    lse = torch.empty(B * H, G, blocks + texts + parts, dtype=torch.float32, device=device)
    done = torch.empty(B * H, dtype=torch.int32, device=device)
    others = recalled.total is not None
    # What stands for no tokens is not touched.
    every = recalled.total.contiguous() if recalled.total is not None else out
    sums = torch.empty(B * H, parts, DV, dtype=torch.float32, device=device) if others else out
    shares = torch.empty(B * H, count, G, dtype=torch.float32, device=device) if others else out
    asked = query.to(dtype).reshape(B * H, G, D).contiguous()
    fixed = {
        "D": D,
        "DV": DV,
        "WIDE": wide,
        "WIDE_V": wide_v,
        "BLOCK": block,
        "num_stages": 2,
    }
    # Triton launches on the current device, which is not always the tensors' own.
    with torch.cuda.device(device) if query.is_cuda else nullcontext():
        recall_kernels.look[(B * H, blocks + texts)](
            asked,
            sketch.codes.contiguous(),
            sketch.scale.contiguous(),
            sketch.mean.contiguous(),
            sketch.channel.contiguous(),
            recalled.images.contiguous(),
            keys,
            values,
            mask,
            guesses,
            out,
            lse,
            done,
            scaling * _LOG2E,
            H,
            G,
            T,
            V,
            blocks,
            texts,
            parts,
            text_chunk,
            *keys.stride()[:3],
            *values.stride()[:3],
            mask_b,
            mask_t,
            ROWS=max(16, triton.next_power_of_2(G)),
            W=sketch.codes.shape[3],
            WIDE_W=wide_w,
            BITS=sketch.bits,
            OFFSET=128 if sketch.codes.dtype == torch.int8 else 0,
            TOKENS=tokens,
            MASK=kind,
            num_warps=4,
            **fixed,
        )
        recall_kernels.read[(B * H, parts)](
            asked,
            store.keys,
            store.values,
            recalled.images if groups.index is None else groups.index,
            recalled.tokens.contiguous(),
            recalled.keep.contiguous(),
            guesses,
            guesses if standing is None else standing,
            index,
            seen.view(torch.uint8),
            out,
            lse,
            every,
            sums,
            shares,
            done,
            merged,
            scaling * _LOG2E,
            H,
            G,
            V,
            longest,
            most,
            blocks,
            texts,
            splits,
            chunk,
            # One row more sums the values.
            ROWS=max(16, triton.next_power_of_2(G + others)),
            IMAGE=image,
            COLUMNS=256,
            ALONE=G == 1,
            ORDERED=groups.index is not None,
            STANDING=standing is not None,
            OTHERS=others,
            # A thread has sixteen tokens of an image, of the largest 32.
            num_warps=max(4, min(image // 512, max(16, image // 1024))),
            **fixed,
        )
    return read


def _divided(length: int, least: int, programs: int, block: int) -> tuple[int, int]:
    """How many programs share a length, none with much less than `least`, and the part of each."""
    if not length:
        return 0, block
    parts = max(1, min(programs, length // least))
    chunk = -(-length // (parts * block)) * block
    return -(-length // chunk), chunk
