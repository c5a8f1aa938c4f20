"""Turn one call into a shorter request: encode its images, choose, drop columns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune.cache import RaggedLayer
from vlmprune.encode import Plan, encode, plan, with_features
from vlmprune.errors import VlmpruneError
from vlmprune.inputs import ALIGNED, Prefix, Prompt, dropped_columns, images_per_row, join, shorten
from vlmprune.report import Report, make
from vlmprune.retaining import Retaining, row_lengths

if TYPE_CHECKING:
    from vlmprune.pruner import Handle

# The name under which a cache carries its Prefix; on the cache, so that a copy carries it too.
MARK = "vlmprune_prefix"
# Stands for the id of a column that a cache holds but nobody told us.
UNKNOWN = -1


@dataclass
class Active:
    """One call under way: what the host's own method will ask for.

    Attributes:
        handle: the attachment that made it.
        output: encoder output whose features are replaced; None if there are no images.
        features: pruned features of each image.
        rows: images of each row.
        last: [B] position of each row's last prompt column.
        drift: [B] to add to later positions where a row's last columns were dropped; None if 0.
        gapped: whether positions have gaps, which must not be taken for packing.
        images: number of images that are new in it.
        retaining: what is to be cut out of the cache; None for nothing.
        numbers: for each row, the number of each kept visual token among all that it brought.
    """

    handle: Handle
    output: Any
    features: list[Tensor]
    rows: list[int]
    last: Tensor
    drift: Tensor | None
    gapped: bool
    images: int = 0
    retaining: Retaining | None = None
    numbers: list[Tensor] = field(default_factory=list)

    def image_features(self, images: int) -> Any:
        """Pruned features, row by row, each row repeated if beams or samples repeat the rows."""
        times = max(1, images // max(1, sum(self.rows)))
        features, start = [], 0
        for count in self.rows:
            features += self.features[start : start + count] * times
            start += count
        return with_features(self.output, features)


active: ContextVar[Active | None] = ContextVar("vlmprune_active", default=None)


@dataclass(frozen=True)
class Prepared:
    """A request made shorter.

    Attributes:
        known: columns that a cache holds already, as the user counts them and as it does.
        prompt: [B, S] columns, those of the cache included.
        pixels: the inputs that hold images, without those that the cache holds.
        prefix: to be remembered with the cache.
        state: for the host's callbacks.
    """

    known: tuple[int, int]
    prompt: Prompt
    pixels: dict[str, Any]
    prefix: Prefix
    state: Active


def prepare(
    handle: Handle,
    ids: Tensor,
    mask: Tensor | None,
    given_positions: Tensor | None,
    cache: Any,
    inputs: Mapping[str, Any],
    plain: bool,
    caching: bool = True,
) -> Prepared:
    """Encode the images of a request, choose, and shorten its columns.

    Args:
        handle: the attachment.
        ids: [B, L] ids, or those of the new columns alone.
        mask: [B, L] mask over all columns, or None for ones.
        given_positions: the user's own positions of the columns in `ids`, or None.
        cache: the cache to continue, or None.
        inputs: all inputs of the call.
        plain: whether positions count columns (a plain forward) or real tokens (`generate`).
        caching: whether the call fills a cache.
    """
    cached = cache.get_seq_length() if cache is not None else 0
    # Ids may come with or without the columns that the cache holds.
    whole = not (plain and cached > 0) and (mask is None or mask.shape[1] == ids.shape[1])
    prefix = _prefix(cache, cached, ids, whole, mask, handle.pad_id)
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
                "the ids do not begin with what past_key_values was filled with; pass the full "
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

    steps = torch.ones_like(mask[:, start:]) if plain else mask[:, start:].long()
    local = prefix.next_position[:, None] + steps.cumsum(dim=1) - 1
    local = local if plain else local.masked_fill(mask[:, start:] == 0, 0)
    between = Prompt(_known(seen[:, start:], handle.pad_id), mask[:, start:known], local[:, :tail])
    positions = local[:, tail:]
    if given_positions is not None:
        own = given_positions[..., -ids.shape[1] :].expand(ids.shape[0], -1)
        positions = own.to(ids.device) - prefix.shift[:, None]
    aligned = {
        name: inputs[name][:, -ids.shape[1] :]
        for name in ALIGNED
        if isinstance(inputs.get(name), Tensor)
    }
    new = Prompt(ids, mask[:, known:], positions, aligned)

    visual = ids == handle.image_token_id
    inputs = _only_new_images(handle, inputs, prefix.images, visual)
    planned = plan(handle.model, handle.family, inputs) if inputs else Plan((), (0, 0))
    _check_flash(handle, ids)
    rows = images_per_row(visual, planned.lengths)
    if handle.pruner.cuts and planned.layouts and caching:
        _check_prompt(handle, join(join(prefix.prompt, between), new), visual, rows, cache)
    kept, output, features = _choose(handle, inputs, planned, rows)
    dropped = dropped_columns(visual, kept)
    short, following = shorten(new, dropped, handle.positions, handle.pad_id)
    prompt = join(join(prefix.prompt, between), short)
    last = prompt.positions.masked_fill(prompt.mask == 0, -1).amax(dim=1)
    drift = following - last - 1
    shift = prefix.shift
    if handle.positions == "compact":
        shift = shift + dropped.sum(dim=1)
    retaining = None
    if handle.pruner.cuts and kept and caching:
        retaining = _retaining(handle, prompt, short, kept, rows)
    return Prepared(
        (known, cached),
        prompt,
        {name: inputs[name] for name in handle.family.pixel_inputs if name in inputs},
        Prefix(torch.cat((seen, ids), dim=1), prompt, following, prefix.images + len(kept), shift),
        Active(
            handle,
            output,
            features,
            rows,
            last,
            drift if bool((drift != 0).any()) else None,
            handle.positions == "original" and bool(dropped.any()),
            len(kept),
            retaining,
            _by_row([k.nonzero()[:, 0] for k in kept], planned.lengths, rows) if retaining else [],
        ),
    )


def _check_prompt(
    handle: Handle, prompt: Prompt, visual: Tensor, rows: list[int], cache: Any
) -> None:
    """Let the method look at the size of the cache that it is to cut, before any work."""
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
    images = torch.tensor(rows, device=most.device)
    worst = int((most + images * heads).argmax())
    token_bytes = 2 * head_dim * (torch.finfo(handle.model.dtype).bits // 8)
    handle.pruner.check_prompt(int(most[worst]), rows[worst], heads, token_bytes)


def _retaining(
    handle: Handle, prompt: Prompt, short: Prompt, kept: list[Tensor], rows: list[int]
) -> Retaining:
    """The cut of a prompt's cache."""
    visual = torch.zeros_like(prompt.mask, dtype=torch.bool)
    visual[:, prompt.mask.shape[1] - short.mask.shape[1] :] = (
        short.ids == handle.image_token_id
    ) & (short.mask != 0)
    flat = iter([int(k.sum()) for k in kept])
    lengths = [[next(flat) for _ in range(images)] for images in rows]
    return Retaining(handle.pruner, prompt.mask, visual, lengths)


