"""What of a request is kept, and where it then stands: encode, choose, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import caches, config, outputs, parallel
from vlmprune.report import make
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.runtime.call.shorten import Prompt
from vlmprune.runtime.decoder.cache_cut import row_lengths
from vlmprune.runtime.encoder import acting, merging, question_state, relevance, semantic_tokens
from vlmprune.runtime.encoder.encode import Encoded, encode
from vlmprune.runtime.encoder.pruned import Pruned
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.runtime.geometry import Geometry, VisualColumns
from vlmprune.views import Inside, Reads, Selection


def choose(
    attachment: Attachment,
    inputs: Sequence[Mapping[str, Any]],
    geometry: Geometry,
    batch: int,
    vision: Vision | None = None,
    question: relevance.Question | None = None,
) -> tuple[list[Tensor], dict[str, Pruned]]:
    """Encode and select, and report it.

    Args:
        attachment: of the method to the model.
        inputs: for each modality of the family what the request brings of it.
        geometry: that of the items.
        batch: rows.
        vision: what was encoded before, and is not encoded again.
        question: the columns of the request, for methods that look at the text.

    Returns:
        For each item a [n] bool over its visual tokens, and the encoder outputs that are left;
        none where the pruner leaves encoding to the host.
    """
    if not geometry.items:
        return [], {}
    if vision is not None:
        seen = vision.in_order(geometry, attachment)
        kept, roles = [item.kept for item in seen], [item.roles for item in seen]
        patches = [n for item in seen for n in item.patches]
        into = [item.members for item in seen if item.members is not None]
        members = into if len(into) == len(seen) else None
        _report(
            attachment, geometry, inputs, kept, roles, batch, vision.score, 0.0, patches, members
        )
        return kept, vision.pruned(attachment, geometry, batch)
    videos = any(one.kind == "video" for one in geometry.layouts)
    attachment.method.check_request(geometry.candidates, geometry.images, videos)
    if not attachment.method.shortens:
        # The host encodes by itself, in its own time; every token goes on.
        kept = [torch.ones_like(one.labels, dtype=torch.bool) for one in geometry.layouts]
        _report(attachment, geometry, inputs, kept, [{} for _ in kept], batch, "", 0.0)
        return kept, {}
    # `generate` and `handle.encode` come here outside of the model's forward.
    return parallel.gathered(
        attachment.model, partial(_chosen, attachment, inputs, geometry, batch, question)
    )


def _chosen(
    attachment: Attachment,
    inputs: Sequence[Mapping[str, Any]],
    geometry: Geometry,
    batch: int,
    question: relevance.Question | None,
) -> tuple[list[Tensor], dict[str, Pruned]]:
    """`choose` of what is to be encoded."""
    media = attachment.family.media
    items = [[geometry.items[i].layout for i in geometry.of(n)] for n in range(len(media))]
    acts = acting.acts_of(attachment.model, media, inputs, items, attachment.method)
    encoded = _encoded(attachment, inputs, geometry, question, acts)
    _synchronize(encoded.view.attention)
    begin = time.perf_counter()
    selection = attachment.method.select(encoded.view)
    kept = _to_tokens(geometry, selection.kept, always=True)
    _synchronize(encoded.view.attention)
    seconds = time.perf_counter() - begin
    by_role = {name: _to_tokens(geometry, cells) for name, cells in selection.roles.items()}
    roles = [{name: parts[i] for name, parts in by_role.items()} for i in range(len(kept))]
    members = None
    if selection.members is not None:
        members = merging.to_tokens(geometry.layouts, kept, selection.members)
    score = encoded.score
    _report(attachment, geometry, inputs, kept, roles, batch, score, seconds, members=members)

    pruned = {}
    order = _order(attachment, geometry, selection, kept)
    tokens = _tokens(attachment, geometry, encoded, selection)
    for number, output in encoded.outputs.items():
        own = geometry.of(number)
        layouts = [geometry.items[i].layout for i in own]

        def left(features: Sequence[Tensor], own: list[int] = own) -> list[Tensor]:
            short = [f[kept[i].to(f.device)] for f, i in zip(features, own, strict=True)]
            if order is None:
                return short
            return [f[order[i].to(f.device)] for f, i in zip(short, own, strict=True)]

        features = left([tokens[i] for i in own])
        extra = [left(layer) for layer in media[number].extra(output, layouts)]
        rows = geometry.rows(batch, number)
        deep = outputs.deep_of(output, config.deepstack_layers(attachment.model.config))
        flat = bool(deep) and isinstance(deep[0], Tensor)
        own_order = None if order is None else [order[i] for i in own]
        pruned[media[number].method] = Pruned(
            media[number], output, features, extra, rows, flat, own_order
        )
    return kept, pruned


def _encoded(
    attachment: Attachment,
    inputs: Sequence[Mapping[str, Any]],
    geometry: Geometry,
    question: relevance.Question | None,
    acts: Sequence[Inside | None],
) -> Encoded:
    """Encoder outputs and the view, with all that the pruner reads."""
    source, asked, stated = "", list[bool](), False

    def reads(depth: int, feature: int) -> Reads:
        nonlocal source, stated
        wanted = attachment.method.reads(depth, feature)
        source, stated = wanted.relevance, wanted.question
        if stated:
            assert question is not None
            question_state.check(question, geometry)
        if source:
            assert question is not None
            relevance.check(attachment, source, question, geometry)
        asked.append(wanted.projected)
        return replace(wanted, projected=wanted.projected or bool(source))

    encoded = encode(
        attachment.model,
        attachment.family.media,
        attachment.originals,
        inputs,
        geometry,
        attachment.method.score,
        reads,
        repr(attachment.method),
        acts,
        attachment.method.attends,
    )
    if stated:
        assert question is not None
        states = question_state.states(attachment, question, geometry)
        view = replace(encoded.view, question=states.to(encoded.view.features.device))
        words = "; ".join(filter(None, (encoded.score, question_state.WORDS)))
        encoded = replace(encoded, view=view, score=words)
    if not source:
        return encoded
    assert question is not None
    likeness, words = relevance.to_cells(attachment, source, question, geometry, encoded.view)
    shown = encoded.view.projected if asked[0] else None
    by_words = words == relevance.BY_WORDS
    view = replace(encoded.view, relevance=likeness, projected=shown, by_words=by_words)
    return replace(encoded, view=view, score="; ".join(filter(None, (encoded.score, words))))


def _tokens(
    attachment: Attachment, geometry: Geometry, encoded: Encoded, selection: Selection
) -> dict[int, Tensor]:
    """Of each item all visual tokens [n, D], those that the method makes made anew.

    Features for later layers (deepstack) are not merged: a kept token brings its own.
    """
    out: dict[int, Tensor] = {}
    projects: dict[int, Callable[[Tensor], Tensor | None]] = {}
    for number, output in encoded.outputs.items():
        medium, own = attachment.family.media[number], geometry.of(number)
        split = medium.split(output, [geometry.items[i].layout for i in own])
        out |= dict(zip(own, split, strict=True))
        projects |= {i: partial(medium.project, attachment.model) for i in own}
    if selection.tokens is not None:
        return merging.replaced(selection, geometry.layouts, out)
    if selection.merge is None or not len(selection.merge.into):
        return out
    every = range(len(geometry.items))
    made = merging.merged(
        selection.merge,
        selection.kept,
        geometry.layouts,
        encoded.cells,
        [out[i] for i in every],
        [projects[i] for i in every],
    )
    return dict(zip(every, made, strict=True))


def _order(
    attachment: Attachment, geometry: Geometry, selection: Selection, kept: list[Tensor]
) -> list[Tensor] | None:
    """The order of each item's kept tokens; None as they lie in the image."""
    if selection.last is None or attachment.positions != "compact":
        return None
    last = _to_tokens(geometry, selection.last)
    return [
        merging.order(one, stays, behind)
        for one, stays, behind in zip(geometry.layouts, kept, last, strict=True)
    ]


