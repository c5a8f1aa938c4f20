"""Which visual tokens a decode step reads: pure tensor functions, as `select` is.

Imports torch alone. Ties go to the lower index, so that CPU and GPU agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from vlmprune.select import retention, softmax

# What a choice costs on the CPU, in tokens that are read in place instead. Measured on one thread
# of an AMD EPYC (AVX-512) in float32, 1 to 4 samples, 2 to 32 KV heads, 256 to 8,192 tokens: some
# 0.9 ms a layer and 25 µs a head, where a token of a head with keys and values 256 wide takes
# 0.085 µs; one that is fetched costs a copy and a second read. What is narrower is read faster,
# but not chosen faster.
CALL_TOKENS, HEAD_TOKENS, FETCHED_TOKENS, WIDE = 10_000, 300, 2.0, 256
SCORING = {"int2": 0.27, "int4": 0.2, "int8": 0.22, "exact": 0.75}


@dataclass(frozen=True, eq=False)
class Groups:
    """The tokens of each image side by side, so that images are chosen from at once.

    Attributes:
        index: [B, I, n] int64; places of each image's tokens among V, ascending; those behind its
            last are 0. None where there is one image, or several of equal length, that fill V.
        shape: (I, n).
        short: [B, I, n] bool; True behind an image's last token; None where there is none.
        keep: [B, I] int64; how many are read of each image.
        most: the largest of these.
        even: whether all are alike.
    """

    index: Tensor | None
    shape: tuple[int, int]
    short: Tensor | None
    keep: Tensor
    most: int
    even: bool

    @classmethod
    def of(cls, images: Tensor, tokens: Tensor, keep: Tensor) -> Groups:
        """Of images [B, V], tokens [B, I] and keep [B, I]."""
        count, longest = tokens.shape[1], int(tokens.max()) if tokens.numel() else 0
        most = int(keep.max()) if keep.numel() else 0
        even = bool((keep == most).all())
        order = torch.arange(count, device=images.device).repeat_interleave(longest)
        filled = order.shape[0] == images.shape[1] and bool((images == order).all())
        if filled:
            return cls(None, (count, longest), None, keep, most, even)
        # Tokens of an image need not stand together: a later turn may bring more rows.
        stand = images.masked_fill(images < 0, count).sort(dim=1, stable=True).indices
        before = tokens.cumsum(dim=1) - tokens
        at = before[..., None] + torch.arange(longest, device=images.device)
        short = torch.arange(longest, device=images.device) >= tokens[..., None]
        index = stand.gather(1, at.clamp(max=images.shape[1] - 1).flatten(1)).view(at.shape)
        return cls(index.masked_fill(short, 0), (count, longest), short, keep, most, even)


def counts(read: int | float, tokens: Tensor, floor: int) -> Tensor:
    """How many tokens of each image a KV head reads at a step.

    Args:
        read: an int is a number, a float a share, half rounded up; at least one is read.
        tokens: [B, I] int64 visual tokens of each image; 0 where a sample has fewer images.
        floor: images with fewer tokens are read whole.

    Returns:
        [B, I] int64.
    """
    if isinstance(read, Integral):
        wanted = torch.full_like(tokens, int(read))
    else:
        # With room for float32's error in shares such as 0.1.
        wanted = (read * tokens + 0.5 + 1e-4).floor().long()
    return torch.where(tokens < floor, tokens, wanted.clamp(min=1).minimum(tokens))


def pays(tokens: float, read: float, rows: int, width: int, scoring: float) -> bool:
    """Whether a CPU is done sooner if it scores all tokens and reads some than if it reads all.

    All is counted in tokens of the same heads that are read in place.

    Args:
        tokens: visual tokens of a sample.
        read: how many of them are read.
        rows: KV heads of all samples.
        width: of a key and a value, D + Dv.
        scoring: what it takes to score a token, in tokens that are 256 wide.
    """
    spent = CALL_TOKENS / rows + HEAD_TOKENS + scoring * tokens
    return spent * WIDE / width + FETCHED_TOKENS * read < tokens


def products(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled products [B, Hq, V] float32 of a step's queries [B, Hq, D] and keys [B, H, V, D]."""
    return softmax.scores(query[:, :, None], keys, scale)[:, :, 0]


