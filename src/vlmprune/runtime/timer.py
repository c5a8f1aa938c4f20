"""The time that a choice takes on a device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Seconds:
    """Adds up the time that blocks take (`Timer`)."""

    def __init__(self) -> None:
        self._known = 0.0
        # Of a GPU, when each block began and ended. Its clock is read when somebody asks, for that
        # waits until it is there.
        self._between: list[tuple[Any, Any]] = []

    def add(self, seconds: float) -> None:
        """Add a time that is known."""
        self._known += seconds

    def add_between(self, begin: Any, end: Any) -> None:
        """Add the time between two events of a GPU."""
        self._between.append((begin, end))

    @property
    def total(self) -> float:
        """Seconds so far; waits for a GPU."""
        while self._between:
            begin, end = self._between.pop()
            end.synchronize()
            self._known += begin.elapsed_time(end) / 1000
        return self._known


class Timer:
    """Adds the time that a block takes on a tensor's device; does not wait for it."""

    def __init__(self, spent: Seconds, like: Tensor) -> None:
        self.spent, self.like = spent, like
        self.begin: Any = None

    def __enter__(self) -> None:
        self.begin = _event(self.like) if self.like.is_cuda else time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.like.is_cuda:
            self.spent.add_between(self.begin, _event(self.like))
        else:
            self.spent.add(time.perf_counter() - self.begin)


def _event(like: Tensor) -> Any:
    """An event of now, on the stream that works on a tensor's device."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(like.device))
    return event
