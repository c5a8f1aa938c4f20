"""What a method reads of a vision tower in vLLM, taken by hooks during a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

from vlmprune.hosts.attention import read
from vlmprune.integrations.vllm.host import Absent, Host, Served
from vlmprune.runtime.attention.taps import KeyTap, PatchTap, Tap, tapped
from vlmprune.runtime.encoder.encode import TowerReads
from vlmprune.runtime.hooks import Hooks
from vlmprune.views import Reads
from vlmprune.views.layout import Layout


def run(
    call: Callable[[], Any],
    host: Host,
    medium: Served,
    items: Sequence[Any],
    layouts: Sequence[Layout],
    reads: Reads,
    attends: bool,
) -> TowerReads:
    """Encode one modality and take what is read on the way.

    Args:
        call: encodes.
        host: the model.
        medium: the modality.
        items: the inputs of each item.
        layouts: of each item.
        reads: what the method reads beside the family's own score.
        attends: whether it reads that score.
    """
    inputs = medium.joined(items)
    scored = medium.scored(host, inputs)
    wanted: dict[str | int, tuple[nn.Module, Tap]] = {}
    unscored = None if attends else medium.unscored(host, inputs, layouts)
    if unscored is None:
        wanted["score"] = (scored.layer, Tap(scored.rows))
    if reads.layers or reads.patches is not None or reads.keys is not None:
        encoder = medium.encoder(host, inputs)
        for number in reads.layers:
            wanted[number] = (encoder.layers[number], Tap(encoder.rows))
        if reads.patches is not None:
            wanted["patches"] = (encoder.layers[reads.patches], PatchTap(encoder.cls))
        if reads.keys is not None:
            wanted["keys"] = (encoder.layers[reads.keys], KeyTap())
    features: list[Tensor] = []
    with Hooks() as hooks:
        lengths = medium.lengths(host, items)
        for layer, tap in wanted.values():
            hooks.enter_context(watched(layer, tap, lengths))

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            features.append(args[0] if args else next(iter(kwargs.values())))

        hooks.before(medium.projector(host), keep)
        output = call()
    sizes = medium.rows(host, items)

    def own(calls: list[Tensor]) -> list[Tensor]:
        """Row by row of the crops that are no padding, item by item."""
        rows = [row for part in calls for row in part]
        if len(rows) != sum(sizes):
            return calls
        out, start = [], 0
        for size, one in zip(sizes, layouts, strict=True):
            out.append(torch.stack(rows[start : start + one.crops]))
            start += size
        return out

    cells = own(features)
    rows = {name: own(shared(layer, tap.rows_seen)) for name, (layer, tap) in wanted.items()}
    if unscored is not None:
        device = cells[0].device
        rows["score"] = [one.to(device) for one in unscored]
    return TowerReads(
        output,
        scored.words if attends else "",
        rows["score"],
        cells,
        {number: rows[number] for number in reads.layers},
        rows.get("patches", []),
        rows.get("keys", []),
    )


@contextmanager
def watched(layer: nn.Module, tap: Tap, lengths: Sequence[int] | None = None) -> Iterator[None]:
    """Let `tap` see whenever an encoder layer runs, vLLM's or Transformers'.

    Args:
        layer: the encoder layer.
        tap: what sees.
        lengths: of the sequences in a call; None where vLLM's own arguments say it.
    """
    # A method that reads one was refused as the server started.
    assert not isinstance(layer, Absent)
    attention = attention_in(layer)
    if attention is None:
        with tapped(layer, tap):
            yield
        return

    told = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value", "cu_seqlens"), args, strict=False)) | kwargs
        query = heads(given["query"], attention.num_heads, attention.head_size)
        key = heads(given["key"], attention.num_kv_heads, attention.head_size)
        # Some kernels want other numbers than those of tokens.
        ends = given.get("cu_seqlens") if told is None else told
        tap.see(read(attention, query, key, attention.scale, ends))

    with Hooks() as hooks:
        hooks.before(attention, look)
        yield


def attention_in(layer: nn.Module) -> Any:
    """vLLM's attention module in an encoder layer; None in a layer of Transformers."""
    for module in layer.modules():
        if isinstance(module, MMEncoderAttention):
            return module
    return None


def heads(states: Tensor, count: int, size: int) -> Tensor:
    """[B, heads, L, D] of states [B, L, heads · D], [B, L, heads, D] or [L, heads · D]."""
    if states.ndim == 2 or (states.ndim == 3 and states.shape[1:] == (count, size)):
        states = states[None]
    return states.reshape(*states.shape[:2], count, size).transpose(1, 2)


def shared(layer: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    """Means over all heads, of means over those that this rank has."""
    world = get_tensor_model_parallel_world_size()
    if world == 1 or attention_in(layer) is None:
        return rows
    return [tensor_model_parallel_all_reduce(row.contiguous()) / world for row in rows]
