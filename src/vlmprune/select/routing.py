"""Which visual tokens of each frame a decoder layer works on, by a linear score.

A pure tensor function: imports torch alone, breaks ties by index and never waits for the device.
"""

from __future__ import annotations

from torch import Tensor

from vlmprune.select import row_rules
from vlmprune.select.precision import unrounded


def routed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    frames: Tensor,
    counts: Tensor,
    keep: int | float,
) -> tuple[Tensor, Tensor]:
    """Score all tokens by one linear map and keep the best of each frame.

    Which tokens of a frame are kept depends on no other frame. Gradients reach the scores, not
    the choice.

    Source: arXiv 2408.16730, section 3.2.

    Args:
        hidden: [B, V, D] states of the visual tokens.
        weight: [D], float32.
        bias: scalar, float32.
        frames: [B, V] int64; frame of each token, -1 for padding.
        counts: [B, F] int64; tokens of each frame.
        keep: an int counts the tokens of each frame to keep; a float in (0, 1] is a fraction of
            those that it has, rounded, at least one.

    Returns:
        [B, V] bool, and [B, V] float32 the scores. Ties go to the lower index.
    """
    # Scores lie close together, and bfloat16 would make many of them equal.
    with unrounded(hidden):
        scores = hidden.float() @ weight.float() + bias.float()
    budget = counts.clamp(max=keep) if isinstance(keep, int) else row_rules.share(keep, counts)
    return row_rules.most_attended(scores.detach(), frames, budget), scores
