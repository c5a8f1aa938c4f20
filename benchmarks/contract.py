"""What the contract with Transformers costs: at attach, at a first call, after each call.

    OMP_NUM_THREADS=1 python benchmarks/contract.py
    OMP_NUM_THREADS=1 python benchmarks/contract.py --json contract.json

A tiny model of 32 layers, where little but our own work costs anything, generates under one pruner
of each kind. The checks of a decode step are timed alone, on a cache as the step leaves it, as a
median of many; the step is the time that each further token of `generate` takes, which they are a
part of. Attaching is followed operation by operation; first calls are compared with second ones.
On one CPU thread, times are of processor time, which bears other work on the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from page_parts import table
from program import about, command, save
from turns import ratio, seconds
from vlmprune import PLPHP, FastV, VisPruner
from vlmprune.hosts import contract, pretrained
from vlmprune.hosts.contract import Reached
from vlmprune.hosts.release import cache_returned
from vlmprune.hosts.requests import ModelCall
from vlmprune.runtime.cache.binding import Binding
from vlmprune.runtime.call.progress import following
from vlmprune.runtime.call.state import Active
from vlmprune.study.bench import shapes
from vlmprune.study.measure import facts

CPU = torch.device("cpu")
LAYERS, WIDTH, HEADS = 32, 64, 4
# Visual tokens of the picture, and words around them.
SIDE, PATCH, WORDS = 56, 14, 12
METHODS = {"VisPruner": VisPruner(keep=8), "PLPHP": PLPHP(r=0.4), "FastV": FastV(keep=0.5)}


class Counted(TorchDispatchMode):
    """Counts the operations on tensors inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def built() -> tuple[Any, dict[str, Tensor]]:
    """The tiny model, and a picture amid words."""
    wide = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS}
    text = {"num_hidden_layers": LAYERS, "num_key_value_heads": HEADS // 2, "vocab_size": 128}
    tower = {"num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH}
    config = pretrained.llava_config(
        "llava", {**wide, **text}, {**wide, **tower}, image_token_index=3, tie_word_embeddings=False
    )
    model = shapes.build(config, CPU, torch.float32)
    return model, shapes.prompt(model, 1, 1, WORDS)


def step(model: Any, inputs: dict[str, Tensor], tokens: int) -> float:
    """Seconds of one further token."""

    def answer(count: int) -> float:
        call = partial(model.generate, **inputs, do_sample=False, max_new_tokens=count)
        return seconds(call, CPU)

    return (answer(tokens + 1) - answer(1)) / tokens


def checks(handle: Any, inputs: dict[str, Tensor], times: int) -> float:
    """Seconds of all that is checked in one decode step, on a cache as a step leaves it."""
    model = handle.model
    answer = model.generate(
        **inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True
    )
    cache = cache_returned(answer)
    # No column comes, so that the cache is the same behind the block.
    ids = answer.sequences[:, :0]
    call = ModelCall(model, {"input_ids": ids}).with_cache(cache)
    attachment = handle.attachment
    state = Active(attachment, {}, ids[:, 0] if ids.numel() else ids.sum(dim=1), None, False)
    progress = state.progress
    progress.cache, progress.length = cache, cache.get_seq_length()
    progress.begun = True
    layers, binding = range(LAYERS), Binding()
    decoder = model.get_decoder().layers

    def once() -> None:
        with following(attachment, state, call):
            pass
        if attachment.asks:
            reached = Reached()
            for index in layers:
                reached.note(index, decoder[index])
            reached.check(model, layers, "")
        if attachment.method.cuts:
            for _ in layers:
                binding.check_attended()

    once()
    return statistics.median(seconds(once, CPU) for _ in range(times))


def measured(name: str, times: int, tokens: int, rounds: int) -> dict[str, float]:
    """The figures of one method."""
    (model, inputs), pruner = built(), METHODS[name]
    with Counted() as attaching:
        handle = pruner.attach(model)
    call = partial(model.generate, **inputs, max_new_tokens=2)
    first = seconds(call, CPU)
    later = statistics.median(seconds(call, CPU) for _ in range(rounds))
    alone = checks(handle, inputs, times)
    steps, without = list[float](), list[float]()
    for _ in range(rounds):
        steps.append(step(model, inputs, tokens))
        with contract.switched_off():
            without.append(step(model, inputs, tokens))
    handle.detach()
    return {
        "operations_at_attach": attaching.count,
        "first_call_over_later": first / later,
        "checks_over_step": alone / statistics.median(steps),
        "step_over_step_without": ratio(steps, without)[0],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """A table of all methods."""
    heads = ["method", "operations on tensors at attach", "first call / a later one"]
    heads += ["checks of a step / the step", "step / without"]
    rows = [
        [
            name,
            str(one["operations_at_attach"]),
            f"{one['first_call_over_later']:.1f}",
            f"{one['checks_over_step']:.2%}",
            f"{one['step_over_step_without']:.3f}",
        ]
        for name, one in found["methods"].items()
    ]
    told = f"{LAYERS} layers of width {WIDTH}; {about(found['machine'])}."
    return f"{told}\n\n{table(heads, rows)}"


def main(
    times: Annotated[int, typer.Option(help="how often a step's checks are timed", min=1)] = 1000,
    tokens: Annotated[int, typer.Option(help="further tokens of a timed answer", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="how often answers are timed", min=1)] = 9,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Measure what the contract costs."""
    methods = {name: measured(name, times, tokens, rounds) for name in METHODS}
    found = {"machine": facts(CPU), "methods": methods}
    print(markdown(found))
    save(json_path, found)


if __name__ == "__main__":
    command(main)()
