"""Pure rules on tensors: what is kept, what is merged, and how many that are.

Here belongs what a method decides by, as functions of tensors and numbers that know no model, and
what its settings may be.
May import torch, Triton where it is there, and `errors`, and nothing else of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmprune.select.rules import (
        conditional_dpp,
        cosine_similarity,
        count_important,
        farthest_point,
        first_max,
        rows_a_block,
        top_k,
        vispruner,
    )

__all__ = [
    "conditional_dpp",
    "cosine_similarity",
    "count_important",
    "farthest_point",
    "first_max",
    "rows_a_block",
    "top_k",
    "vispruner",
]


def __getattr__(name: str) -> Any:
    # When first asked for, so that budgets and schedules are read without torch.
    if name not in __all__:
        raise AttributeError(f"module 'vlmprune.select' has no attribute {name!r}")
    from vlmprune.select import rules

    value = getattr(rules, name)
    globals()[name] = value
    return value