def _to_tokens(geometry: Geometry, cells: Tensor, always: bool = False) -> list[Tensor]:
    """A choice of cells [crops, cells] as [n] bools over each item's visual tokens.

    Args:
        geometry: that of the items.
        cells: the choice.
        always: what holds for tokens that belong to no cell.
    """
    parts = cells.split([one.crops for one in geometry.layouts])
    return [
        one.to_tokens(part[:, : one.patches]) & ((one.labels >= 0) | always)
        for one, part in zip(geometry.layouts, parts, strict=True)
    ]


def _report(
    attachment: Attachment,
    geometry: Geometry,
    inputs: Sequence[Mapping[str, Any]],
    kept: list[Tensor],
    roles: list[dict[str, Tensor]],
    batch: int,
    score: str,
    seconds: float,
    patches: list[int] | None = None,
    members: list[Tensor] | None = None,
) -> None:
    media = attachment.family.media
    items = [[geometry.items[i].layout for i in geometry.of(n)] for n in range(len(media))]
    encoded = [
        medium.patches(
            attachment.model, given, [geometry.items[i].layout for i in geometry.of(number)]
        )
        for number, (medium, given) in enumerate(zip(attachment.family.media, inputs, strict=True))
        if given and patches is None
    ]
    tower = acting.flops(attachment.model, media, inputs, items, attachment.method)
    if tower is None:
        tower = semantic_tokens.flops(attachment.model, media, items, attachment.method)
    attachment.report = make(
        config=attachment.model.config,
        method=repr(attachment.method),
        positions=attachment.positions,
        score=score,
        layouts=geometry.layouts,
        kept=kept,
        roles=roles,
        rows=geometry.rows(batch),
        patches=[n for part in encoded for n in part] if patches is None else patches,
        dtype=attachment.model.dtype,
        seconds=seconds,
        members=members,
        tower=tower,
    )


