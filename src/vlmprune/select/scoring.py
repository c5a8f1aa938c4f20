"""Scores of visual tokens, and the places of a regular grid: what methods rank or lay out.

Pure functions over all crops of a request, [crops, N]. They import torch alone, break ties by
index, and none holds more than a few times its input. Those that lay out a grid work on whole
numbers in Python.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def summed(layers: Sequence[Tensor]) -> Tensor:
    """VTC-CLS's score: attention of several encoder layers added up, in their order.

    Args:
        layers: each [crops, N].

    Returns:
        [crops, N] float32.
    """
    total = layers[0].float()
    for layer in layers[1:]:
        total = total + layer.float()
    return total


def most_varied(received: Tensor, given: Tensor, candidates: Tensor) -> Tensor:
    """FoPru's significance: of two score maps, for each crop the one that varies more.

    Args:
        received: [crops, N]; column means of the patch-to-patch attention.
        given: [crops, N]; its row means.
        candidates: [crops, N] bool; the variance is taken over these.

    Returns:
        [crops, N] float32; of equals `received`.
    """
    received, given = received.float(), given.float()
    more = _variance(given, candidates) > _variance(received, candidates)
    return torch.where(more, given, received)


def _variance(scores: Tensor, candidates: Tensor) -> Tensor:
    """[crops, 1] variance over the candidates, times their number."""
    count = candidates.sum(dim=1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~candidates, 0).sum(dim=1, keepdim=True) / count
    off = (scores - mean).masked_fill(~candidates, 0)
    return (off * off).sum(dim=1, keepdim=True)


def grid_boxes(candidates: Tensor, columns: Tensor) -> Tensor:
    """[crops, 4] int64; first row, first column, rows and columns that hold candidates.

    Args:
        candidates: [crops, N] bool.
        columns: [crops] int64; columns of each crop's grid.
    """
    N = candidates.shape[1]
    cell = torch.arange(N, device=candidates.device)
    sides = []
    for place in (cell // columns[:, None], cell % columns[:, None]):
        first = place.masked_fill(~candidates, N).amin(dim=1)
        sides.append((first, place.masked_fill(~candidates, -1).amax(dim=1) + 1 - first))
    (top, rows), (left, across) = sides
    return torch.stack((top, left, rows.clamp(min=0), across.clamp(min=0)), dim=1)


def row_counts(candidates: Tensor, columns: Tensor) -> Tensor:
    """[crops, N] int64; candidates of each row of a crop's grid, numbered from 0."""
    row = torch.arange(candidates.shape[1], device=candidates.device) // columns[:, None]
    return torch.zeros_like(row).scatter_add_(1, row, candidates.long())


def whole_rows(scores: Tensor, candidates: Tensor, columns: Tensor, keep: Tensor) -> Tensor:
    """FoPru's row strategy: the grid rows of the largest summed score, each as a whole.

    Args:
        scores: [crops, N].
        candidates: [crops, N] bool; rows without any are not kept.
        columns: [crops] int64; columns of each crop's grid.
        keep: [crops] int64; rows to keep.

    Returns:
        [crops, N] bool; the candidates of the kept rows.
    """
    place = torch.arange(scores.shape[1], device=scores.device)
    row = place // columns[:, None]
    # Added up as whole numbers of 2^-40, so that the order of adding cannot matter.
    whole = (scores.masked_fill(~candidates, 0).double() * 2**40).round().long()
    total = torch.zeros_like(whole).scatter_add_(1, row, whole)
    empty = row_counts(candidates, columns) == 0
    total = total.masked_fill(empty, torch.iinfo(torch.int64).min)
    order = total.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    return (rank < keep[:, None]).gather(1, row) & candidates


