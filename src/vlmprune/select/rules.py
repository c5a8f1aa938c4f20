"""Selection rules: scores and features in, ascending indices of kept visual tokens out.

Pure tensor functions over a batch of crops, B; every crop of a batch has the same number of
visual tokens, N. They import torch and NumPy alone (on a GPU also `choice_triton`), never wait for
the device (the number of steps depends on shapes only) and break ties by index, so that CPU and GPU
agree.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlmprune.select.duplicates import BLOCK, ROUND, products, thinned
from vlmprune.select.precision import exact

# Rows that a block of similarities has at least: larger matrices are gone through block by block.
LEAST_ROWS = 64


def top_k(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest scores, ties to the lower index.

    Args:
        scores: [B, N].
        keep: how many, 0 to N.

    Returns:
        [B, keep] int64, ascending.

    Raises:
        ValueError: `keep` is outside 0 to N.
    """
    _check(scores, keep)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :keep].sort(dim=1).values


@exact
def vispruner(
    attention: Tensor, features: Tensor, keep: int, important_ratio: float = 0.5
) -> Tensor:
    """VisPruner's choice: the most attended tokens, then what is least like the rest.

    The list of tokens that are not important, by falling attention, is thinned in rounds: each
    token at an even place is compared with all tokens at odd places, and those that have the
    closest partner are dropped (`vlmprune.select.duplicates`). Where the list is odd,
    the even places hold one token more; it is compared like any other. A round never drops
    more than the even places hold, so every budget from 1 to N works.

    Source: arXiv 2412.01818, section 3, and the authors' code, whose choices in float32 it equals.

    Args:
        attention: [B, N] attention that each visual token receives, averaged over heads.
        features: [B, N, C] features of the encoder, before the projector.
        keep: how many tokens of each crop to keep, 1 to N.
        important_ratio: share of `keep` chosen by attention, 0 to 1 (0.5 and 0.75 in the
            paper); the count is rounded down.

    Returns:
        [B, keep] int64, ascending.

    Raises:
        ValueError: shapes do not fit, `keep` is outside 1 to N, or the ratio outside [0, 1].
    """
    _check(attention, keep, least=1)
    B, N = attention.shape
    if features.ndim != 3 or features.shape[:2] != attention.shape:
        raise ValueError(
            f"features {tuple(features.shape)} do not fit attention {tuple(attention.shape)}; "
            "expected [B, N, C] and [B, N]."
        )
    important = count_important(keep, important_ratio)
    if keep == N:
        return torch.arange(N, device=attention.device).repeat(B, 1)
    kernels = _kernels(features)
    if important < keep and kernels is not None:
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        return kernels.thin(attention, unit @ unit.transpose(1, 2), keep, important, ROUND)
    order = attention.sort(dim=1, descending=True, stable=True).indices
    chosen, rest = order[:, :important], order[:, important:]
    if important < keep:
        rest = thinned(rest, features, keep - important)
        chosen = torch.cat((chosen, rest), dim=1)
    return chosen.sort(dim=1).values


@exact
def farthest_point(features: Tensor, keep: int) -> Tensor:
    """DivPrune's choice: each next token is the one farthest from all chosen so far.

    Distance is 1 - cosine, in float32. The first token is the one farthest from its nearest
    neighbour. Ties go to the lower index.

    Extra memory: the unit vectors, B · N · C numbers, and one block of similarities, see
    `rows_a_block`; no N × N matrix beyond that. Work: N² + keep · N cosines a crop.

    Source: arXiv 2503.02175, section 3, and the authors' code, whose choices in float32 it equals.

    Args:
        features: [B, N, C].
        keep: 1 to N.

    Returns:
        [B, keep] int64, ascending.

    Raises:
        ValueError: `keep` is outside 1 to N.
    """
    _check(features[..., 0], keep, least=1)
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    kernels = _kernels(features)
    if kernels is not None:
        return kernels.spread(unit @ unit.transpose(1, 2), keep)
    newest = first_max(-_nearest(unit))
    # The distance to the nearest chosen token; chosen ones are ruled out for good.
    distance = torch.full(unit.shape[:2], torch.inf, device=unit.device)
    chosen = [newest]
    for _ in range(keep - 1):
        rows = unit.gather(1, newest[:, :, None].expand(-1, -1, unit.shape[2]))
        distance = torch.minimum(distance, 1.0 - (unit @ rows.transpose(1, 2))[:, :, 0])
        distance.scatter_(1, newest, -torch.inf)
        newest = first_max(distance)
        chosen.append(newest)
    return torch.cat(chosen, dim=1).sort(dim=1).values


