"""Plan a call: which of its columns are new, which images they hold, and at which positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches, deltas, requests, sizes
from vlmprune.hosts.requests import ALIGNED, LABELS, ModelCall
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.runtime.call.refusals import check_flash, check_placed, check_positions
from vlmprune.runtime.call.remembered import prefix_of
from vlmprune.runtime.call.shorten import Prefix, Prompt, join, latest
from vlmprune.runtime.decoder.seen_layers import row_lengths
from vlmprune.runtime.encoder.relevance import Question
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.runtime.geometry import Geometry, geometry_of

# Stands for the id of a column that a cache holds but nobody told us.
UNKNOWN = -1


@dataclass(frozen=True)
class Asked:
    """A call that may be shortened.

    Attributes:
        call: the call, its arguments by name.
        ids: [B, L] ids, or those of the new columns alone.
        mask: [B, L] mask over all columns, or None for ones.
        cache: the cache to continue, or None.
        plain: whether positions count columns (a plain forward) or real tokens (`generate`).
        caching: whether the call fills a cache.
        vision: new images and videos as they were encoded before, instead of pixels.
    """

    call: ModelCall
    ids: Tensor
    mask: Tensor | None
    cache: Any
    plain: bool
    caching: bool = True
    vision: Vision | None = None


@dataclass(frozen=True)
class Plan:
    """What there is to shorten.

    Attributes:
        asked: the call.
        prefix: what its cache was filled with; of nothing where there is none.
        seen: [B, K] ids of the columns that the cache holds, as the user counts them.
        cached: columns that the cache holds, as it counts them.
        already: those columns as the host has them.
        new: [B, L] the user's new columns.
        after: [B] the position after what the cache holds.
        visual: [B, L] bool, the placeholders of the new images and videos.
        brought: for each modality of the family what the call brings of it; {} for nothing new.
        geometry: where the new images and videos lie.
        cuts: whether the method is to cut the cache that the call fills.
        texts: whether the host takes the new images' positions for those of text, as it does
            without token types, and remembers nothing of them.
    """

    asked: Asked
    prefix: Prefix
    seen: Tensor
    cached: int
    already: Prompt
    new: Prompt
    after: Tensor
    visual: Tensor
    brought: Sequence[Mapping[str, Any]]
    geometry: Geometry
    cuts: bool
    texts: bool = False

    @property
    def batch(self) -> int:
        """Rows of the call."""
        return self.new.ids.shape[0]

    @property
    def known(self) -> int:
        """Columns that the cache holds, as the user counts them."""
        return self.seen.shape[1]

    @property
    def question(self) -> Question:
        """The columns, for methods that look at the text."""
        labels = self.new.aligned.get(LABELS)
        answers = None if labels is None else labels != ALIGNED[LABELS]
        return Question(self.new.ids, self.new.mask != 0, self.visual, answers)


def planned(attachment: Attachment, asked: Asked) -> Plan:
    """Tell what the cache holds from what is new, and find the new images and videos.

    Raises:
        VlmpruneError: the call does not go with its cache, or with its images.
    """
    if attachment.family.counted and not attachment.as_it_comes:
        check_placed(attachment, asked.call)
    prefix, seen, mask, ids = _continued(attachment, asked)
    known, start = seen.shape[1], prefix.full_ids.shape[1]
    tail = known - start
    new_mask = mask[:, known:]
    answered = prefix.answered(ids, known)
    each = _of_one_kind(
        attachment, asked, [(ids == token) & ~answered for token in attachment.tokens]
    )
    if bool((torch.stack(each).any(dim=0) & (new_mask == 0)).any()):
        raise VlmpruneError(
            "attention_mask hides image placeholders, whose features would then go to others; "
            "leave those images out of the prompt."
        )
    brought: Sequence[Mapping[str, Any]]
    if asked.vision is None:
        brought = _new_items(attachment, asked.call, prefix.items, each)
        # Placeholders without pixels, as an answer may have them, are text to the host.
        each = [one & bool(given) for one, given in zip(each, brought, strict=True)]
        geometry = geometry_of(attachment.model, attachment.family.media, brought, each)
    else:
        brought, geometry = asked.vision.brought(attachment, asked.call.given, each)
    if geometry.items and bool(
        torch.stack([(ids == token) & answered for token in attachment.tokens]).any()
    ):
        raise VlmpruneError(
            "the answer before holds an image placeholder that the model generated itself, which "
            "it would take for one of the new images; leave that token out of the ids."
        )

    local = _counted(prefix, mask[:, start:], asked.plain)
    held = _told(seen[:, start:], attachment.pad_id)
    rope = attachment.family.rope is not None
    between = Prompt(held, mask[:, start:known], as_three(local[:, :tail], rope))
    after = prefix.next_position
    if tail:
        after = torch.maximum(latest(between) + 1, after)
    positions, texts = as_three(local[:, tail:], rope), False
    if attachment.family.counted:
        # The host makes them by itself.
        pass
    elif asked.call.positions is not None:
        own = _given_positions(attachment, asked.call.positions, ids)
        positions = as_three(own, rope) - prefix.shift[:, None]
        positions = positions - attachment.family.first * asked.plain
    elif attachment.family.rope is not None and geometry.items:
        found = attachment.family.rope(attachment.model, ids, new_mask, brought, asked.plain)
        texts = found is None
        if found is not None:
            positions = (found + after[:, None]).masked_fill(new_mask == 0, 0)
    aligned = requests.aligned_of(asked.call, ids.shape[1], mask.shape[1])
    if not attachment.family.counted:
        check_flash(attachment, ids)
    plan = Plan(
        asked,
        prefix,
        seen,
        start_of(asked),
        join(prefix.prompt, between),
        Prompt(ids, new_mask, positions, aligned),
        after,
        torch.stack(each).any(dim=0),
        brought,
        geometry,
        attachment.method.cuts and asked.caching and bool(geometry.items),
        texts,
    )
    if plan.cuts:
        _check_prompt(attachment, plan)
    return plan


def _check_prompt(attachment: Attachment, plan: Plan) -> None:
    """Let the method look at the size of the cache that it is to cut, before any work."""
    for heads, values in sizes.kv_sizes(attachment.model.config, attachment.cuttable):
        _check_sizes(attachment, plan, heads, 2 * values * attachment.model.dtype.itemsize)


def _check_sizes(attachment: Attachment, plan: Plan, heads: int, token_bytes: int) -> None:
    """The same of layers with so many KV heads, and bytes of a token's key and value in one."""
    items = plan.geometry.rows(plan.batch)
    stays = torch.cat((plan.already.mask, plan.new.mask), dim=1) != 0
    stays[:, stays.shape[1] - plan.visual.shape[1] :] &= ~plan.visual
    held = [stays.sum(dim=1) * heads]
    for layer in caches.layers_of(plan.asked.cache):
        if isinstance(layer, RaggedLayer) and layer.numbers is not None:
            # Of an earlier turn, what the layer holds counts, not what it has seen.
            tail = stays[:, layer.start :].sum(dim=1) * heads
            held.append(layer.sharing.summed(row_lengths(layer.numbers).to(tail.device)) + tail)
    most = torch.stack(held[1:] or held).amax(dim=0)
    worst = int((most + torch.tensor(items, device=most.device) * heads).argmax())
    attachment.method.check_prompt(int(most[worst]), items[worst], heads, token_bytes)


