"""Choices on a GPU: one batched product, and one launch for all that follows.

Step by step VisPruner's rounds are some 700 launches, which take longer than the work in them. A
program of its own goes through all steps of a crop and waits for nothing. Given the same
similarities it chooses the tokens of the plain rules in `rules`; a product of a whole batch may
round its last digits in another way than those of single rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vlmprune.select import choice_kernels

# Visual tokens of a crop that a program's registers hold.
LARGEST = 4096
# Similarities that may stand at once (256 MiB in float32).
MOST = 1 << 26
# Products of a determinant's steps that one program does faster than many launches would.
STEPS = 1 << 25
# Elements of a tile.
_TILE = 1 << 14


def fits(features: Tensor, steps: int = 0) -> bool:
    """Whether the kernels can do it, and are the faster way.

    Args:
        features: [B, N, C].
        steps: products of one crop beyond those of the similarities.
    """
    B, N, _ = features.shape
    if not 0 < N <= LARGEST or B * N * N > MOST or steps > STEPS:
        return False
    # The interpreter's kernels run on a CPU.
    return features.is_cuda or not isinstance(choice_kernels.thin, triton.JITFunction)


def thin(attention: Tensor, similarity: Tensor, keep: int, important: int, rounds: int) -> Tensor:
    """VisPruner's choice, `important` by attention and the rest in rounds.

    Args:
        attention: [B, N].
        similarity: [B, N, N] float32, symmetric.
        keep: more than `important`, at most N.
        important: taken by attention.
        rounds: dropped in a round at the most.

    Returns:
        [B, keep] int64, ascending.
    """
    B, N = attention.shape
    kept = torch.empty(B, keep, dtype=torch.int64, device=attention.device)
    wide = _wide(N)
    half = _wide(-(-(N - important) // 2))
    lists = torch.empty(B, 2, N, dtype=torch.int32, device=attention.device)
    closest = torch.empty(B, N, dtype=torch.int32, device=attention.device)
    stays = torch.empty(B, N, dtype=torch.int8, device=attention.device)
    choice_kernels.thin[(B,)](
        attention.float().contiguous(),
        similarity,
        lists,
        closest,
        stays,
        kept,
        N,
        keep,
        important,
        rounds,
        WIDE=wide,
        HALF=half,
        BLOCK=max(1, _TILE // wide),
        num_warps=16,
        enable_fp_fusion=False,
    )
    return kept


def spread(similarity: Tensor, keep: int) -> Tensor:
    """DivPrune's choice.

    Args:
        similarity: [B, N, N] float32, symmetric.
        keep: 1 to N.

    Returns:
        [B, keep] int64, ascending.
    """
    B, N, _ = similarity.shape
    kept = torch.empty(B, keep, dtype=torch.int64, device=similarity.device)
    wide = _wide(N)
    choice_kernels.spread[(B,)](
        similarity,
        kept,
        N,
        keep,
        WIDE=wide,
        BLOCK=max(1, _TILE // wide),
        num_warps=16,
        enable_fp_fusion=False,
    )
    return kept


def explain(similarity: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """CDPruner's choice.

    Args:
        similarity: [B, N, N] float32, symmetric.
        relevance: [B, N], not negative.
        keep: 1 to N.

    Returns:
        [B, keep] int64, ascending.
    """
    B, N, _ = similarity.shape
    kept = torch.empty(B, keep, dtype=torch.int64, device=similarity.device)
    rows = torch.empty(B, keep, N, dtype=torch.float32, device=similarity.device)
    # A product and a sum rounded as one would be another choice than the plain rule's.
    choice_kernels.explain[(B,)](
        similarity,
        relevance.float().contiguous(),
        rows,
        kept,
        N,
        keep,
        WIDE=_wide(N),
        num_warps=8,
        enable_fp_fusion=False,
    )
    return kept


def _wide(count: int) -> int:
    """A power of 2 of at least `count`, and of a warp's threads."""
    return max(32, triton.next_power_of_2(count))
