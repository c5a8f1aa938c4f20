"""Choices in float32: what autocast would round is computed as it is written.

Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def unrounded(like: Tensor) -> AbstractContextManager[Any]:
    """A block in which products have the type of their factors, under autocast too.

    Autocast computes products of float32 in half precision, where rules that compare near-equals
    step by step choose other tokens.

    Args:
        like: lies on the device that computes.
    """
    kind = like.device.type
    # Asked at every step of Recall, so that nothing is done where nothing is to be.
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def exact(rule: Callable[P, R]) -> Callable[P, R]:
    """A rule on tensors that is never rounded by autocast."""

    @wraps(rule)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        with unrounded(next(one for one in given if isinstance(one, Tensor))):
            return rule(*args, **kwargs)

    return chosen