def check_prompt(
    attachment: Attachment, prompt: Prompt, visual: Tensor, items: list[int], cache: Any
) -> None:
    """Let the method look at the size of the cache that it is to cut, before any work.

    Args:
        attachment: of the method to the model.
        prompt: all columns, nothing dropped.
        visual: [B, L] bool, which of its last columns are new visual tokens.
        items: of each row.
        cache: the cache to continue, or None.
    """
    sizes = attachment.model.config
    heads, head_dim = config.kv_heads(sizes), config.head_dim(sizes)
    stays = prompt.mask != 0
    stays[:, stays.shape[1] - visual.shape[1] :] &= ~visual
    held = [stays.sum(dim=1) * heads]
    for layer in caches.layers_of(cache):
        if isinstance(layer, RaggedLayer) and layer.prefix is not None:
            # Of an earlier turn, what the layer holds counts, not what it has seen.
            tail = stays[:, layer.start :].sum(dim=1) * heads
            held.append(layer.sharing.summed(row_lengths(layer.prefix).to(tail.device)) + tail)
    most = torch.stack(held[1:] or held).amax(dim=0)
    worst = int((most + torch.tensor(items, device=most.device) * heads).argmax())
    token_bytes = 2 * head_dim * (torch.finfo(attachment.model.dtype).bits // 8)
    attachment.method.check_prompt(int(most[worst]), items[worst], heads, token_bytes)


def columns_of(
    attachment: Attachment,
    prompt: Prompt,
    short: Prompt,
    geometry: Geometry,
    kept: list[Tensor],
    pruned: dict[str, Pruned],
) -> VisualColumns:
    """The new visual tokens as the language model gets them.

    Args:
        attachment: of the method to the model.
        prompt: all columns after pruning, those of the cache included.
        short: its new columns.
        geometry: that of the items.
        kept: of each item.
        pruned: encoder outputs by the name of the host's method.
    """
    visual = torch.zeros_like(prompt.mask, dtype=torch.bool)
    new = torch.stack([short.ids == token for token in attachment.tokens]).any(dim=0)
    visual[:, prompt.mask.shape[1] - short.mask.shape[1] :] = new & (short.mask != 0)
    numbers = [stays.nonzero()[:, 0].cpu() for stays in kept]
    for number, medium in enumerate(attachment.family.media):
        order = pruned[medium.method].order if medium.method in pruned else None
        for i, places in zip(geometry.of(number), order or (), strict=bool(order)):
            numbers[i] = numbers[i][places.cpu()]
    return VisualColumns.of(geometry, visual, numbers)


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
