"""How programs here time: all ways take turns within one process, and ratios are told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from vlmprune.study.bench.results import Quartiles
from vlmprune.study.measure import wait

T = TypeVar("T")


def clock(device: torch.device) -> float:
    """Seconds, once a device is done; of processor time where one thread of a CPU does all.

    Processor time bears other work on the machine better.
    """
    wait(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time() if alone else time.perf_counter()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, by `clock`."""
    start = clock(device)
    call()
    return clock(device) - start


def in_turns(names: Iterable[str], turn: Callable[[str], T], repeat: int) -> dict[str, list[T]]:
    """What each turn gives, by name; all names take turns, the order reversed every other time."""
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(repeat):
        for name in list(found)[:: 1 if number % 2 else -1]:
            found[name].append(turn(name))
    return found


def ratio(upper: Sequence[float], lower: Sequence[float]) -> tuple[float, float]:
    """Median of the ratios within each turn, and half the quartiles' distance relative to it.

    Of one turn there is no spread: it is not a number.
    """
    found = Quartiles.of([a / b for a, b in zip(upper, lower, strict=True)])
    assert found is not None
    return found.median, found.share if len(found.values) > 1 else math.nan
