"""What tokens that skip every other layer save: KV bytes, FLOPs, prefill and decoding.

    python benchmarks/skipping.py --images 1 --images 4 --images 8
    python benchmarks/skipping.py --shape llava-1.5-7b --images 4 --images 16 --device cuda

A model of a known shape with random weights reads pictures, each a frame, with and without
VideoLLM-MoD's routers, which are untrained: which tokens they take does not matter to speed. Bytes
are those that each layer's cache really holds, beside those that the report tells; FLOPs are by
`vlmprune.costs`. Times are those of the language model alone, of one prompt and of single steps
after it. Both ways take turns; ratios are medians over turns of the ratio within one turn,
with half the distance between the quartiles. With one thread on a CPU, times are of processor time,
which bears other work on the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from page_parts import around, mib, table
from program import about, command, place, save
from turns import clock, ratio
from vlmprune import MoD
from vlmprune.hosts.release import cache_returned, with_cache
from vlmprune.study.bench import shapes
from vlmprune.study.measure import facts, stored_bytes


@contextmanager
def stopwatch(model: Any, spent: list[float]) -> Iterator[None]:
    """Note how long each call of the language model takes, in seconds."""
    begun: list[float] = []

    def before(*_: Any) -> None:
        begun.append(clock(model.device))

    def after(*_: Any) -> None:
        spent.append(clock(model.device) - begun.pop())

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
    faster = {}
    for i, what in enumerate(("prefill", "step")):
        dense, mod = ([spent[i] for spent in times[name]] for name in ways)
        faster[what] = ratio(dense, mod)
    return {
        "visual_tokens": report.visual_tokens_before,
        "tokens_by_layer": layers,
        "cache_bytes": bytes_of,
        "kv_bytes_of_visual_tokens": [report.kv_bytes_before, report.kv_bytes_after],
        "decoder_flops": [report.decoder_flops_before, report.decoder_flops_after],
        "seconds": {name: {"prompt_and_step": times[name]} for name in ways},
        "times_faster": faster,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """A table of all prompts."""
    heads = ["frames", "visual tokens", "cache MiB", "of it", "FLOPs"]
    heads += ["prefill, times faster", "step, times faster"]
    rows = []
    for one in found["rows"]:
        whole, less = (one["cache_bytes"][name] for name in ("dense", "mod"))
        before, after = one["decoder_flops"]
        rows.append(
            [
                str(one["images"]),
                str(one["visual_tokens"]),
                f"{mib(whole)} → {mib(less)}",
                f"{100 * less / whole:.0f} %",
                f"{100 * after / before:.0f} %",
                *(around(made) for made in one["times_faster"].values()),
            ]
        )
    setting = found["setting"]
    told = f"{setting['shape']}; {about(found['machine'], setting['dtype'])}."
    return f"{told}\n\n{table(heads, rows)}"


def main(
    shape: Annotated[str, typer.Option(help="one of vlmprune's known shapes")] = "small",
    images: Annotated[list[int] | None, typer.Option(help="frames of a prompt", min=1)] = None,
    keep: Annotated[float, typer.Option(help="share that a skipped layer works on")] = 0.2,
    every: Annotated[int, typer.Option(help="from one such layer to the next")] = 2,
    layers: Annotated[int | None, typer.Option(help="only so many decoder layers")] = None,
    turns: Annotated[int, typer.Option(help="that are timed", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="after each prompt", min=1)] = 8,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure, and print a table."""
    where, kind = place(device, dtype, threads)
    model = shapes.build(shapes.config_of(shape, layers), where, kind)
    method = MoD.fresh(model, keep=keep, every=every)
    rows = []
    for count in images or [1, 4, 8]:
        inputs = shapes.prompt(model, 1, count, 32)
        rows.append({"images": count, **measured(model, method, inputs, turns, steps)})
    setting = {"shape": shape, "keep": keep, "every": every, "dtype": dtype, "threads": threads}
    found = {"setting": setting, "machine": facts(where), "rows": rows}
    print(markdown(found))
    save(json_file, found)


if __name__ == "__main__":
    command(main)()
