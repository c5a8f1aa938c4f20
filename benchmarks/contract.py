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

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmprune import PLPHP, FastV, VisPruner
from vlmprune.files import write
from vlmprune.hosts import contract
from vlmprune.hosts.contract import Reached
from vlmprune.hosts.release import cache_returned, version
from vlmprune.hosts.requests import ModelCall
from vlmprune.runtime.cache.ragged_layer import Binding
from vlmprune.runtime.call.progress import following
from vlmprune.runtime.call.state import Active
from vlmprune.study.measure import facts

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


def built() -> Any:
    """The tiny model."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        vocab_size=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=3)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def asked() -> dict[str, Tensor]:
    """A picture amid words."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(7, 128, (1, WORDS), generator=generator)
    visual = torch.full((1, (SIDE // PATCH) ** 2), 3)
    ids = torch.cat((words[:, : WORDS // 2], visual, words[:, WORDS // 2 :]), dim=1)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of some work, on one thread; wall time on several."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    work()
    return now() - start


def step(model: Any, inputs: dict[str, Tensor], tokens: int) -> float:
    """Seconds of one further token."""

    def answer(count: int) -> float:
        return seconds(lambda: model.generate(**inputs, do_sample=False, max_new_tokens=count))

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
    return statistics.median(seconds(once) for _ in range(times))


def measured(name: str, times: int, tokens: int, rounds: int) -> dict[str, float]:
    """The figures of one method."""
    model, inputs, pruner = built(), asked(), METHODS[name]
    with Counted() as attaching:
        handle = pruner.attach(model)
    first = seconds(lambda: model.generate(**inputs, max_new_tokens=2))
    later = statistics.median(
        seconds(lambda: model.generate(**inputs, max_new_tokens=2)) for _ in range(rounds)
    )
    alone = checks(handle, inputs, times)
    steps, ratios = list[float](), list[float]()
    for _ in range(rounds):
        steps.append(step(model, inputs, tokens))
        with contract.switched_off():
            ratios.append(steps[-1] / step(model, inputs, tokens))
    handle.detach()
    return {
        "operations_at_attach": attaching.count,
        "first_call_over_later": first / later,
        "checks_over_step": alone / statistics.median(steps),
        "step_over_step_without": statistics.median(ratios),
    }


def main(
    times: Annotated[int, typer.Option(help="how often the checks of a step are timed")] = 1000,
    tokens: Annotated[int, typer.Option(help="further tokens of a timed answer")] = 32,
    rounds: Annotated[int, typer.Option(help="how often answers are timed")] = 9,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Measure what the contract costs."""
    found = {name: measured(name, times, tokens, rounds) for name in METHODS}
    table = Table(title=f"transformers {version()}, {LAYERS} layers of width {WIDTH}")
    for column in ("method", "operations at attach", "first call", "checks of a step", "step"):
        table.add_column(column, justify="right" if column != "method" else "left")
    for name, one in found.items():
        table.add_row(
            name,
            str(one["operations_at_attach"]),
            f"{one['first_call_over_later']:.1f} x a later one",
            f"{one['checks_over_step']:.2%} of it",
            f"{one['step_over_step_without']:.3f} x without",
        )
    Console().print(table)
    if json_path is not None:
        content = {"machine": facts(torch.device("cpu")), "methods": found}
        write(json_path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