def weights(scores: Tensor, real: Tensor | None, heads: int, beside: Tensor | None) -> Tensor:
    """The mean attention that each KV head's query heads pay to each visual token.

    Args:
        scores: [B, Hq, V] float32; scaled products of a step's queries and the visual keys.
        real: [B, V] bool; False where a sample has fewer tokens. None where none has.
        heads: KV heads H.
        beside: [B, Hq] log of the sum of exponentials of what each query head sees besides: text
            and later tokens.

    Returns:
        [B, H, V] float32; 0 where there is no token.
    """
    if real is not None:
        scores = scores.masked_fill(~real[:, None], -torch.inf)
    if beside is None:
        found = scores.softmax(dim=-1).unflatten(1, (heads, -1)).mean(dim=2)
    else:
        found = _exponentials(scores, heads, beside)[0]
    return found if real is None else found.masked_fill(~real[:, None], 0.0)


def standing(
    scores: Tensor, real: Tensor | None, heads: int, beside: Tensor, totals: bool = True
) -> tuple[Tensor, Tensor | None]:
    """What a KV head's choice goes by, and how much all visual tokens weigh.

    It goes by `weights`, or by the scores where these have the same order, as they have where a KV
    head has one query head; they do not run together in the rounding of an exponential.

    Args:
        scores: as in `weights`.
        real: likewise.
        heads: likewise.
        beside: likewise.
        totals: whether the second is wanted.

    Returns:
        [B, H, V] float32, of any kind where there is no token; and the log of the sum of
        exponentials of each query head's scores [B, Hq], None where nobody wants it.
    """
    alone = scores.shape[1] == heads
    if alone and not totals:
        return scores, None
    known = scores if real is None else scores.masked_fill(~real[:, None], -torch.inf)
    found, total = _exponentials(known, heads, beside, weigh=not alone)
    return (scores if alone else found), total


def _exponentials(
    scores: Tensor, heads: int, beside: Tensor, weigh: bool = True
) -> tuple[Tensor, Tensor]:
    """`weights` (empty where nobody asks) and the log of the sums, by one pass of exponentials."""
    batch, _, tokens = scores.shape
    beside = beside.to(scores.dtype)
    most = torch.maximum(scores.amax(dim=-1), beside) if tokens else beside
    powers = (scores - most[..., None]).exp_()
    sums = powers.sum(dim=-1)
    total = sums.log() + most
    if not weigh:
        return powers, total
    # The mean over a group is a product with one row, which torch does fastest.
    each = (sums + (beside - most).exp()).reciprocal() * (heads / scores.shape[1])
    found = each.view(batch, heads, 1, -1) @ powers.view(batch, heads, -1, tokens)
    return found[:, :, 0], total


def chosen(found: Tensor, images: Tensor, keep: Tensor) -> Tensor:
    """[B, H, V] bool: the tokens of each image with the largest weights, in each KV head.

    Args:
        found: [B, H, V] as `standing` makes it.
        images: [B, V] int64; image of each token, -1 for none.
        keep: [B, I] int64 as `counts` makes it.
    """
    return retention.per_image(found, images, keep) & (images >= 0)[:, None]


