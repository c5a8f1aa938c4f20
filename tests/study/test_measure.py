"""One timed call, marks in time, peaks and bytes held. No time is asserted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiny import model, request
from vlmprune.study import measure

CPU = torch.device("cpu")


def test_end_tokens_are_ignored() -> None:
    """Else ways that say different things would take different numbers of steps."""
    built = model("llava")
    inputs = request(built, [1, 2]).inputs
    say = measure.timed(built, inputs, 6).new
    assert say.shape == (2, 6)
    built.generation_config.eos_token_id = say[:, 1].tolist()
    stopped = built.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert (stopped[:, -6:] != say).any()
    again = measure.timed(built, inputs, 6, with_cache=True)
    assert again.new.shape == (2, 6)
    assert not torch.isin(again.new[:, :5], say[:, 1]).any()
    assert again.cache.get_seq_length() == inputs["input_ids"].shape[1] + 5


def test_decode_rate_counts_all_rows() -> None:
    one = measure.Timed(torch.zeros(3, 5), first_ms=1.0, decode_ms=200.0, total_ms=300.0)
    assert one.decode_rate == 3 * 4 / 0.2
    one = measure.Timed(torch.zeros(3, 1), first_ms=1.0, decode_ms=0.0, total_ms=300.0)
    assert one.decode_rate is None


def test_on_a_gpu_marks_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:0"
            recorded.append(self)

        def elapsed_time(self, other: Any) -> float:
            return float(recorded.index(other) - recorded.index(self))

    def wait(_: Any) -> None:
        raise AssertionError("a mark waited for the device")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    watch = measure.Stopwatch(torch.device("cuda:0"))
    marks = [watch.mark() for _ in range(4)]
    assert marks == recorded
    assert watch.between(marks[0], marks[3]) == 3.0


def test_peaks_are_of_tensors_held_at_once() -> None:
    def call() -> None:
        one = torch.ones(1000)
        del one
        two = torch.ones(3000)
        _ = torch.cat((two, two))

    # Of four bytes each: two tensors at once, the first one gone by then.
    assert measure.peak_bytes(call, CPU) == 4 * (3000 + 6000)
    assert measure.peak_bytes(call, torch.device("meta")) is None


def test_stored_bytes() -> None:
    held = torch.zeros(2, 3, 4, dtype=torch.float16)
    plain = SimpleNamespace(keys=held, values=held.float())
    asked = SimpleNamespace(keys=held, values=held, nbytes=lambda: 7)
    empty = SimpleNamespace(keys=None, values=None)
    other = SimpleNamespace(states=held)
    cache = SimpleNamespace(layers=[plain, asked, empty, other])
    assert measure.stored_bytes(cache) == 24 * 2 + 24 * 4 + 7
    assert measure.stored_bytes(None) == 0


def test_facts() -> None:
    facts = measure.facts(CPU)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["versions"]) == {"vlmprune", "torch", "transformers", "python"}
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device_name"].strip()