def relevance(cosine: Tensor, candidates: Tensor, images: Tensor) -> Tensor:
    """CDPruner's relevance: the negated cosine to the question, from 0 to 1 over each image.

    Args:
        cosine: [crops, N]; mean cosine to the parts of the question.
        candidates: [crops, N] bool; the smallest and the largest are sought among these.
        images: [crops] int64; image of each crop.

    Returns:
        [crops, N] float32, not negative; 1 all over an image whose tokens are all alike.
    """
    score = -cosine.float()
    count = len(images)
    low = score.masked_fill(~candidates, torch.inf).amin(dim=1)
    high = score.masked_fill(~candidates, -torch.inf).amax(dim=1)
    least = low.new_full((count,), torch.inf).scatter_reduce_(0, images, low, "amin")[images]
    most = high.new_full((count,), -torch.inf).scatter_reduce_(0, images, high, "amax")[images]
    least, most = least[:, None], most[:, None]
    # The small number keeps the least relevant token above nothing, as in the authors' code.
    scaled = (score - least + 1e-6) / (most - least)
    return torch.where(most > least, scaled, 1.0).masked_fill(~candidates, 0)


def change(features: Tensor, images: Tensor) -> Tensor:
    """EVS's dissimilarity: 1 - cosine to the same cell of the frame before.

    Args:
        features: [crops, N, D]; the frames of a clip come one after the other.
        images: [crops] int64; clip of each frame.

    Returns:
        [crops, N] float32; infinite in the first frame of each clip.
    """
    features = features.float()
    first = torch.ones_like(images, dtype=torch.bool)
    first[1:] = images[1:] != images[:-1]
    found = torch.full(features.shape[:2], torch.inf, device=features.device)
    cosine = torch.nn.functional.cosine_similarity(features[1:], features[:-1], dim=-1)
    found[1:] = 1.0 - cosine
    return found.masked_fill(first[:, None], torch.inf)


def random_scores(features: Tensor, seed: int) -> Tensor:
    """[crops, cells] float64 on the CPU; for each crop numbers in [0, 1) that its content seeds.

    Another picture is given other numbers, the same picture the same, in any batch. What stands
    for the content is which channels are positive on average, so that rounding, which differs
    between devices, hardly ever changes it. Drawn on the CPU whatever the device.

    Args:
        features: [crops, cells, C].
        seed: changes all numbers.
    """
    positive = (features.float().mean(dim=1) > 0).cpu()
    drawn = []
    for bits in positive.tolist():
        digest = hashlib.blake2b(bytes(bits) + b"%d" % seed, digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        drawn.append(torch.rand(features.shape[1], generator=generator, dtype=torch.float64))
    return torch.stack(drawn) if drawn else torch.zeros(features.shape[:2], dtype=torch.float64)


def shared_out(keep: int, counts: Sequence[int]) -> list[int]:
    """A budget shared among crops in proportion to their tokens; largest remainders first.

    Args:
        keep: at most the sum of `counts`.
        counts: tokens of each crop.
    """
    total = sum(counts)
    shares = [keep * n // total for n in counts]
    order = sorted(range(len(counts)), key=lambda i: (-(keep * counts[i] % total), i))
    for i in order[: keep - sum(shares)]:
        shares[i] += 1
    return shares


def uniform_places(rows: int, columns: int, keep: int) -> list[int]:
    """Evenly spaced cells of a grid.

    About √(keep · rows / columns) rows are used, at equal distances; the cells are shared evenly
    among them and lie at equal distances within each.

    Args:
        rows: of the grid.
        columns: of the grid.
        keep: 0 to rows · columns.

    Returns:
        `keep` numbers row · columns + column, ascending.
    """
    if keep == 0:
        return []
    used = math.floor(math.sqrt(keep * rows / columns) + 0.5)
    used = min(rows, keep, max(used, -(-keep // columns), 1))
    places = []
    for i in range(used):
        row = (2 * i + 1) * rows // (2 * used)
        here = (i + 1) * keep // used - i * keep // used
        places += [row * columns + (2 * j + 1) * columns // (2 * here) for j in range(here)]
    return places


def pooled_grid(rows: int, columns: int, keep: int) -> tuple[int, int]:
    """How many blocks down and across a grid is pooled into, at most `keep` together.

    The longer side of a block is as short as can be; among those, as many blocks as fit, and of
    equals the fewest rows.

    Args:
        rows: of the grid.
        columns: of the grid.
        keep: 1 or more.
    """

    def size(down: int) -> tuple[float, int, int]:
        across = min(columns, keep // down)
        return max(rows / down, columns / across), -down * across, down

    down = min(range(1, min(rows, keep) + 1), key=size)
    return down, min(columns, keep // down)
