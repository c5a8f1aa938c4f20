"""The time that a choice takes, on a CPU and on a GPU whose clock stands in."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmprune.runtime.timer import Seconds, Timer


def test_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    spent = Seconds()
    for _ in range(2):
        with Timer(spent, torch.zeros(1)):
            pass
    assert spent.total == spent.total == 2.75


def test_a_gpu_is_waited_for_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = iter([10.0, 14.0, 20.0, 21.0]), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            self.at = next(clock)

        def synchronize(self) -> None:
            waits.append(self.at)

        def elapsed_time(self, end: Any) -> float:
            """Milliseconds, as torch's events tell it."""
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    like: Any = SimpleNamespace(is_cuda=True, device="cuda:1")
    spent = Seconds()
    for _ in range(2):
        with Timer(spent, like):
            pass
    assert not waits
    assert spent.total == spent.total == pytest.approx(0.005)
    assert sorted(waits) == [14.0, 21.0]
