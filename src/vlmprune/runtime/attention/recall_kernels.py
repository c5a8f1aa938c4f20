# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803
"""The kernels of `recall_triton`: `look` scores the sketch, `read` chooses and attends.

Sizes in the comments: B samples, H KV heads, G query heads of each, V visual tokens, T of text and
later, D channels of keys and DV of values, I images.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmprune.runtime.attention.ragged_triton import attended, divided, rows
from vlmprune.runtime.attention.recall_choice import chosen, remaining, weighed
from vlmprune.runtime.attention.recall_merge import merge, others


@triton.jit
def _guess(
    query,  # [G, D], of one KV head, as all that follows
    codes,  # [V, W] uint8, or int8 that is OFFSET less
    steps,  # [V] float16
    means,  # [D] float32
    channels,  # [D] float32
    images,  # [V] int64
    guesses,  # [G, V] float32, base 2
    lse,  # one for each query head, `columns` apart
    columns,
    start,
    scale,
    V,
    G,
    D: tl.constexpr,
    W: tl.constexpr,
    WIDE_W: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Scores of a block of tokens, and the log of their sum of exponentials."""
    n = start + tl.arange(0, TOKENS)
    j = tl.arange(0, WIDE_W)
    there = n < V
    packed = tl.load(
        codes + n.to(tl.int64)[:, None] * W + j[None, :],
        mask=there[:, None] & (j[None, :] < W),
        other=0,
    ).to(tl.int32)
    packed += OFFSET
    step = tl.load(steps + n, mask=there, other=0.0).to(tl.float32)
    live = there & (tl.load(images + n, mask=there, other=-1) >= 0)
    for g in range(0, G):
        moved = tl.zeros([WIDE_W], tl.float32)
        found = tl.zeros([TOKENS, WIDE_W], tl.float32)
        for place in tl.static_range(8 // BITS):
            d = place * W + j
            # What is packed beyond D is anything.
            channel = (j < W) & (d < D)
            q = tl.load(query + g * D + d, mask=channel, other=0.0).to(tl.float32)
            moved += q * tl.load(means + d, mask=channel, other=0.0)
            folded = q * tl.load(channels + d, mask=channel, other=0.0)
            code = (packed >> (place * BITS)) & ((1 << BITS) - 1)
            level = code.to(tl.float32) - ((1 << BITS) - 1) * 0.5
            found += level * folded[None, :]
        score = (tl.sum(found, axis=1) * step + tl.sum(moved, axis=0)) * scale
        score = tl.where(live, score, float("-inf"))
        tl.store(guesses + g * V + n, score, mask=there)
        top = tl.max(score, axis=0)
        base = tl.where(top == float("-inf"), 0.0, top)
        # The logarithm of nothing is -inf, as it should be.
        tl.store(lse + g * columns, base + tl.log2(tl.sum(tl.exp2(score - base), axis=0)))


@triton.jit(
    do_not_specialize=["H", "G", "T", "V", "blocks", "texts", "parts", "chunk", "mask_b", "mask_t"]
)
def look(
    query,  # [B * H, G, D]
    codes,  # [B * H, V, W] uint8, or int8 that is OFFSET less
    steps,  # [B * H, V] float16
    means,  # [B * H, D] float32
    channels,  # [B * H, D] float32
    images,  # [B, V] int64
    keys,  # [B, H, T, D] of text and later tokens, strides below
    values,  # [B, H, T, DV]
    mask,  # [B, T], strides below
    guesses,  # [B * H, G, V] float32, base 2
    out,  # [B * H, texts + parts, G, DV] float32
    lse,  # [B * H, G, blocks + texts + parts] float32, base 2
    done,  # [B * H] int32
    scale,  # with log2(e), as the exponentials are of base 2
    H,
    G,
    T,
    V,
    blocks,
    texts,
    parts,
    chunk,
    key_b,
    key_h,
    key_t,
    value_b,
    value_h,
    value_t,
    mask_b,
    mask_t,
    D: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    WIDE_W: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
):
    """Score the sketch, and attend to text and later tokens.

    Programs [B * H, blocks + texts]; all leave a log-sum-exp beside what they found.
    """
    # 64 bits from here on, as the products below pass 2^31 in a large cache.
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    b = head // H
    h = head % H
    columns = blocks + texts + parts
    mine = lse + head * G * columns + column
    if column < blocks:
        _guess(
            query + head * G * D,
            codes + head * V * W,
            steps + head * V,
            means + head * D,
            channels + head * D,
            images + b * V,
            guesses + head * G * V,
            mine,
            columns,
            column * TOKENS,
            scale,
            V,
            G,
            D,
            W,
            WIDE_W,
            BITS,
            OFFSET,
            TOKENS,
        )
    else:
        text = column - blocks
        start = text * chunk
        top, total, acc = attended(
            rows(query + head * G * D, G, D, ROWS, WIDE),
            keys + b * key_b + h * key_h,
            key_t,
            values + b * value_b + h * value_h,
            value_t,
            images,
            start,
            tl.minimum(start + chunk, T),
            mask + b * mask_b,
            mask_t,
            T,
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
        tl.store(mine + g * columns, log, mask=g < G)
        place = (head * (texts + parts) + text) * G + g
        tl.store(
            out + place[:, None] * DV + dv[None, :],
            found,
            mask=(g[:, None] < G) & (dv[None, :] < DV),
        )
    if column == 0:
        tl.store(done + head, 0)


@triton.jit(
    do_not_specialize=["H", "G", "V", "longest", "most", "blocks", "texts", "splits", "chunk"]
)
def read(
    query,  # [B * H, G, D]
    keys,  # [B * H, V, D]
    values,  # [B * H, V, DV]
    order,  # [B, I, longest] int64, places of each image's tokens, where ORDERED
    tokens,  # [B, I] int64
    keep,  # [B, I] int64
    guesses,  # [B * H, G, V] float32, base 2
    standing,  # [B * H, V] float32, where STANDING
    index,  # [B * H, I * most] int64
    seen,  # [B, I * most] uint8
    out,  # [B * H, texts + parts, G, DV] float32
    lse,  # [B * H, G, blocks + texts + parts] float32, base 2
    every,  # [B * H, DV] float32, sums of all values, where OTHERS, as the next two
    sums,  # [B * H, parts, DV] float32, of the values that each program reads
    shares,  # [B * H, I, G] float32, base 2, of what is not read of an image
    done,  # [B * H] int32
    merged,  # [B * H, G, DV]
    scale,
    H,
    G,
    V,
    longest,
    most,
    blocks,
    texts,
    splits,
    chunk,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    IMAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALONE: tl.constexpr,
    ORDERED: tl.constexpr,
    STANDING: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Choose among the tokens of an image, attend to them, and merge with what `look` found.

    Programs [B * H, I * splits]; each of an image's splits reads `chunk` of the `most` that it may
    have at the most. With OTHERS one token stands for what is not read, and ROWS are more than G.
    """
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    b = head // H
    i = part // splits
    count = parts // splits
    columns = blocks + texts + parts
    n = tl.arange(0, IMAGE)
    live = n < tl.load(tokens + b * count + i).to(tl.int32)
    budget = tl.load(keep + b * count + i).to(tl.int32)

    if ORDERED:
        place = tl.load(order + (b * count + i) * longest + n, mask=live, other=0).to(tl.int32)
    else:
        place = i * longest + n
    by = weighed(
        guesses + head * G * V,
        lse + head * G * columns,
        place,
        live,
        V,
        G,
        columns,
        blocks + texts,
        IMAGE,
        COLUMNS,
        ALONE,
    )
    if STANDING:
        tl.store(standing + head * V + place, by, mask=live)

    # Every program of the image chooses alike, and lists only what it reads itself.
    split = part % splits
    first = split * chunk
    last = tl.minimum(first + chunk, most)
    base = index + head * count * most + i * most
    taken = chosen(by, live, budget)
    slot = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(base + slot, place.to(tl.int64), mask=taken & (slot >= first) & (slot < last))
    own = (n >= first) & (n < last)
    tl.store(base + n, tl.zeros([IMAGE], tl.int64), mask=own & (n >= budget))
    if OTHERS:
        share = shares + (head * count + i) * G
        remaining(guesses + head * G * V, place, live & ~taken, share, V, G, split, splits)
    if head % H == 0:
        tl.store(seen + (b * count + i) * most + n, (n < budget).to(tl.uint8), mask=own)
    # Other threads of the program read the list.
    tl.debug_barrier()
    top, total, acc = attended(
        rows(query + head * G * D, G, D, ROWS, WIDE),
        keys + head * V * D,
        D,
        values + head * V * DV,
        DV,
        base,
        first,
        tl.minimum(last, budget),
        seen,
        0,
        0,
        scale,
        D,
        DV,
        ROWS,
        WIDE,
        WIDE_V,
        BLOCK,
        0,
        True,
    )
    found, log = divided(top, total, acc)
    g = tl.arange(0, ROWS)
    dv = tl.arange(0, WIDE_V)
    tl.store(lse + (head * G + g) * columns + blocks + texts + part, log, mask=g < G)
    at = (head * (texts + parts) + texts + part) * G + g
    tl.store(
        out + at[:, None] * DV + dv[None, :],
        found,
        mask=(g[:, None] < G) & (dv[None, :] < DV),
    )
    if OTHERS:
        # A row without a query scores each key alike, with 0: what it sums is the values.
        at = sums + (head * parts + part) * DV + g[:, None] * 0 + dv[None, :]
        tl.store(at, acc, mask=(g[:, None] == G) & (dv[None, :] < DV))
    # All threads have stored before the count says so; who comes last sees what all have stored.
    tl.debug_barrier()
    if tl.atomic_add(done + head, 1, sem="acq_rel", scope="gpu") == parts - 1:
        if OTHERS:
            top, total, acc = others(
                every + head * DV,
                sums + head * parts * DV,
                shares + head * count * G,
                tokens + b * count,
                keep + b * count,
                parts,
                count,
                G,
                DV,
                ROWS,
                WIDE_V,
            )
        else:
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, WIDE_V], tl.float32)
        merge(
            out + head * (texts + parts) * G * DV,
            lse + head * G * columns + blocks,
            merged + head * G * DV,
            top,
            total,
            acc,
            texts + parts,
            columns,
            G,
            DV,
            ROWS,
            WIDE_V,
        )
