"""What a compiled decode step gains on a static cache, without a pruner and under VisPruner.

    python benchmarks/compiled.py --device cuda --shape llava-1.5-7b
    python benchmarks/compiled.py --device cpu --shape small --layers 2 --tower-layers 2 --tokens 4

A model of a known shape with random weights answers a picture on Transformers' dynamic cache and on
its static one, for which `generate` compiles the step; on a CPU by torch's default backend, which
needs a C++ compiler, or by `--backend eager`, which compiles nothing and tries the program alone.
Before it is timed each way must answer the same tokens as on the dynamic cache. Told is the time of
a further token relative to the unpruned model on its dynamic cache, in turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import CompileConfig

from page_parts import around, table
from program import about, command, content, place, refuse, save
from turns import in_turns, ratio, seconds
from vlmprune import VisPruner
from vlmprune.study.bench import shapes

WORDS = 64
PRUNED, WHOLE = "VisPruner", "unpruned"
DYNAMIC, STATIC = "dynamic cache", "static cache, compiled step"


def settings(kind: str, backend: str, device: torch.device) -> dict[str, Any]:
    """Of `generate`, by the kind of cache."""
    if kind == DYNAMIC:
        return {}
    compiling = CompileConfig(backend=backend)
    if device.type == "cpu":
        compiling.mode = "default"
        # It compiles on other devices by itself.
        compiling._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compiling}


def markdown(found: Mapping[str, Any]) -> str:
    """What was found, as a table."""
    setting, rows = found["setting"], found["relative"]
    head = f"{about(setting, setting['shape'], str(setting['tokens']) + ' tokens')}."
    cells = [[*name.split(", ", 1), around(ratio(r, [1.0] * len(r)))] for name, r in rows.items()]
    return f"{head}\n\n{table(['', 'cache', 'time of a further token'], cells)}"


def main(
    shape: Annotated[str, typer.Option(help="a known shape")] = "llava-1.5-7b",
    keep: Annotated[int, typer.Option(help="visual tokens that are left of a picture")] = 64,
    tokens: Annotated[int, typer.Option(help="further tokens of an answer", min=1)] = 64,
    repeat: Annotated[int, typer.Option(help="turns", min=1)] = 5,
    layers: Annotated[int | None, typer.Option(help="decoder layers")] = None,
    tower_layers: Annotated[int | None, typer.Option(help="of the vision tower")] = None,
    backend: Annotated[str, typer.Option(help="of torch.compile")] = "inductor",
    device: Annotated[str | None, typer.Option(help="as torch names it")] = None,
    dtype: Annotated[str | None, typer.Option(help="type of the weights")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Time further tokens with and without compilation."""
    where, kind = place(device, dtype)
    model = shapes.build(shapes.config_of(shape, layers, tower_layers), where, kind)
    inputs = shapes.prompt(model, 1, 1, WORDS)
    pruner = VisPruner(keep=keep)

    def answer(name: str, count: int) -> Any:
        who, cache = name.split(", ", 1)
        with pruner(model) if who == PRUNED else nullcontext():
            return model.generate(
                **inputs,
                **settings(cache, backend, where),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )

    def further(name: str) -> float:
        long, short = (seconds(partial(answer, name, n), where) for n in (1 + tokens, 1))
        return (long - short) / tokens

    names = [f"{who}, {cache}" for who in (WHOLE, PRUNED) for cache in (DYNAMIC, STATIC)]
    for who in (WHOLE, PRUNED):
        # Compiled here; half precision may round otherwise then.
        same = [answer(f"{who}, {cache}", 1 + tokens) for cache in (DYNAMIC, STATIC)]
        differ = kind == torch.float32 and not torch.equal(*same)
        refuse({f"compiled steps answer otherwise than others ({who}).": differ})
    taken = in_turns(names, further, repeat)
    bare = taken[f"{WHOLE}, {DYNAMIC}"]
    relative = {
        name: [a / b for a, b in zip(each, bare, strict=True)] for name, each in taken.items()
    }
    setting = {"shape": shape, "keep": keep, "tokens": tokens, "backend": backend, "dtype": kind}
    setting["dtype"] = str(kind).removeprefix("torch.")
    found = content(where, setting, relative=relative)
    print(markdown(found))
    save(json_path, found)


if __name__ == "__main__":
    command(main)()