@exact
def conditional_dpp(features: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """CDPruner's choice: greedy MAP of a determinantal point process, weighted by relevance.

    The kernel is r_i · cosine(i, j) · r_j, in float32; one of its rows is computed a step, and
    the N × N matrix never stands whole. Ties go to the lower index.

    Extra memory: the unit vectors, B · N · D numbers, and what the chosen tokens explain,
    B · keep · N. Work: keep · N cosines and keep² · N products a crop.

    Source: arXiv 2506.10967, section 3, and the authors' code, whose choices in float32 it equals.

    Args:
        features: [B, N, D].
        relevance: [B, N], not negative.
        keep: 1 to N.

    Returns:
        [B, keep] int64, ascending.

    Raises:
        ValueError: shapes do not fit, or `keep` is outside 1 to N.
    """
    _check(relevance, keep, least=1)
    if features.ndim != 3 or features.shape[:2] != relevance.shape:
        raise ValueError(
            f"features {tuple(features.shape)} do not fit relevance {tuple(relevance.shape)}; "
            "expected [B, N, D] and [B, N]."
        )
    B, N = relevance.shape
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    weight = relevance.float()
    kernels = _kernels(features, steps=keep * keep * N // 2)
    if kernels is not None:
        return kernels.explain(unit @ unit.transpose(1, 2), weight, keep)
    # What each token would add, and the part of each kernel row that is explained already.
    gain = weight * (unit * unit).sum(dim=-1) * weight
    rows = unit.new_zeros(B, keep, N)
    least = torch.finfo(gain.dtype).min
    chosen = []
    for step in range(keep):
        newest = first_max(gain)
        chosen.append(newest)
        if step + 1 == keep:
            break
        vector = unit.gather(1, newest[:, :, None].expand(-1, -1, unit.shape[2]))
        kernel = weight.gather(1, newest) * (unit @ vector.transpose(1, 2))[:, :, 0] * weight
        known = rows[:, :step]
        at = known.gather(2, newest[:, None, :].expand(-1, step, -1))
        row = kernel - (at.transpose(1, 2) @ known)[:, 0]
        left = gain.gather(1, newest)
        # Where rounding is all that is left to explain, dividing by it would only blow it up.
        row = torch.where(left > 1e-20, row / left.clamp_min(1e-20).sqrt(), 0.0)
        rows[:, step] = row
        # Tokens chosen before stay below every other, however little another would add.
        taken = gain.isneginf().scatter(1, newest, True)
        gain = (gain - row * row).nan_to_num(neginf=least).clamp(min=least)
        gain = gain.masked_fill(taken, -torch.inf)
    return torch.cat(chosen, dim=1).sort(dim=1).values


def count_important(keep: int, important_ratio: float) -> int:
    """How many of `keep` tokens VisPruner takes by attention: floor(keep · ratio).

    Raises:
        ValueError: the ratio is outside [0, 1].
    """
    if not 0.0 <= important_ratio <= 1.0:
        raise ValueError(f"important_ratio={important_ratio} is outside [0, 1].")
    return math.floor(keep * important_ratio)


@exact
def cosine_similarity(features: Tensor) -> Tensor:
    """Cosine of every pair of tokens, in float32.

    Args:
        features: [B, N, C].

    Returns:
        [B, N, N].
    """
    return products(torch.nn.functional.normalize(features.float(), dim=-1))


def first_max(values: Tensor) -> Tensor:
    """[..., 1] index of the largest value of the last dimension [..., N].

    Of equals the lowest, on every device.
    """
    N = values.shape[-1]
    best = values == values.amax(dim=-1, keepdim=True)
    place = torch.arange(N, device=values.device)
    return torch.where(best, place, N).amin(dim=-1, keepdim=True).clamp(max=N - 1)


def rows_a_block(crops: int, columns: int) -> int:
    """Rows of a matrix [crops, ?, columns] to be gone through at a time.

    As many as `BLOCK` numbers hold, and `LEAST_ROWS` where these are more; so a crop of up to 2048
    tokens, or five of 900, is done in one block.
    """
    return max(LEAST_ROWS, BLOCK // max(1, crops * columns))


def _nearest(unit: Tensor) -> Tensor:
    """[B, N] largest cosine of each unit vector [B, N, C] with another."""
    B, N, _ = unit.shape
    found = []
    chunk = rows_a_block(B, N)
    for start in range(0, N, chunk):
        part = unit[:, start : start + chunk] @ unit.transpose(1, 2)
        own = torch.arange(start, start + part.shape[1], device=unit.device)
        part[:, own - start, own] = -torch.inf
        found.append(part.amax(dim=2))
    return torch.cat(found, dim=1)


def _kernels(features: Tensor, steps: int = 0) -> Any:
    """`choice_triton` where it does the whole choice in one launch; None where it does not."""
    if not features.is_cuda:
        return None
    kernels = _triton()
    return kernels if kernels is not None and kernels.fits(features, steps) else None


@lru_cache
def _triton() -> Any:
    try:
        from vlmprune.select import choice_triton
    except Exception:  # A triton that does not fit the machine fails in many ways.
        return None
    return choice_triton


def _check(scores: Tensor, keep: int, least: int = 0) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected [B, N].")
    if not least <= keep <= scores.shape[1]:
        raise ValueError(f"keep={keep} is outside {least} to {scores.shape[1]}.")