def _by_row(numbers: list[Tensor], lengths: list[int], rows: list[int]) -> list[Tensor]:
    """Kept tokens of each row, counted over all its images' tokens."""
    out, image = [], 0
    for images in rows:
        parts, before = [torch.zeros(0, dtype=torch.long)], 0
        for _ in range(images):
            parts.append(numbers[image].cpu() + before)
            before += lengths[image]
            image += 1
        out.append(torch.cat(parts))
    return out


def _choose(
    handle: Handle, inputs: Mapping[str, Any], planned: Plan, rows: list[int]
) -> tuple[list[Tensor], Any, list[Tensor]]:
    """Encode and select; returns kept [n] bools, the encoder's output and pruned features."""
    if not planned.layouts:
        return [], None, []
    if not handle.pruner.shortens:
        # The host encodes by itself, in its own time; every token goes on.
        kept = [torch.ones_like(one.labels, dtype=torch.bool) for one in planned.layouts]
        handle.report = _report(handle, planned, kept, [{} for _ in kept], rows, inputs, "", 0.0)
        return kept, None, []
    handle.pruner.check_request(planned.candidates, planned.images)
    encoded = encode(handle.model, handle.host.original("get_image_features"), inputs, planned)
    _synchronize(encoded.view.attention)
    begin = time.perf_counter()
    selection = handle.pruner.select(encoded.view)
    crops = [one.crops for one in planned.layouts]
    kept = [
        one.to_tokens(cells)
        for one, cells in zip(planned.layouts, selection.kept.split(crops), strict=True)
    ]
    _synchronize(encoded.view.attention)
    seconds = time.perf_counter() - begin
    features = [f[k.to(f.device)] for f, k in zip(encoded.output.pooler_output, kept, strict=True)]
    patch_of = [one.labels.clamp(min=0) for one in planned.layouts]
    roles: list[dict[str, Tensor]] = [{} for _ in kept]
    for name, cells in selection.roles.items():
        for image, part in enumerate(cells.split(crops)):
            on_patch = planned.layouts[image].labels >= 0
            roles[image][name] = part.flatten()[patch_of[image]] & on_patch
    handle.report = _report(handle, planned, kept, roles, rows, inputs, encoded.score, seconds)
    return kept, encoded.output, features


