"""One timed call of `generate`, what its cache really holds, and what both depend on."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timed:
    """One call.

    Attributes:
        new: the new tokens [B, T].
        first_ms: from the call to the first token; vision tower and selection included.
        decode_ms: from the first token to the last; 0 where there is but one.
        total_ms: the whole call.
        cache: its KV cache, where it was asked for.
    """

    new: Tensor
    first_ms: float
    decode_ms: float
    total_ms: float
    cache: Any = None

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
        Times in milliseconds of the wall clock; on a GPU it is waited for before each is taken.
    """
    clock = _Clock(model.device, new_tokens)
    wait(model.device)
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        stopping_criteria=[clock],
        return_dict_in_generate=with_cache,
    )
    wait(model.device)
    end = time.perf_counter()
    ids = out.sequences if with_cache else out
    return Timed(
        new=ids[:, inputs["input_ids"].shape[1] :],
        first_ms=1000 * (clock.first - start),
        decode_ms=1000 * (clock.last - clock.first),
        total_ms=1000 * (end - start),
        cache=out.past_key_values if with_cache else None,
    )


class _Clock:
    """A stopping criterion that stops nothing: `generate` asks it after every new token."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        self.device, self.tokens = device, tokens
        self.seen = 0
        self.first = self.last = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen += 1
        # Waiting at each token would keep `generate` from running ahead on a GPU.
        if self.seen in (1, self.tokens):
            wait(self.device)
            self.last = time.perf_counter()
            if self.seen == 1:
                self.first = self.last
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def stored_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache holds, of visual tokens and of all others.

    A layer that has a method `nbytes` is asked; of any other the tensors are added up.
    """
    return sum(_layer_bytes(layer) for layer in _layers(cache))


def _layers(cache: Any) -> Iterable[Any]:
    return getattr(cache, "layers", None) or ()


def _layer_bytes(layer: Any) -> int:
    own = getattr(layer, "nbytes", None)
    if callable(own):
        return int(own())
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def facts(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the work: versions, the device's name, threads."""
    import transformers

    from vlmprune import __version__

    return {
        "versions": {
            "vlmprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
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