def start_of(asked: Asked) -> int:
    """Columns that the call's cache has seen."""
    return caches.length_of(asked.cache)


def as_three(positions: Tensor, rope: bool) -> Tensor:
    """[B, L] positions as [3, B, L] for a model that has three."""
    return positions.expand(3, -1, -1) if rope and positions.ndim == 2 else positions


def _continued(attachment: Attachment, asked: Asked) -> tuple[Prefix, Tensor, Tensor, Tensor]:
    """What the cache was filled with, ids [B, K] of its columns, the mask, and the new ids.

    Raises:
        VlmpruneError: the ids or the mask do not go with the cache.
    """
    ids, mask, cached = asked.ids, asked.mask, start_of(asked)
    # Ids may come with or without the columns that the cache holds.
    whole = not (asked.plain and cached > 0) and (mask is None or mask.shape[1] == ids.shape[1])
    prefix = _prefix(attachment, asked, whole)
    tail, start = cached - prefix.prompt.ids.shape[1], prefix.full_ids.shape[1]
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
    return prefix, seen, mask, ids


def _prefix(attachment: Attachment, asked: Asked, whole: bool) -> Prefix:
    """The record of a cache; an empty one without a cache, a plain one for any other cache."""
    ids, mask, cached, known = asked.ids, asked.mask, start_of(asked), prefix_of(asked.cache)
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
        ahead = deltas.deltas_of(attachment.model)
        if ahead is not None and rows % len(ahead) == 0:
            ahead = ahead.to(device).repeat_interleave(rows // len(ahead), dim=0)
            positions, following = positions + ahead, following + ahead[:, 0]
    zeros = torch.zeros(rows, dtype=torch.long, device=device)
    prompt = Prompt(_told(held, attachment.pad_id), real, as_three(positions.clamp(min=0), rope))
    return Prefix(held, prompt, following, (0,) * len(attachment.tokens), zeros)


def _of_one_kind(attachment: Attachment, asked: Asked, each: list[Tensor]) -> list[Tensor]:
    """For each modality its placeholders, of modalities that share one those of what is brought.

    Args:
        attachment: of the method to the model.
        asked: the call.
        each: for each modality [B, L] bool, the columns with its placeholder's id.

    Raises:
        VlmpruneError: the call brings several modalities that share one.
    """
    media, tokens, vision = attachment.family.media, attachment.tokens, asked.vision
    if len(set(tokens)) == len(tokens):
        return each
    there = [
        asked.call.brings(one.inputs[0]) if vision is None else vision.holds(one.kind)
        for one in media
    ]
    kinds = [f"{one.kind}s" for one, brought in zip(media, there, strict=True) if brought]
    if len(kinds) > 1:
        raise VlmpruneError(
            f"{type(attachment.model).__name__} has one placeholder for {' and '.join(kinds)}, so "
            "that a call can bring either; ask about them in calls of their own, and in a later "
            "turn pass the new ones alone."
        )
    return [columns & brought for columns, brought in zip(each, there, strict=True)]


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


def _counted(prefix: Prefix, mask: Tensor, plain: bool) -> Tensor:
    """[B, L] positions that go on from a cache, of columns whose mask is given."""
    steps = torch.ones_like(mask) if plain else mask.long()
    local = prefix.next_position[:, None] + steps.cumsum(dim=1) - 1
    return local if plain else local.masked_fill(mask == 0, 0)


def _given_positions(attachment: Attachment, given: Tensor, ids: Tensor) -> Tensor:
    """[B, L] or [3, B, L] positions of the new columns, of those that the user gave."""
    check_positions(attachment, given)
    own = given[..., -ids.shape[1] :].to(ids.device)
    return own[-3:] if own.ndim == 3 else own.expand(ids.shape[0], -1)


def _told(ids: Tensor, pad_id: int) -> Tensor:
    """Ids that the host may see: those that nobody knows become padding."""
    return ids.masked_fill(ids == UNKNOWN, pad_id)