def _report(
    handle: Handle,
    planned: Plan,
    kept: list[Tensor],
    roles: list[dict[str, Tensor]],
    rows: list[int],
    inputs: Mapping[str, Any],
    score: str,
    seconds: float,
) -> Report:
    return make(
        config=handle.model.config,
        method=repr(handle.pruner),
        positions=handle.positions,
        score=score,
        layouts=list(planned.layouts),
        kept=kept,
        roles=roles,
        rows=rows,
        pixels=tuple(inputs["pixel_values"].shape[-2:]),
        dtype=handle.model.dtype,
        seconds=seconds,
    )


def mark(cache: Any) -> Prefix | None:
    """What a cache was filled with under a pruner, if it was."""
    return getattr(cache, MARK, None)


def remember(cache: Any, prefix: Prefix, refusal: str = "") -> None:
    """Put on a cache what it was filled with, or why it cannot be continued."""
    if cache is not None and hasattr(cache, "get_seq_length"):
        setattr(cache, MARK, replace(prefix, refusal=refusal or prefix.refusal))


def _known(ids: Tensor, pad_id: int) -> Tensor:
    """Ids that the host may see: those that nobody knows become padding."""
    return ids.masked_fill(ids == UNKNOWN, pad_id)


def _prefix(
    cache: Any, cached: int, ids: Tensor, whole: bool, mask: Tensor | None, pad_id: int
) -> Prefix:
    """The record of a cache; an empty one without a cache, a plain one for any other cache."""
    known = mark(cache)
    if known is not None and cached > 0:
        if known.refusal:
            raise VlmpruneError(
                f"this cache cannot be continued: {known.refusal}; start with a fresh one."
            )
        if cached < known.prompt.ids.shape[1]:
            raise VlmpruneError(
                "past_key_values was cropped into its pruned prompt, whose columns cannot be told "
                "apart any more; crop later, or start with a fresh cache."
            )
        if known.full_ids.shape[0] != ids.shape[0]:
            raise VlmpruneError(
                f"the ids have {ids.shape[0]} rows but past_key_values was filled with "
                f"{known.full_ids.shape[0]}."
            )
        return known
    rows, device = ids.shape[0], ids.device
    held = ids[:, :cached] if whole else torch.full((rows, cached), UNKNOWN, device=device)
    real = torch.ones_like(held) if mask is None else mask[:, :cached].long()
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    zeros = torch.zeros(rows, dtype=torch.long, device=device)
    return Prefix(held, Prompt(_known(held, pad_id), real, positions), real.sum(dim=1), 0, zeros)


def _only_new_images(
    handle: Handle, inputs: Mapping[str, Any], known: int, visual: Tensor
) -> dict[str, Any]:
    """Inputs without the images that a cache holds already; empty if no image is new."""
    pixels = inputs.get("pixel_values")
    if pixels is None or not bool(visual.any()):
        if pixels is not None and known == 0:
            raise VlmpruneError(
                "pixel_values came without image placeholders in the ids; pass ids and pixels "
                "from one call of the model's own processor."
            )
        return {}
    inputs = dict(inputs)
    if known:
        # A processor that is given the whole conversation brings the earlier images again.
        lengths = plan(handle.model, handle.family, inputs).lengths
        if sum(lengths) != int(visual.sum()) and sum(lengths[known:]) == int(visual.sum()):
            for name in handle.family.pixel_inputs:
                inputs[name] = inputs[name][known:]
    return inputs


def _check_flash(handle: Handle, ids: Tensor) -> None:
    kind = handle.model.config.get_text_config()._attn_implementation or ""
    if "flash" in kind and handle.positions == "original" and ids.shape[0] == 1:
        raise VlmpruneError(
            f"positions='original' leaves gaps that {kind} takes for packed sequences at batch 1; "
            "load the model with attn_implementation='sdpa', or use positions='compact'."
        )


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
