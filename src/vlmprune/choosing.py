"""What of a request is kept: encode, choose, report; and what of its cache is to be cut."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune.active import Pruned
from vlmprune.cache import RaggedLayer
from vlmprune.encode import Plan, encode
from vlmprune.inputs import Prompt
from vlmprune.report import make
from vlmprune.retaining import Retaining, row_lengths

if TYPE_CHECKING:
    from vlmprune.pruner import Handle
    from vlmprune.reuse import Vision


def choose(
    handle: Handle,
    inputs: Sequence[Mapping[str, Any]],
    planned: Plan,
    batch: int,
    vision: Vision | None = None,
) -> tuple[list[Tensor], dict[str, Pruned]]:
    """Encode and select, and report it.

    Args:
        handle: the attachment.
        inputs: for each modality of the family what the request brings of it.
        planned: the geometry of its items.
        batch: rows.
        vision: what was encoded before, and is not encoded again.

    Returns:
        For each item a [n] bool over its visual tokens, and the encoder outputs that are left;
        none where the pruner leaves encoding to the host.
    """
    if not planned.items:
        return [], {}
    if vision is not None:
        seen = vision.in_order(planned, handle)
        kept, roles = [item.kept for item in seen], [item.roles for item in seen]
        patches = [n for item in seen for n in item.patches]
        _report(handle, planned, inputs, kept, roles, batch, vision.score, 0.0, patches)
        return kept, vision.pruned(handle, planned, batch)
    if not handle.pruner.shortens:
        # The host encodes by itself, in its own time; every token goes on.
        kept = [torch.ones_like(one.labels, dtype=torch.bool) for one in planned.layouts]
        _report(handle, planned, inputs, kept, [{} for _ in kept], batch, "", 0.0)
        return kept, {}
    videos = any(one.kind == "video" for one in planned.layouts)
    handle.pruner.check_request(planned.candidates, planned.images, videos)
    media = handle.family.media
    encoded = encode(
        handle.model, media, handle.host.original, inputs, planned, handle.pruner.score
    )
    _synchronize(encoded.view.attention)
    begin = time.perf_counter()
    selection = handle.pruner.select(encoded.view)
    kept = _to_tokens(planned, selection.kept, always=True)
    _synchronize(encoded.view.attention)
    seconds = time.perf_counter() - begin
    by_role = {name: _to_tokens(planned, cells) for name, cells in selection.roles.items()}
    roles = [{name: parts[i] for name, parts in by_role.items()} for i in range(len(kept))]
    _report(handle, planned, inputs, kept, roles, batch, encoded.score, seconds)

    pruned = {}
    for number, output in encoded.outputs.items():
        own = planned.of(number)
        layouts = [planned.items[i].layout for i in own]

        def left(features: Sequence[Tensor], own: list[int] = own) -> list[Tensor]:
            return [f[kept[i].to(f.device)] for f, i in zip(features, own, strict=True)]

        features = left(media[number].split(output, layouts))
        extra = [left(layer) for layer in media[number].extra(output, layouts)]
        rows = planned.rows(batch, number)
        deep = getattr(output, "deepstack_features", None) or [None]
        flat = isinstance(deep[0], Tensor)
        pruned[media[number].method] = Pruned(media[number], output, features, extra, rows, flat)
    return kept, pruned


def _to_tokens(planned: Plan, cells: Tensor, always: bool = False) -> list[Tensor]:
    """A choice of cells [crops, cells] as [n] bools over each item's visual tokens.

    Args:
        planned: the geometry.
        cells: the choice.
        always: what holds for tokens that belong to no cell.
    """
    parts = cells.split([one.crops for one in planned.layouts])
    return [
        one.to_tokens(part[:, : one.patches]) & ((one.labels >= 0) | always)
        for one, part in zip(planned.layouts, parts, strict=True)
    ]


def _report(
    handle: Handle,
    planned: Plan,
    inputs: Sequence[Mapping[str, Any]],
    kept: list[Tensor],
    roles: list[dict[str, Tensor]],
    batch: int,
    score: str,
    seconds: float,
    patches: list[int] | None = None,
) -> None:
    encoded = [
        medium.patches(handle.model, given, [planned.items[i].layout for i in planned.of(number)])
        for number, (medium, given) in enumerate(zip(handle.family.media, inputs, strict=True))
        if given and patches is None
    ]
    handle.report = make(
        config=handle.model.config,
        method=repr(handle.pruner),
        positions=handle.positions,
        score=score,
        layouts=planned.layouts,
        kept=kept,
        roles=roles,
        rows=planned.rows(batch),
        patches=[n for part in encoded for n in part] if patches is None else patches,
        dtype=handle.model.dtype,
        seconds=seconds,
    )


def check_prompt(
    handle: Handle, prompt: Prompt, visual: Tensor, items: list[int], cache: Any
) -> None:
    """Let the method look at the size of the cache that it is to cut, before any work.

    Args:
        handle: the attachment.
        prompt: all columns, nothing dropped.
        visual: [B, L] bool, which of its last columns are new visual tokens.
        items: of each row.
        cache: the cache to continue, or None.
    """
    config = handle.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stays = prompt.mask != 0
    stays[:, stays.shape[1] - visual.shape[1] :] &= ~visual
    held = [stays.sum(dim=1) * heads]
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, RaggedLayer) and layer.prefix is not None:
            # Of an earlier turn, what the layer holds counts, not what it has seen.
            tail = stays[:, layer.start :].sum(dim=1) * heads
            held.append(row_lengths(layer.prefix).to(tail.device) + tail)
    most = torch.stack(held[1:] or held).amax(dim=0)
    worst = int((most + torch.tensor(items, device=most.device) * heads).argmax())
    token_bytes = 2 * head_dim * (torch.finfo(handle.model.dtype).bits // 8)
    handle.pruner.check_prompt(int(most[worst]), items[worst], heads, token_bytes)


def retaining(
    handle: Handle, prompt: Prompt, short: Prompt, planned: Plan, kept: list[Tensor]
) -> tuple[Retaining, list[Tensor]]:
    """The cut of a prompt's cache, and each row's numbers of the visual tokens that it has.

    Args:
        handle: the attachment.
        prompt: all columns after pruning, those of the cache included.
        short: its new columns.
        planned: the geometry of its items.
        kept: of each item.
    """
    visual = torch.zeros_like(prompt.mask, dtype=torch.bool)
    new = torch.stack([short.ids == token for token in handle.tokens]).any(dim=0)
    visual[:, prompt.mask.shape[1] - short.mask.shape[1] :] = new & (short.mask != 0)
    batch = prompt.mask.shape[0]
    lengths: list[list[int]] = [[] for _ in range(batch)]
    numbers: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.long)] for _ in range(batch)]
    before = [0] * batch
    for item, stays in zip(planned.items, kept, strict=True):
        row = item.span.row
        found = stays.nonzero()[:, 0].cpu()
        lengths[row].append(len(found))
        numbers[row].append(found + before[row])
        before[row] += len(stays)
    cut = Retaining(handle.pruner, prompt.mask, visual, lengths)
    return cut, [torch.cat(parts) for parts in numbers]


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
