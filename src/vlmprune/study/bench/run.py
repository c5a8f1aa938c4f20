"""Speed and memory with and without pruning: all ways in turns, in one process, on the same work.

Prints nothing; `cli` does that. A way is a name with a pruner, or with None for all tokens; beside
them stand the floors, natively short prompts (see `vlmprune.study.bench.floor`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from vlmprune import costs
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import processed
from vlmprune.io import options
from vlmprune.io.models import attached, enough_memory
from vlmprune.pruner import Handle, Pruner
from vlmprune.report import Report
from vlmprune.study.bench.floor import Floor, counts_of, floor_of
from vlmprune.study.bench.results import BenchResult, Figures, Quartiles
from vlmprune.study.bench.workload import Work
from vlmprune.study.measure import Timed, peak_bytes, stored_bytes, timed, wait
from vlmprune.study.wording import ALL_TOKENS


@dataclass
class _Way:
    """One of the ways, and what was seen of it.

    Attributes:
        pruner: attached in its calls; None for all tokens and for a floor.
        floor: the short prompt; None for all others.
        calls: the timed ones.
        selecting: milliseconds of choosing in each.
        report: of the last call.
        first: id of each row's first new token.
        cached: bytes held by the cache at the end.
        peak: most bytes held at once.
    """

    pruner: Pruner | None = None
    floor: Floor | None = None
    calls: list[Timed] = field(default_factory=list)
    selecting: list[float] = field(default_factory=list)
    report: Report | None = None
    first: tuple[int, ...] = ()
    cached: int = 0
    peak: int | None = None

    @contextmanager
    def on(self, work: Work) -> Iterator[tuple[Handle | None, Any]]:
        """Attach what there is; gives the handle and the inputs."""
        if self.floor is not None:
            with self.floor.on(work.model):
                yield None, self.floor.inputs
            return
        with attached(self.pruner, work.model) as handle:
            yield handle, work.inputs

    def count(self, call: Timed, handle: Handle | None) -> None:
        """Count a call as a turn."""
        self.calls.append(call)
        if handle is not None and handle.report is not None:
            self.report = handle.report
            self.selecting.append(1000 * handle.report.seconds_selecting)


def compare(
    work: Work,
    pruners: Mapping[str, Pruner],
    new_tokens: int,
    repeat: int,
    say: Callable[[str], None] = lambda message: None,
    floor: bool = False,
    memory: bool = False,
    light: bool = False,
) -> BenchResult:
    """Measure all tokens and every pruner, turn by turn, after a warm-up.

    Args:
        work: model and inputs.
        pruners: the methods by name, one or more.
        new_tokens: how many each call generates.
        repeat: turns.
        say: told what happens, for a progress line.
        floor: measure each method's floor as well.
        memory: measure peaks on a CPU, too, in a call of their own.
        light: warm up with the pruners alone, whose prompts are short and whose encoder works as
            any other's: the first call with all tokens, and a floor's first, is a turn then.

    Raises:
        VlmpruneError: a number below 1, a pruner that refuses, or too little memory.
        ValueError: `memory` with `light`, since measuring peaks slows a call down.
    """
    options.at_least_one(new_tokens=new_tokens, repeat=repeat)
    if light and memory:
        raise ValueError("memory=True slows down the call that light=True makes a turn; give one.")
    # The pruned ways first, since they may refuse.
    ways = {name: _Way(pruner) for name, pruner in pruners.items()} | {ALL_TOKENS: _Way()}
    floors: dict[str, tuple[str, str]] = {}
    refusal = ""
    with enough_memory(work.model.device):

        def first(name: str) -> None:
            counts = light and name not in pruners
            say(f"Turn 1 of {repeat}: {name}…" if counts else f"Warming up: {name}…")
            _first_call(work, ways[name], new_tokens, memory, counts)

        for name in list(ways):
            first(name)
        if floor:
            try:
                floors, short = _floors(work, {name: ways[name] for name in pruners})
            except VlmpruneError as error:
                refusal, short = str(error), {}
            for name, one in short.items():
                ways[name] = _Way(floor=one)
                first(name)
        order = list(ways)
        for turn in range(repeat):
            # Whoever comes first has the cooler machine, so all take the lead in turn.
            start = turn % len(order)
            for name in order[start:] + order[:start]:
                way = ways[name]
                if len(way.calls) > turn:
                    continue
                say(f"Turn {turn + 1} of {repeat}: {name}…")
                with way.on(work) as (handle, inputs):
                    way.count(timed(work.model, inputs, new_tokens), handle)

    made = {name: _figures(name, way, ways, work) for name, way in ways.items()}
    rows, prompt = processed.ids_of(work.inputs).shape
    return BenchResult(
        model=work.label,
        dtype=str(work.model.dtype).removeprefix("torch."),
        device=str(work.model.device),
        batch=rows,
        images=work.images,
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        repeat=repeat,
        full=made[ALL_TOKENS],
        methods=tuple(made[name] for name in pruners),
        floors=tuple(made[name] for name, way in ways.items() if way.floor is not None),
        floor_of=floors,
        no_floor=refusal,
    )


def _floors(
    work: Work, ways: Mapping[str, _Way]
) -> tuple[dict[str, tuple[str, str]], dict[str, Floor]]:
    """For each way the names of its floors, and the floors, of which several ways may share one."""
    names: dict[str, tuple[str, str]] = {}
    found: dict[tuple[int, ...], str] = {}
    short: dict[str, Floor] = {}

    def named(counts: tuple[int, ...], report: Report) -> str:
        if sum(counts) == report.visual_tokens_before:
            return ALL_TOKENS
        if counts not in found:
            name = f"floor of {sum(counts)} tokens"
            alike = sum(other.startswith(name) for other in short)
            found[counts] = f"{name}, divided differently ({alike})" if alike else name
            short[found[counts]] = floor_of(work.model, work.inputs, counts)
        return found[counts]

    for way, one in ways.items():
        assert one.report is not None
        prefill, decode = counts_of(one.report)
        names[way] = named(prefill, one.report), named(decode, one.report)
    return names, short


def _first_call(work: Work, way: _Way, new_tokens: int, memory: bool, counts: bool) -> None:
    """Note first tokens, bytes held by the cache at the end, the peak; the time where it counts."""
    model = work.model
    gpu = model.device.type == "cuda"
    with way.on(work) as (handle, inputs):
        if gpu or (memory and handle is not None):
            # The first call of all makes workspaces, and proves the contract with Transformers,
            # which is no part of the peak.
            timed(model, inputs, min(2, new_tokens))
            wait(model.device)
        kept: list[Timed] = []

        def call() -> None:
            kept[:] = [timed(model, inputs, new_tokens, with_cache=True)]

        if gpu or memory:
            way.peak = peak_bytes(call, model.device)
        if not kept:
            call()
        way.report = None if handle is None else handle.report
        if counts:
            way.count(replace(kept[0], cache=None), handle)
    way.first = tuple(kept[0].new[:, 0].tolist())
    way.cached = stored_bytes(kept[0].cache)


def _figures(name: str, way: _Way, ways: Mapping[str, _Way], work: Work) -> Figures:
    """Put together what was seen of a way."""
    report: Any = way.report or next(one.report for one in ways.values() if one.report)
    part = "before" if way.report is None else "after"
    tokens = getattr(report, f"visual_tokens_{part}")
    kv, flops = getattr(report, f"kv_bytes_{part}"), getattr(report, f"flops_{part}")
    read, host = kv, 0
    if way.report is not None and way.report.reading is not None:
        read, host = way.report.kv_bytes_read, way.report.reading.host_bytes
    if way.floor is not None:
        tokens = way.floor.visual_tokens
        spent = costs.spent(work.model.config, way.floor.row_tokens, work.model.dtype.itemsize)
        encoder = report.flops_before - report.decoder_flops_before
        kv = read = spent.kv_bytes
        flops = encoder + spent.flops
    first_ms = Quartiles.of([one.first_ms for one in way.calls])
    total_ms = Quartiles.of([one.total_ms for one in way.calls])
    assert first_ms is not None and total_ms is not None
    return Figures(
        name=name,
        visual_tokens=tokens,
        first_ms=first_ms,
        prefill_ms=Quartiles.of(
            [one.prefill_ms for one in way.calls if one.prefill_ms is not None]
        ),
        selecting_ms=Quartiles.of(way.selecting),
        decode_tokens_per_second=Quartiles.of(
            [one.decode_rate for one in way.calls if one.decode_rate is not None]
        ),
        total_ms=total_ms,
        visual_kv_bytes=kv,
        visual_read_bytes=read,
        visual_host_bytes=host,
        cache_bytes=way.cached,
        peak_bytes=way.peak,
        flops=flops,
        first_tokens=way.first,
    )
