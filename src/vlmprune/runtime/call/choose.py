"""Encode the images of a call and let the method choose among their visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import config, outputs
from vlmprune.report import Report, make
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.call import entrance
from vlmprune.runtime.call.plan import Plan
from vlmprune.runtime.call.refusals import check_newlines
from vlmprune.runtime.encoder import acting, merging, question_state, relevance, semantic_tokens
from vlmprune.runtime.encoder.encode import Encoded, encoded_again
from vlmprune.runtime.encoder.encode import encode as encode_items
from vlmprune.runtime.encoder.entered import Entered
from vlmprune.runtime.encoder.pruned import Pruned
from vlmprune.runtime.encoder.reads import wanted
from vlmprune.runtime.geometry import Geometry
from vlmprune.runtime.timer import Seconds, Timer
from vlmprune.select.precision import unrounded
from vlmprune.views import Selection
from vlmprune.views.layout import kept_tokens


@dataclass(frozen=True)
class Choice:
    """What was chosen, of each image and video in prompt order.

    Attributes:
        kept: [n] bool over its visual tokens.
        roles: by name, [n] bool likewise.
        pruned: encoder outputs that are left, by the name of the host's method; empty where the
            host encodes by itself.
        members: [n] int64, the kept token that each went into; None where nothing was merged.
        score: where the attention scores came from.
        patches: what the encoder saw of it, where it was encoded before; None to be counted.
        seconds: time that choosing took.
        entered: what enters the language model of the whole request, where placeholders alone are
            known; None elsewhere.
    """

    kept: list[Tensor] = field(default_factory=list)
    roles: list[dict[str, Tensor]] = field(default_factory=list)
    pruned: dict[str, Pruned] = field(default_factory=dict)
    members: list[Tensor] | None = None
    score: str = ""
    patches: list[int] | None = None
    seconds: float = 0.0
    entered: Entered | None = None


def encode(attachment: Attachment, plan: Plan) -> Encoded | None:
    """Encode what the call brings, and look at it as the method wants to.

    Returns:
        None where nothing is to be encoded here: there is no image, it was encoded before, or the
        method leaves that to the host.
    """
    geometry = plan.geometry
    if not geometry.items:
        return None
    check_newlines(attachment, [item.medium for item in geometry.items])
    if plan.asked.vision is not None:
        return None
    videos = any(one.kind == "video" for one in geometry.layouts)
    attachment.method.check_request(geometry.candidates, geometry.images, videos)
    if not attachment.method.shortens:
        return None
    if attachment.family.counted:
        return entrance.seen(attachment, plan)
    return _seen(attachment, plan)


def choose(attachment: Attachment, plan: Plan, encoded: Encoded | None) -> Choice:
    """Let the method choose among what was encoded; a stored choice stands, and so does "all"."""
    geometry, vision = plan.geometry, plan.asked.vision
    if not geometry.items:
        return Choice()
    if vision is not None:
        items = vision.in_order(geometry, attachment)
        into = [item.members for item in items if item.members is not None]
        return Choice(
            [item.kept for item in items],
            [item.roles for item in items],
            vision.pruned(attachment, geometry, plan.batch),
            into if len(into) == len(items) else None,
            vision.score,
            [n for item in items for n in item.patches],
        )
    if encoded is None:
        kept = [torch.ones_like(one.labels, dtype=torch.bool) for one in geometry.layouts]
        return Choice(kept, [{} for _ in kept])
    taken = Seconds()
    with Timer(taken, encoded.view.attention):
        with unrounded(encoded.view.attention):
            selection = attachment.method.select(encoded.view)
        kept = kept_tokens(geometry.layouts, selection.kept, attachment.method.newlines)
    by_role = {name: _cell_tokens(geometry, cells) for name, cells in selection.roles.items()}
    members = None
    if selection.members is not None:
        members = merging.to_tokens(geometry.layouts, kept, selection.members)
    return Choice(
        kept,
        [{name: parts[i] for name, parts in by_role.items()} for i in range(len(kept))],
        _pruned(attachment, plan, encoded, selection, kept),
        members,
        encoded.score,
        seconds=taken.total,
        entered=encoded.entered,
    )


def report_of(attachment: Attachment, plan: Plan, choice: Choice) -> Report:
    """What a call kept before the language model, and what that saves."""
    media, geometry = attachment.family.media, plan.geometry
    items = _layouts(attachment, geometry)
    patches = choice.patches
    # Of a family whose placeholders are counted the vision tower is not known.
    if patches is None and not attachment.family.counted:
        each = [
            medium.patches(attachment.model, given, own)
            for medium, given, own in zip(media, plan.brought, items, strict=True)
            if given
        ]
        patches = [n for part in each for n in part]
    tower = acting.flops(attachment.model, media, plan.brought, items, attachment.method, patches)
    if tower is None:
        tower = semantic_tokens.flops(attachment.model, media, items, attachment.method)
    return make(
        config=attachment.model.config,
        method=repr(attachment.method),
        positions=attachment.positions,
        score=choice.score,
        layouts=geometry.layouts,
        kept=choice.kept,
        roles=choice.roles,
        rows=geometry.rows(plan.batch),
        patches=patches,
        dtype=attachment.model.dtype,
        seconds=choice.seconds,
        members=choice.members,
        tower=tower,
        below_keep=attachment.method.below_keep(geometry.candidates, geometry.images),
        layers=attachment.decoder_sizes,
    )


def _layouts(attachment: Attachment, geometry: Geometry) -> list[list[Any]]:
    """For each modality the layouts of its items."""
    numbers = range(len(attachment.family.media))
    return [[geometry.items[i].layout for i in geometry.of(n)] for n in numbers]


def _pruned(
    attachment: Attachment,
    plan: Plan,
    encoded: Encoded,
    selection: Selection,
    kept: list[Tensor],
) -> dict[str, Pruned]:
    """The encoder outputs that are left of what was chosen among."""
    media, geometry = attachment.family.media, plan.geometry
    if encoded.entered is not None:
        # The host encodes by itself.
        return {}
    order = _order(attachment, geometry, selection, kept)
    tokens = _tokens(attachment, geometry, encoded, selection)
    pruned = {}
    for number, output in encoded.outputs.items():
        own = geometry.of(number)
        layouts = [geometry.items[i].layout for i in own]

        def left(features: Sequence[Tensor], own: list[int] = own) -> list[Tensor]:
            short = _taken(features, [kept[i] for i in own])
            if order is None:
                return short
            return [f[order[i].to(f.device)] for f, i in zip(short, own, strict=True)]

        deep = outputs.deep_of(output, config.deepstack_layers(attachment.model.config))
        again = None
        if encoded.acts[number] is None:
            given = plan.brought[number]
            again = partial(encoded_again, attachment.originals, media[number], given)
        pruned[media[number].method] = Pruned(
            media[number],
            output,
            left([tokens[i] for i in own]),
            [left(layer) for layer in media[number].extra(output, layouts)],
            geometry.rows(plan.batch, number),
            bool(deep) and isinstance(deep[0], Tensor),
            None if order is None else [order[i] for i in own],
            kept=[kept[i] for i in own],
            again=again,
        )
    return pruned


def _taken(features: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
    """Of each item [n, D] the rows that [n] bools say; all at once, as each waits for a device."""
    if len(features) < 2 or len({(one.device, one.shape[1:]) for one in features}) > 1:
        return [one[stays.to(one.device)] for one, stays in zip(features, kept, strict=True)]
    stays = torch.cat([one.to(features[0].device) for one in kept])
    ends = torch.tensor([0, *accumulate(map(len, kept))], device=stays.device)
    counts = nn.functional.pad(stays.cumsum(0), (1, 0))[ends].diff().tolist()
    return list(torch.cat(list(features))[stays].split(counts))


def _seen(attachment: Attachment, plan: Plan) -> Encoded:
    """Encoder outputs and the view, with all that the method reads."""
    geometry, question, media = plan.geometry, plan.question, attachment.family.media
    items = _layouts(attachment, geometry)
    acts = acting.acts_of(attachment.model, media, plan.brought, items, attachment.method)
    present = [bool(own) for own in items]
    read = attachment.method.reads
    reads = wanted(attachment.model, media, plan.brought, present, read, repr(attachment.method))
    if reads.question:
        question_state.check(question, geometry)
    if reads.relevance:
        relevance.check(attachment, reads.relevance, question, geometry)
    encoded = encode_items(
        attachment.model,
        media,
        attachment.originals,
        plan.brought,
        geometry,
        attachment.method.score,
        replace(reads, projected=reads.projected or bool(reads.relevance)),
        repr(attachment.method),
        acts,
        attachment.method.attends,
    )
    if reads.question:
        states = question_state.states(attachment, question, geometry)
        view = replace(encoded.view, question=states.to(encoded.view.features.device))
        words = "; ".join(filter(None, (encoded.score, question_state.WORDS)))
        encoded = replace(encoded, view=view, score=words)
    if not reads.relevance:
        return encoded
    likeness, words = relevance.to_cells(
        attachment, reads.relevance, question, geometry, encoded.view, reads.asked == "bare"
    )
    shown = encoded.view.projected if reads.projected else None
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
    last = _cell_tokens(geometry, selection.last)
    return [
        merging.order(one, stays, behind)
        for one, stays, behind in zip(geometry.layouts, kept, last, strict=True)
    ]


def _cell_tokens(geometry: Geometry, cells: Tensor) -> list[Tensor]:
    """Cells [crops, cells] as [n] bools over each item's visual tokens, those of no cell False."""
    found = kept_tokens(geometry.layouts, cells, "drop")
    return [own & (one.labels >= 0) for one, own in zip(geometry.layouts, found, strict=True)]
