"""What tokens that skip every other layer save: KV bytes, FLOPs, prefill and decoding.

    python benchmarks/skipping.py --images 1 --images 4 --images 8
    python benchmarks/skipping.py --shape llava-1.5-7b --images 4 --images 16 --device cuda

A model of a known shape with random weights reads pictures, each a frame, with and without
VideoLLM-MoD's routers, which are untrained: which tokens they take does not matter to speed. Bytes
are those that each layer's cache really holds, beside those that the report tells; FLOPs are by
`vlmprune.costs`. Times are those of the language model alone, of one prompt and of single steps
after it. Both ways take turns; ratios are medians over turns of ratios within one turn, and the
spread beside them is half the distance between the quartiles. With one thread on a CPU, times are
of processor time, which bears other work on the machine.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from vlmprune import MoD
from vlmprune.files import write
from vlmprune.hosts.release import cache_returned, with_cache
from vlmprune.study.bench import shapes
from vlmprune.study.measure import facts, stored_bytes, wait

MIB = 2**20


@contextmanager
def stopwatch(model: Any, spent: list[float]) -> Iterator[None]:
    """Note how long each call of the language model takes, in seconds."""
    begun: list[float] = []
    alone = model.device.type == "cpu" and torch.get_num_threads() == 1

    def now() -> float:
        wait(model.device)
        return time.thread_time() if alone else time.perf_counter()

    def before(*_: Any) -> None:
        begun.append(now())

    def after(*_: Any) -> None:
        spent.append(now() - begun.pop())

    decoder = model.get_decoder()
    hooks = [decoder.register_forward_pre_hook(before), decoder.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def once(model: Any, inputs: Any, steps: int) -> tuple[float, float, Any]:
    """Seconds of the prompt and of a step after it, and the cache."""
    spent: list[float] = []
    with stopwatch(model, spent):
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        cache, mask = cache_returned(out), inputs["attention_mask"]
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(dim=-1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            given = with_cache(type(model), {"attention_mask": mask}, cache)
            out = model(input_ids=token, **given)
    return spent[0], statistics.median(spent[1:]), cache


def ratio(dense: list[float], other: list[float]) -> dict[str, float]:
    """How many times faster, and the spread."""
    found = [a / b for a, b in zip(dense, other, strict=True)]
    low, _, high = statistics.quantiles(found, n=4)
    return {"faster": statistics.median(found), "spread": (high - low) / 2}


def measured(model: Any, method: MoD, inputs: Any, turns: int, steps: int) -> dict[str, Any]:
    """All figures of one prompt."""
    ways: dict[str, Callable[[], Any]] = {
        "dense": nullcontext,
        "mod": lambda: method(model),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    bytes_of: dict[str, int] = {}
    layers: dict[str, list[int]] = {}
    for turn in range(turns + 1):
        for name, way in ways.items():
            with way():
                prompt, step, cache = once(model, inputs, steps)
            # The first turn warms up.
            if turn:
                times[name].append((prompt, step))
            bytes_of[name] = stored_bytes(cache)
            layers[name] = [int(one.keys.shape[-2]) for one in cache.layers]
            del cache
    report = method.report
    assert report is not None
    prompts, steps_of = ([[t[i] for t in times[name]] for name in ways] for i in (0, 1))
    return {
        "visual_tokens": report.visual_tokens_before,
        "tokens_by_layer": layers,
        "cache_bytes": bytes_of,
        "kv_bytes_of_visual_tokens": [report.kv_bytes_before, report.kv_bytes_after],
        "decoder_flops": [report.decoder_flops_before, report.decoder_flops_after],
        "seconds": {name: {"prompt_and_step": times[name]} for name in ways},
        "prefill": ratio(*prompts),
        "step": ratio(*steps_of),
    }


def main(
    shape: Annotated[str, typer.Option(help="one of vlmprune's known shapes")] = "small",
    images: Annotated[list[int] | None, typer.Option(help="frames of a prompt")] = None,
    keep: Annotated[float, typer.Option(help="share that a skipped layer works on")] = 0.2,
    every: Annotated[int, typer.Option(help="from one such layer to the next")] = 2,
    layers: Annotated[int | None, typer.Option(help="only so many decoder layers")] = None,
    turns: Annotated[int, typer.Option(help="that are timed")] = 5,
    steps: Annotated[int, typer.Option(help="after each prompt")] = 8,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure, and print a table."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    config = shapes.config_of(shape, layers)
    model = shapes.build(config, place, getattr(torch, dtype))
    method = MoD.fresh(model, keep=keep, every=every)
    table = Table("frames", "visual tokens", "cache MiB", "of it", "FLOPs", "prefill", "step")
    rows = []
    for count in images or [1, 4, 8]:
        inputs = shapes.prompt(model, 1, count, 32)
        one = measured(model, method, inputs, turns, steps)
        rows.append({"images": count, **one})
        whole, less = one["cache_bytes"]["dense"], one["cache_bytes"]["mod"]
        flops = one["decoder_flops"]
        table.add_row(
            str(count),
            str(one["visual_tokens"]),
            f"{whole / MIB:.1f} → {less / MIB:.1f}",
            f"{100 * less / whole:.0f} %",
            f"{100 * flops[1] / flops[0]:.0f} %",
            *(f"{one[k]['faster']:.2f} x ± {one[k]['spread']:.2f}" for k in ("prefill", "step")),
        )
    Console().print(table)
    if json_file is not None:
        setting = {"shape": shape, "keep": keep, "every": every, "dtype": dtype, "threads": threads}
        found = {"setting": setting, "machine": facts(place), "rows": rows}
        write(json_file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
