"""The extra memory that each method's choice takes at many visual tokens, for selection.py.

Every method is asked once, on tensors of random numbers in the shapes that it would see, and the
peak beside those inputs is recorded. Reading attention in the host is measured beside it, where a
method reads more than one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from page_parts import mib, table
from vlmprune import METHODS, Pruner
from vlmprune.hosts.attention import read
from vlmprune.runtime.attention import taps
from vlmprune.select import bipartite
from vlmprune.study.measure import peak_bytes
from vlmprune.views import EncoderView, LayerView, Rows, RowView

WIDTH, PROJECTED, HEADS, KEYS = 1024, 4096, 16, 64
"""Of the vision encoder: features, projected features, heads, width of a head (CLIP ViT-L)."""
DECODER, QUERY_HEADS, TEXT = 4096, 32, 64
"""Of the language model: states, query heads; and text tokens of the prompt."""
DEPTH, FEATURE, LAYERS = 24, 22, 32
SHARE = 1 / 9
"""Share of tokens kept: 64 of 576."""


@dataclass(frozen=True)
class Peak:
    """What a method's choice takes at once, beside its inputs.

    Attributes:
        method: its name.
        tokens: visual tokens.
        choosing: bytes of the choice itself.
        reading: bytes of the tap that reads attention for it; 0 for a single row.
        growth: the power of the number of tokens by which the larger of both grew from a quarter
            of the tokens on: 1 is linear, 2 quadratic.
    """

    method: str
    tokens: int
    choosing: int
    reading: int
    growth: float


def settings(cls: Any) -> dict[str, Any]:
    """Settings that keep about `SHARE`, or take the most; a schedule for methods that want one."""
    names = {one.name for one in fields(cls)}
    if "important_ratio" in names:
        # All tokens on the list that is thinned, which is the most that there can be, and few
        # rounds of it.
        return {"keep": 0.98, "important_ratio": 0.0}
    if "rates" in names:
        return {"rates": (1.0, *[SHARE] * (LAYERS - 1))}
    return {"keep": SHARE} if "keep" in names else {}


def encoder_view(tokens: int, video: bool) -> EncoderView:
    """One image of so many tokens in a square; for a video, 64 frames."""
    generator = torch.Generator().manual_seed(0)
    crops = 64 if video else 1
    cells = tokens // crops
    side = int(cells**0.5)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(crops, cells, *shape, generator=generator)

    scores = numbers().softmax(dim=1)
    return EncoderView(
        attention=scores,
        features=numbers(WIDTH),
        candidates=torch.ones(crops, cells, dtype=torch.bool),
        images=(0,) * crops,
        grids=((side, cells // side),) * crops,
        videos=(video,),
        layers=dict.fromkeys(range(DEPTH), scores),
        received=scores,
        given=scores,
        keys=numbers(KEYS),
        joined=scores,
        joined_keys=numbers(WIDTH),
        projected=numbers(PROJECTED),
        relevance=numbers(),
    )


def row_view(tokens: int) -> RowView:
    """One sample with one image before its text."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    count = torch.tensor([[tokens]])
    real = torch.ones(1, TEXT, dtype=torch.bool)
    return RowView(
        hidden=numbers(tokens, DECODER),
        images=torch.zeros(1, tokens, dtype=torch.long),
        counts=count,
        before=count,
        text_hidden=numbers(TEXT, DECODER),
        normed=numbers(tokens, DECODER),
        text_normed=numbers(TEXT, DECODER),
        text=real,
        after=real,
        attention=numbers(tokens).softmax(dim=1),
        keys=numbers(tokens, DECODER),
        text_keys=numbers(TEXT, DECODER),
        depth=LAYERS,
    )


def layer_view(tokens: int) -> LayerView:
    """The same sample in a layer with as many KV heads as query heads."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(1, QUERY_HEADS, tokens, generator=generator).softmax(dim=2)
    columns = tokens + TEXT
    return LayerView(
        attention=attention,
        images=torch.zeros(1, tokens, dtype=torch.long),
        counts=torch.tensor([[tokens]]),
        kv_heads=QUERY_HEADS,
        others=torch.tensor([TEXT * QUERY_HEADS]),
        token_bytes=512,
        sums=torch.rand(1, columns, generator=generator),
        seen=torch.full((1, columns), 128),
        places=torch.arange(tokens)[None],
    )


def choice(pruner: Pruner, tokens: int) -> Callable[[], Any]:
    """One call of what the method decides by."""
    if pruner.cuts:
        layer = layer_view(tokens)
        return lambda: pruner.retain(1, layer)
    if pruner.drops:
        view, first = row_view(tokens), min(pruner.asks(LAYERS))

        def drop() -> Rows | None:
            pruner.raters(view)
            return pruner.drop(first, view)

        return drop
    images = encoder_view(tokens, video=type(pruner).__name__ == "EVS")
    return lambda: pruner.select(images)


def merging(tokens: int) -> None:
    """ToMe's first merge, the largest of all layers."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, tokens, KEYS, generator=generator)
    merge = round(tokens * (1 - SHARE) / (FEATURE + 1))
    into = bipartite.match(keys, merge, False)
    bipartite.averaging(into, torch.ones(1, tokens), tokens - merge)


def peak_of(name: str, tokens: int) -> Peak:
    """One method's peak among so many visual tokens, and how it grows."""
    few, many = (_peaks(name, amount) for amount in (tokens // 4, tokens))
    growth = math.log(max(*many, 1) / max(*few, 1), 4)
    return Peak(name, tokens, *many, growth)


def _peaks(name: str, tokens: int) -> tuple[int, int]:
    cls: Any = METHODS[name]
    pruner: Pruner = cls(**settings(cls))
    calls = [(lambda: merging(tokens)) if name == "tome" else choice(pruner, tokens)]
    if pruner.shortens and pruner.reads(DEPTH, FEATURE).patches is not None:
        query = torch.randn(1, HEADS, tokens, KEYS)
        key = torch.randn_like(query)
        call = read(torch.nn.Identity(), query, key, KEYS**-0.5)
        calls.append(lambda: taps.patch_attention(call, None))
    choosing, *reading = (peak_bytes(one, torch.device("cpu")) or 0 for one in calls)
    return choosing, sum(reading)


def markdown(peaks: list[Peak]) -> str:
    """A table of the peaks."""
    rows = []
    for one in peaks:
        sizes = [mib(size) if size else "" for size in (one.choosing, one.reading)]
        rows.append([f"`{one.method}`", *sizes, f"{one.growth:.1f}"])
    heads = ["method", "choosing, MiB", "reading attention, MiB", "growth"]
    return table(heads, rows)
