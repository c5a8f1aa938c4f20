"""Speed and memory with and without pruning: all ways in turns, in one process, on the same work.

Prints nothing; `cli` does that. A way is a name with a pruner, or with None for all tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlmprune import sources
from vlmprune.loading import attached, enough_memory
from vlmprune.measure import Timed, stored_bytes, timed, wait
from vlmprune.pruner import Pruner
from vlmprune.report import Report
from vlmprune.work import Work

ALL_TOKENS = "all tokens"


@dataclass(frozen=True)
class Spread:
    """What was measured in all turns.

    Attributes:
        median: of the values.
        low: first quartile.
        high: third quartile.
        values: one a turn.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """The spread of some values; None of none."""
        if not values:
            return None
        low = middle = high = values[0]
        if len(values) > 1:
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, tuple(values))

    @property
    def share(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Figures:
    """One way. Sums go over all rows of the batch.

    Attributes:
        name: the method's spec, or `ALL_TOKENS`.
        visual_tokens: that the language model saw.
        first_ms: from the call to the first token; vision tower and selection included.
        selecting_ms: the part of it that choosing took, without the encoder; None for all tokens.
        decode_tokens_per_second: after the first token; None where there is no second.
        total_ms: the whole call.
        visual_kv_bytes: that the visual tokens' keys and values take, by the formula.
        cache_bytes: of all keys and values held after the last token, of text as well.
        peak_bytes: most memory that a call held at once on a GPU, beyond weights and inputs; None
            on a CPU.
        flops: of prefill on visual tokens, vision tower included, by the published formula.
        first_tokens: id of each row's first new token.
    """

    name: str
    visual_tokens: int
    first_ms: Spread
    selecting_ms: Spread | None
    decode_tokens_per_second: Spread | None
    total_ms: Spread
    visual_kv_bytes: int
    cache_bytes: int
    peak_bytes: int | None
    flops: float
    first_tokens: tuple[int, ...]

    def against(self, full: Figures) -> dict[str, Any]:
        """How many times faster or smaller this way is than another, and what it changes.

        Speed-ups are ratios of medians; above 1 this way is the better one.
        """
        decode = None
        if self.decode_tokens_per_second and full.decode_tokens_per_second:
            decode = self.decode_tokens_per_second.median / full.decode_tokens_per_second.median
        peak = None
        if self.peak_bytes and full.peak_bytes:
            peak = full.peak_bytes / self.peak_bytes
        pairs = zip(self.first_tokens, full.first_tokens, strict=True)
        return {
            "prefill_speedup": full.first_ms.median / self.first_ms.median,
            "decode_speedup": decode,
            "total_speedup": full.total_ms.median / self.total_ms.median,
            "visual_kv_ratio": full.visual_kv_bytes / self.visual_kv_bytes,
            "cache_ratio": full.cache_bytes / self.cache_bytes,
            "peak_ratio": peak,
            "flops_ratio": full.flops / self.flops,
            "same_first_tokens": sum(mine == theirs for mine, theirs in pairs),
        }


@dataclass(frozen=True)
class Result:
    """All ways over the same work.

    Attributes:
        model: its label.
        dtype: of its weights.
        device: the model's, as torch calls it.
        batch: rows.
        images: pictures of each prompt.
        prompt_tokens: length of the longest prompt, visual tokens included.
        new_tokens: generated in each row, end tokens ignored.
        repeat: turns.
        full: with all visual tokens.
        methods: the others.
    """

    model: str
    dtype: str
    device: str
    batch: int
    images: int
    prompt_tokens: int
    new_tokens: int
    repeat: int
    full: Figures
    methods: tuple[Figures, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold, the comparison with all tokens included."""
        out = {k: v for k, v in asdict(self).items() if k not in ("full", "methods")}
        out["all_tokens"] = asdict(self.full)
        out["methods"] = [
            asdict(one) | {"against_all_tokens": one.against(self.full)} for one in self.methods
        ]
        return out


def compare(
    work: Work,
    pruners: Mapping[str, Pruner],
    new_tokens: int,
    repeat: int,
    say: Callable[[str], None] = lambda message: None,
) -> Result:
    """Measure all tokens and every pruner, turn by turn, after a warm-up.

    Args:
        work: model and inputs.
        pruners: the methods by name, one or more.
        new_tokens: how many each call generates.
        repeat: turns.
        say: told what happens, for a progress line.

    Raises:
        VlmpruneError: a number below 1, a pruner that refuses, or too little memory.
    """
    sources.at_least_one(new_tokens=new_tokens, repeat=repeat)
    model, inputs = work.model, work.inputs
    # The pruned ways first, since they may refuse.
    ways: dict[str, Pruner | None] = {**pruners, ALL_TOKENS: None}
    first: dict[str, tuple[tuple[int, ...], int, int | None]] = {}
    reports: dict[str, Report] = {}
    calls: dict[str, list[Timed]] = {name: [] for name in ways}
    selecting: dict[str, list[float]] = {name: [] for name in ways}
    with enough_memory(model.device):
        for name, pruner in ways.items():
            say(f"Warming up: {name}…")
            with attached(pruner, model):
                first[name] = _warm_up(model, inputs, new_tokens)
        order = list(ways)
        for turn in range(repeat):
            # Whoever comes first has the cooler machine, so all take the lead in turn.
            start = turn % len(order)
            for name in order[start:] + order[:start]:
                say(f"Turn {turn + 1} of {repeat}: {name}…")
                with attached(ways[name], model) as handle:
                    calls[name].append(timed(model, inputs, new_tokens))
                    if handle is not None and handle.report is not None:
                        reports[name] = handle.report
                        selecting[name].append(1000 * handle.report.seconds_selecting)

    def figures(name: str) -> Figures:
        pruned = name != ALL_TOKENS
        report: Any = reports[name] if pruned else next(iter(reports.values()))
        part = "after" if pruned else "before"
        tokens, cached, peak = first[name]
        rates = [one.decode_rate for one in calls[name] if one.decode_rate is not None]
        first_ms = Spread.of([one.first_ms for one in calls[name]])
        total_ms = Spread.of([one.total_ms for one in calls[name]])
        assert first_ms is not None and total_ms is not None
        return Figures(
            name=name,
            visual_tokens=getattr(report, f"visual_tokens_{part}"),
            first_ms=first_ms,
            selecting_ms=Spread.of(selecting[name]),
            decode_tokens_per_second=Spread.of(rates),
            total_ms=total_ms,
            visual_kv_bytes=getattr(report, f"kv_bytes_{part}"),
            cache_bytes=cached,
            peak_bytes=peak,
            flops=getattr(report, f"flops_{part}"),
            first_tokens=tokens,
        )

    rows, prompt = inputs["input_ids"].shape
    return Result(
        model=work.label,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        batch=rows,
        images=work.images,
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        repeat=repeat,
        full=figures(ALL_TOKENS),
        methods=tuple(figures(name) for name in pruners),
    )


def _warm_up(model: Any, inputs: Any, new_tokens: int) -> tuple[tuple[int, ...], int, int | None]:
    """First new tokens, bytes held by the cache at the end, and a GPU's peak."""
    device, peak = model.device, None
    if device.type == "cuda":
        # The first call of all makes workspaces, which are no part of the peak.
        timed(model, inputs, min(2, new_tokens))
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    out = timed(model, inputs, new_tokens, with_cache=True)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    return tuple(out.new[:, 0].tolist()), stored_bytes(out.cache), peak