def best(
    found: Tensor, groups: Groups, largest: Callable[[Tensor, Groups], Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same choice as `chosen`, as numbers of tokens.

    Args:
        found: [B, H, V] as `standing` makes it.
        groups: where the tokens of each image stand.
        largest: does what `in_order` does, in any order where groups are even.

    Returns:
        Places [B, H, k] int64 among V, image by image, in any order; and [B, 1, k] bool, False
        where an image has fewer to be read. None where none has.
    """
    (batch, heads, _), (count, longest) = found.shape, groups.shape
    if groups.index is None:
        rows = found.view(batch, heads, count, longest)
    else:
        at = groups.index.view(batch, 1, -1).expand(-1, heads, -1)
        rows = found.gather(2, at).view(batch, heads, count, longest)
    if groups.short is not None:
        rows = rows.masked_fill(groups.short[:, None], -torch.inf)
    most = groups.most
    order = (largest or in_order)(rows, groups)
    if groups.index is None:
        first = torch.arange(count, device=found.device)[:, None] * longest
        index = order + first
    else:
        index = groups.index[:, None].expand(-1, heads, -1, -1).gather(3, order)
    seen = None
    if not groups.even:
        number = torch.arange(most, device=found.device)
        seen = (number < groups.keep[..., None]).view(batch, 1, count * most)
    return index.flatten(2), seen


def in_order(rows: Tensor, groups: Groups) -> Tensor:
    """[B, H, I, k] places of the largest of rows [B, H, I, n], falling, ties to the lower place."""
    most = groups.most
    if rows.device.type != "cpu":
        # To ask whether there is a tie would wait for the device.
        return rows.sort(dim=3, descending=True, stable=True).indices[..., :most]
    values, order = rows.topk(most, dim=3)
    at = (groups.keep - 1).clamp(min=0)[:, None, :, None]
    least = values.gather(3, at.expand(-1, rows.shape[1], -1, -1))
    above = (rows >= least).sum(dim=3)
    # An image that there is not has nothing to tie.
    if bool(((above > groups.keep[:, None]) & (groups.keep[:, None] > 0)).any()):
        return rows.sort(dim=3, descending=True, stable=True).indices[..., :most]
    return order


def remainder(
    scores: Tensor,
    total: Tensor,
    index: Tensor,
    seen: Tensor | None,
    unread: Tensor,
    left: Tensor,
) -> tuple[Tensor, Tensor]:
    """What is not read, as one token: the mean of its values, and its share of attention.

    Args:
        scores: [B, Hq, V] float32; scaled products of a step's queries and the visual keys.
        total: [B, Hq] the log of the sum of their exponentials, as `standing` has it.
        index: [B, H, k] int64; what each KV head reads.
        seen: [B, 1, k] bool; False where a sample reads fewer; None where none does.
        unread: [B] int64; how many tokens a KV head does not read.
        left: [B, H, Dv] float32; the sum of their values.

    Returns:
        [B, Hq, Dv] float32, and the log of the sum of exponentials [B, Hq] float32; 0 and -inf
        where everything is read.
    """
    heads = index.shape[1]
    some = (unread > 0)[:, None, None]
    mean = torch.where(some, left / unread.clamp(min=1)[:, None, None], 0.0)
    grouped = scores.unflatten(1, (heads, -1))
    read = grouped.gather(3, index[:, :, None].expand(-1, -1, grouped.shape[2], -1))
    if seen is not None:
        read = read.masked_fill(~seen[:, :, None], -torch.inf)
    total = total.unflatten(1, (heads, -1))
    # All less what is read: where next to nothing is left, rounding may leave less than nothing.
    share = (read.logsumexp(dim=3) - total).exp()
    lse = total + torch.log1p(-share.clamp(max=1.0))
    lse = torch.where(some, lse, -torch.inf)
    return mean.repeat_interleave(grouped.shape[2], dim=1), lse.flatten(1, 2)


def mass(scores: Tensor, read: Tensor, real: Tensor, beside: Tensor) -> Tensor:
    """The share of each head's attention that falls on what is read, text and later tokens too.

    Args:
        scores: [B, Hq, V] float32; exact scaled products.
        read: [B, H, V] bool.
        real: [B, V] bool.
        beside: as in `weights`.

    Returns:
        [B, Hq] float32.
    """
    taken = read.repeat_interleave(scores.shape[1] // read.shape[1], dim=1)
    part = torch.logaddexp(scores.masked_fill(~taken, -torch.inf).logsumexp(dim=-1), beside)
    whole = scores.masked_fill(~real[:, None], -torch.inf).logsumexp(dim=-1)
    return (part - torch.logaddexp(whole, beside)).exp()
