"""Turn one call into a shorter request: encode its images, choose, drop columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches, config, requests
from vlmprune.hosts.requests import ALIGNED, LABELS, ModelCall
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.call.choose import check_prompt, choose, columns_of
from vlmprune.runtime.call.shorten import (
    Prefix,
    Prompt,
    dropped_columns,
    join,
    latest,
    shorten,
    stands_for,
)
from vlmprune.runtime.call.state import Active, Progress
from vlmprune.runtime.decoder.cache_cut import CacheCut
from vlmprune.runtime.decoder.missing_rows import MissingRows
from vlmprune.runtime.encoder.relevance import Question
from vlmprune.runtime.encoder.visions import Vision, gather
from vlmprune.runtime.geometry import Geometry, geometry_of

# The name under which a cache carries its Prefix; on the cache, so that a copy carries it too.
PREFIX_ATTRIBUTE = "vlmprune_prefix"
# Stands for the id of a column that a cache holds but nobody told us.
UNKNOWN = -1


@dataclass(frozen=True)
class Prepared:
    """A request made shorter.

    Attributes:
        known: columns that a cache holds already, as the user counts them and as it does.
        prompt: [B, S] columns, those of the cache included.
        pixels: the inputs that hold images, without those that the cache holds.
        prefix: to be remembered with the cache.
        state: for the host's callbacks.
        vision: makes of it what later requests can take instead of pixels.
        columns: [B, L] which of its new columns stands for each that the user gave; None where
            they are the same.
    """

    known: tuple[int, int]
    prompt: Prompt
    pixels: dict[str, Any]
    prefix: Prefix
    state: Active
    vision: Callable[[], Vision]
    columns: Tensor | None = None


def prepare(
    attachment: Attachment,
    ids: Tensor,
    mask: Tensor | None,
    given_positions: Tensor | None,
    cache: Any,
    call: ModelCall,
    plain: bool,
    caching: bool = True,
    vision: Vision | None = None,
) -> Prepared:
    """Encode the images of a request, choose, and shorten its columns.

    Args:
        attachment: of the method to the model.
        ids: [B, L] ids, or those of the new columns alone.
        mask: [B, L] mask over all columns, or None for ones.
        given_positions: the user's own positions of the columns in `ids`, or None.
        cache: the cache to continue, or None.
        call: the call itself.
        plain: whether positions count columns (a plain forward) or real tokens (`generate`).
        caching: whether the call fills a cache.
        vision: new images and videos as they were encoded before, instead of pixels.
    """
    cached, inputs = caches.length_of(cache), call.given
    # Ids may come with or without the columns that the cache holds.
    whole = not (plain and cached > 0) and (mask is None or mask.shape[1] == ids.shape[1])
    prefix = _prefix(attachment, cache, cached, ids, whole, mask)
    tail = cached - prefix.prompt.ids.shape[1]
    start = prefix.full_ids.shape[1]
    known = start + tail
    if mask is None:
        columns = ids.shape[1] if whole else known + ids.shape[1]
        mask = torch.ones(ids.shape[0], columns, dtype=torch.long, device=ids.device)
    if whole:
        seen, ids = ids[:, :known], ids[:, known:]
        expected = prefix.full_ids[:, : seen.shape[1]]
        if (
            seen.shape[1] < known
            or ids.shape[1] == 0
            or bool(((seen[:, :start] != expected) & (expected != UNKNOWN)).any())
        ):
            raise VlmpruneError(
                "the ids do not begin with what the cache was filled with; pass the full "
                "earlier sequence followed by new tokens, or a fresh cache."
            )
    else:
        unknown = torch.full((ids.shape[0], tail), UNKNOWN, device=ids.device)
        seen = torch.cat((prefix.full_ids, unknown), dim=1)
    if mask.shape[1] != known + ids.shape[1]:
        raise VlmpruneError(
            f"attention_mask has {mask.shape[1]} columns where {known + ids.shape[1]} are due: "
            f"{known} of the cache, counted before pruning, and {ids.shape[1]} new ones."
        )

    rope = attachment.family.rope is not None
    new_mask = mask[:, known:]
    visual = [ids == token for token in attachment.tokens]
    if bool((torch.stack(visual).any(dim=0) & (new_mask == 0)).any()):
        raise VlmpruneError(
            "attention_mask hides image placeholders, whose features would then go to others; "
            "leave those images out of the prompt."
        )
    if vision is None:
        brought = _new_items(attachment, call, prefix.items, visual)
        geometry = geometry_of(attachment.model, attachment.family.media, brought, visual)
    else:
        brought, geometry = vision.brought(attachment, inputs, visual)

    steps = torch.ones_like(mask[:, start:]) if plain else mask[:, start:].long()
    local = prefix.next_position[:, None] + steps.cumsum(dim=1) - 1
    local = local if plain else local.masked_fill(mask[:, start:] == 0, 0)
    held = _known(seen[:, start:], attachment.pad_id)
    between = Prompt(held, mask[:, start:known], _three(local[:, :tail], rope))
    positions = _three(local[:, tail:], rope)
    after = prefix.next_position if not tail else _after(between, prefix)
    if given_positions is not None:
        own = given_positions[..., -ids.shape[1] :].to(ids.device)
        own = own[-3:] if own.ndim == 3 else own.expand(ids.shape[0], -1)
        positions = _three(own, rope) - prefix.shift[:, None] - attachment.family.first * plain
    elif attachment.family.rope is not None and geometry.items:
        found = attachment.family.rope(attachment.model, ids, new_mask, visual, brought)
        positions = (found + after[:, None]).masked_fill(new_mask == 0, 0)
    aligned = {
        name: inputs[name][:, -ids.shape[1] :]
        for name in ALIGNED
        if name in inputs and isinstance(inputs[name], Tensor)
    }
    new = Prompt(ids, new_mask, positions, aligned)
    already = join(prefix.prompt, between)

    _check_flash(attachment, ids)
    cutting = attachment.method.cuts and caching and bool(geometry.items)
    if cutting:
        any_visual = torch.stack(visual).any(dim=0)
        rows = geometry.rows(ids.shape[0])
        check_prompt(attachment, join(already, new), any_visual, rows, cache)
    answers = None if LABELS not in aligned else aligned[LABELS] != ALIGNED[LABELS]
    question = Question(ids, new_mask != 0, torch.stack(visual).any(dim=0), answers)
    kept, pruned = choose(attachment, brought, geometry, ids.shape[0], vision, question)
    dropped = dropped_columns(ids, [item.span for item in geometry.items], kept)
    short, following = shorten(new, dropped, attachment.positions, attachment.pad_id)
    # A row that brings padding alone stays where it was.
    following = torch.where((new_mask != 0).any(dim=1), following, after)
    prompt = join(already, short)
    for name, values in short.aligned.items():
        if inputs[name].shape[1] == mask.shape[1]:
            # It came for all columns, and the host looks values up by column. Of earlier columns
            # none can matter any more.
            before = prompt.ids.shape[1] - values.shape[1]
            prompt.aligned[name] = nn.functional.pad(values, (before, 0), value=ALIGNED[name])
    last = latest(prompt)
    drift, due = following - last - 1, following
    if rope:
        # The host counts on from the last column, in each of the three by itself.
        drift = new.positions[..., -1] - short.positions[..., -1]
        due = new.positions[..., -1] + 1
    shift = prefix.shift
    if attachment.positions == "compact":
        shift = shift + dropped.sum(dim=1)
    counts = tuple(before + len(geometry.of(number)) for number, before in enumerate(prefix.items))
    pixels = _pixels(attachment, brought, geometry, kept, set(pruned))
    lacking = bool(attachment.asks or attachment.skips) and bool(geometry.items)
    cut, numbers, drops = None, list[Tensor](), None
    if cutting or lacking:
        places = columns_of(attachment, prompt, short, geometry, kept, pruned)
    if cutting:
        cut, numbers = CacheCut(attachment.method, prompt.mask, places), places.row_numbers
    if lacking:
        drops = MissingRows(
            attachment.method.dropper,
            attachment.asks,
            attachment.skips,
            attachment.decoder_positions,
            prompt.mask != 0,
            places,
        )
    return Prepared(
        (known, cached),
        prompt,
        pixels,
        Prefix(torch.cat((seen, ids), dim=1), prompt, following, counts, shift),
        Active(
            attachment,
            pruned,
            last + attachment.family.first,
            drift if bool((drift != 0).any()) else None,
            attachment.positions == "original" and not rope and bool(dropped.any()),
            len(geometry.items),
            cut,
            numbers,
            ids.shape[0],
            columns=prompt.ids.shape[1],
            dropping=drops,
            report=attachment.report if geometry.items else None,
            progress=Progress(
                handed(prompt, slice(cached, None)) + attachment.family.first,
                due + attachment.family.first,
                prompt.ids.shape[1],
                prompt.ids[:, cached:],
            ),
        ),
        lambda: gather(attachment, geometry, brought, kept, pruned),
        stands_for(new, dropped),
    )


def _after(between: Prompt, prefix: Prefix) -> Tensor:
    """[B] position after the columns that a cache holds behind its prompt."""
    return torch.maximum(latest(between) + 1, prefix.next_position)


def handed(prompt: Prompt, columns: slice = slice(None)) -> Tensor:
    """Positions as the host takes them.

    Models with three positions a column take a fourth first, which only tells where packed
    sequences begin; it counts columns, for gaps would look like a beginning.
    """
    if prompt.positions.ndim == 2:
        return prompt.positions[:, columns]
    plain = (prompt.mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return torch.cat((plain[None], prompt.positions))[..., columns]


def _three(positions: Tensor, rope: bool) -> Tensor:
    """[B, L] positions as [3, B, L] for a model that has three."""
    return positions.expand(3, -1, -1) if rope and positions.ndim == 2 else positions


def prefix_of(cache: Any) -> Prefix | None:
    """What a cache was filled with under a pruner, if it was."""
    return None if cache is None else vars(cache).get(PREFIX_ATTRIBUTE)


def remember(cache: Any, prefix: Prefix, refusal: str = "") -> None:
    """Put on a cache what it was filled with, or why it cannot be continued."""
    if caches.is_cache(cache):
        setattr(cache, PREFIX_ATTRIBUTE, replace(prefix, refusal=refusal or prefix.refusal))


def leave_deltas(attachment: Attachment, prefix: Prefix, positions: Any) -> None:
    """Let the host count on by itself, as it may after a call that was given no positions.

    A model with three positions a column keeps, from one call to the next, how far they are from
    the number of its columns, of which there are fewer now.
    """
    if attachment.family.rope is not None and positions is None:
        ahead = prefix.next_position - (prefix.prompt.mask != 0).sum(dim=1)
        requests.set_deltas(attachment.model, ahead[:, None])


def _known(ids: Tensor, pad_id: int) -> Tensor:
    """Ids that the host may see: those that nobody knows become padding."""
    return ids.masked_fill(ids == UNKNOWN, pad_id)


def _prefix(
    attachment: Attachment, cache: Any, cached: int, ids: Tensor, whole: bool, mask: Tensor | None
) -> Prefix:
    """The record of a cache; an empty one without a cache, a plain one for any other cache."""
    known = prefix_of(cache)
    if known is not None and cached > 0:
        if known.refusal:
            raise VlmpruneError(
                f"this cache cannot be continued: {known.refusal}; start with a fresh one."
            )
        if cached < known.prompt.ids.shape[1]:
            raise VlmpruneError(
                "the cache was cropped into its pruned prompt, whose columns cannot be told "
                "apart any more; crop later, or start with a fresh cache."
            )
        if known.full_ids.shape[0] != ids.shape[0]:
            raise VlmpruneError(
                f"the ids have {ids.shape[0]} rows but the cache was filled with "
                f"{known.full_ids.shape[0]}."
            )
        return known
    rows, device = ids.shape[0], ids.device
    rope = attachment.family.rope is not None
    held = ids[:, :cached] if whole else torch.full((rows, cached), UNKNOWN, device=device)
    real = torch.ones_like(held) if mask is None else mask[:, :cached].long()
    positions = real.cumsum(dim=1) - 1
    following = real.sum(dim=1)
    if rope and cached:
        # Of a cache that the host filled by itself it remembers how far positions are from columns.
        ahead = requests.deltas_of(attachment.model)
        if ahead is not None and rows % len(ahead) == 0:
            ahead = ahead.to(device).repeat_interleave(rows // len(ahead), dim=0)
            positions, following = positions + ahead, following + ahead[:, 0]
    zeros = torch.zeros(rows, dtype=torch.long, device=device)
    prompt = Prompt(_known(held, attachment.pad_id), real, _three(positions.clamp(min=0), rope))
    return Prefix(held, prompt, following, (0,) * len(attachment.tokens), zeros)


def _new_items(
    attachment: Attachment, call: ModelCall, known: tuple[int, ...], visual: list[Tensor]
) -> list[dict[str, Any]]:
    """For each modality the inputs without items that a cache holds already; {} if none is new."""
    out: list[dict[str, Any]] = []
    for medium, before, columns in zip(attachment.family.media, known, visual, strict=True):
        brought = call.brings(medium.inputs[0])
        if not brought or not bool(columns.any()):
            if brought and before == 0:
                raise VlmpruneError(
                    f"{medium.inputs[0]} came without {medium.kind} placeholders in the ids; pass "
                    "ids and pixels from one call of the model's own processor."
                )
            out.append({})
            continue
        # A processor that is given the whole conversation brings the earlier items again.
        out.append(dict(medium.new(attachment.model, call.given, before, columns)))
    return out


def _pixels(
    attachment: Attachment,
    brought: list[dict[str, Any]],
    geometry: Geometry,
    kept: list[Tensor],
    pruned: set[str],
) -> dict[str, Any]:
    """The inputs that hold new items, as the host is given them.

    Args:
        attachment: of the method to the model.
        brought: for each modality the request's inputs.
        geometry: that of the items.
        kept: of each item.
        pruned: the host's methods whose output is pruned.
    """
    out: dict[str, Any] = {}
    for number, (medium, given) in enumerate(zip(attachment.family.media, brought, strict=True)):
        if given and medium.method in pruned:
            own = geometry.of(number)
            layouts = [geometry.items[i].layout for i in own]
            given = given | medium.left(given, layouts, [kept[i] for i in own])
        out |= {name: given[name] for name in medium.inputs if name in given}
    return out


def _check_flash(attachment: Attachment, ids: Tensor) -> None:
    kind = config.attention_implementation(config.of_text(attachment.model.config))
    gaps = attachment.positions == "original" and attachment.family.rope is None
    if "flash" in kind and gaps and ids.shape[0] == 1:
        raise VlmpruneError(
            f"positions='original' leaves gaps that {kind} takes for packed sequences at batch 1; "
            "load the model with attn_implementation='sdpa', or use positions='compact'."
        )
