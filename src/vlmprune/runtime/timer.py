"""The time that a choice takes on a device."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Timed(Protocol):
    """What adds up the time that its choices take.

    Attributes:
        seconds: so far.
    """

    seconds: float


@dataclass
class Seconds:
    """Holds a time.

    Attributes:
        seconds: so far.
    """

    seconds: float = 0.0


class Timer:
    """Adds the time that a block takes on a tensor's device to a record's seconds."""

    def __init__(self, record: Timed, like: Tensor) -> None:
        self.record, self.like = record, like

    def __enter__(self) -> None:
        _wait(self.like)
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        _wait(self.like)
        self.record.seconds += time.perf_counter() - self.begin


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
