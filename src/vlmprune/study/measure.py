"""One timed call of `generate`, what its cache really holds, and what both depend on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import processed, release
from vlmprune.hosts.measured import prefill_module, stored_bytes
from vlmprune.hosts.release import cache_returned
from vlmprune.runtime.hooks import Hooks
from vlmprune.version import __version__

__all__ = [
    "Stopwatch",
    "Timed",
    "facts",
    "peak_bytes",
    "stored_bytes",
    "timed",
    "versions",
    "wait",
]


@dataclass(frozen=True)
class Timed:
    """One call.

    Attributes:
        new: the new tokens [B, T].
        first_ms: from the call to the first token; vision tower and selection included.
        decode_ms: from the first token to the last; 0 where there is but one.
        total_ms: the whole call.
        cache: its KV cache, where it was asked for.
        prefill_ms: the language model's layers on the prompt alone, with what a method does among
            them; None for a model whose language model is not called as a module.
    """

    new: Tensor
    first_ms: float
    decode_ms: float
    total_ms: float
    cache: Any = None
    prefill_ms: float | None = None

    @property
    def decode_rate(self) -> float | None:
        """Decoded tokens per second over all rows; None where there was no step after prefill."""
        rows, tokens = self.new.shape
        return 1000 * rows * (tokens - 1) / self.decode_ms if tokens > 1 else None


def timed(model: Any, inputs: Any, new_tokens: int, with_cache: bool = False) -> Timed:
    """Generate exactly so many tokens greedily, end tokens ignored, and time it.

    So two ways of answering take the same number of steps, whatever they say.

    Args:
        model: the host, pruned or not.
        inputs: from its processor, with `input_ids` [B, L].
        new_tokens: how many, 1 or more.
        with_cache: hand the cache out, too.

    Returns:
        Times in milliseconds: between CUDA events on a GPU, of the wall clock elsewhere.
    """
    watch = Stopwatch(model.device)
    clock = _Clock(watch, new_tokens)
    with _prefill(model, watch) as prefill:
        wait(model.device)
        start = watch.mark()
        out = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            stopping_criteria=[clock],
            return_dict_in_generate=with_cache,
        )
        end = watch.mark()
        wait(model.device)
    ids = out.sequences if with_cache else out
    return Timed(
        new=ids[:, processed.ids_of(inputs).shape[1] :],
        first_ms=watch.between(start, clock.first),
        decode_ms=watch.between(clock.first, clock.last),
        total_ms=watch.between(start, end),
        cache=cache_returned(out) if with_cache else None,
        prefill_ms=watch.between(*prefill) if len(prefill) == 2 else None,
    )


class Stopwatch:
    """Marks points in time on a device.

    On a CUDA device a mark is an event in its stream, so that marking waits for nothing; they may
    be compared once the device is done. Elsewhere a mark waits, and is of the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Now, or when the device will have done all that it was given so far."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        wait(self.device)
        return time.perf_counter()

    def between(self, first: Any, second: Any) -> float:
        """Milliseconds from one mark to another."""
        if self.device.type == "cuda":
            return float(first.elapsed_time(second))
        return float(1000 * (second - first))


class _Clock:
    """A stopping criterion that stops nothing: `generate` asks it after every new token."""

    def __init__(self, watch: Stopwatch, tokens: int) -> None:
        self.watch, self.tokens = watch, tokens
        self.seen = 0
        self.first: Any = None
        self.last: Any = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen += 1
        if self.seen in (1, self.tokens):
            self.last = self.watch.mark()
            if self.seen == 1:
                self.first = self.last
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _prefill(model: Any, watch: Stopwatch) -> Iterator[list[Any]]:
    """Marks around the first call of the language model, in every way that is compared alike."""
    marks: list[Any] = []
    decoder = prefill_module(model)
    if decoder is None:
        yield marks
        return

    def before(*_: Any) -> None:
        if not marks:
            marks.append(watch.mark())

    def after(*_: Any) -> None:
        if len(marks) == 1:
            marks.append(watch.mark())

    with Hooks(every=True) as hooks:
        hooks.before(decoder, before)
        hooks.after(decoder, after)
        yield marks


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call holds at once, beyond what was there before.

    On a GPU what its allocator says, on a CPU what torch's profiler saw allocated and freed: that
    is tensors alone, whatever else the process takes. The profiler slows a call down.

    Returns:
        Bytes; None on any other device.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        wait(device)
        return int(torch.cuda.max_memory_allocated(device) - held)
    if device.type != "cpu":
        return None
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Any = profiler.profiler.kineto_results.events()
    steps = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(steps, key=lambda step: step[0]):
        held += size
        peak = max(peak, held)
    return peak


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def versions() -> dict[str, str]:
    """Of what figures come from: this package, torch and Transformers."""
    return {
        "vlmprune": __version__,
        "torch": torch.__version__,
        "transformers": release.version(),
    }


def facts(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the work: versions, the device's name, threads."""
    return {
        "versions": {**versions(), "python": platform.python_version()},
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
