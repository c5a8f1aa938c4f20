"""What a step of training saves with fewer visual tokens: time, and memory held for its gradients.

    python benchmarks/training_steps.py --json benchmarks/results/training.json

The embedded model's language model and projector learn answers about its scenes, the vision tower
is frozen. With and without a pruner take turns on the same rows in one process; times are CPU
seconds of all threads, so that others on the machine weigh little, and stand as ratios. Memory is
counted, not sampled: the bytes of all tensors that autograd holds between forward and backward,
each storage once and without weights, the largest part of a step's peak beside weights, gradients
and the optimizer, which pruning leaves alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from page_parts import around, mib, table
from program import about, command, content, place, save
from turns import ratio
from vlmprune import embedded, spec
from vlmprune.io.pictures import open_image
from vlmprune.pruner import Pruner

METHODS = ["random:keep=64", "vispruner:keep=64", "vispruner:keep=128", "fastv:keep=64"]
WHOLE = "unpruned"


def rows_of(processor: Any, count: int) -> dict[str, Tensor]:
    """A batch of questions with their answers, which alone carry loss."""
    folder = embedded.held_out()
    scenes = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    some = [(scene["file"], one) for scene in scenes for one in scene["questions"]][:count]
    asked = [f"USER: <image>\n{one['question']} ASSISTANT:" for _, one in some]
    texts = [f"{text} {one['answer']}" for text, (_, one) in zip(asked, some, strict=True)]
    pictures = [open_image(str(folder / file)) for file, _ in some]
    given: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "right"}
    inputs = processor(text=texts, images=pictures, **given)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    before = processor(text=asked, images=pictures, **given)["attention_mask"].sum(dim=1)
    for row, start in zip(labels, before.tolist(), strict=True):
        row[:start] = -100
    return dict(inputs) | {"labels": labels}


class Held:
    """The bytes that autograd holds, each storage once, without those of weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
        self.weights |= {one.untyped_storage().data_ptr() for one in model.buffers()}
        self.storages: dict[int, Any] = {}

    def pack(self, one: Tensor) -> Tensor:
        """Note a tensor that is held, and hold it, so that no other takes its place."""
        storage = one.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage
        return one

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(one.nbytes() for one in self.storages.values())


def step(model: Any, inputs: dict[str, Tensor], optimizer: Any, held: Held | None) -> float:
    """CPU seconds of one step of training; notes what is held where that is asked for."""
    hooks = nullcontext() if held is None else _noting(held)
    start = time.process_time()
    with hooks:
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def _noting(held: Held) -> Any:
    return torch.autograd.graph.saved_tensors_hooks(held.pack, lambda one: one)


def lines(found: dict[str, Any]) -> str:
    """The table of what a run found."""
    seconds, held, tokens = found["cpu_seconds"], found["bytes_held"], found["tokens"]
    rows = [
        [
            name,
            str(tokens[name] // found["setting"]["batch"]),
            "1" if name == WHOLE else around(ratio(seconds[name], seconds[WHOLE])),
            f"{held[name] / held[WHOLE]:.2f}",
            mib(held[name]),
        ]
        for name in seconds
    ]
    heads = ["", "visual tokens", "step / unpruned", "held / unpruned", "held, MiB"]
    return table(heads, rows)


def main(
    method: Annotated[list[str] | None, typer.Option(help="a spec, as often as wanted")] = None,
    batch: Annotated[int, typer.Option(help="rows of a step", min=1)] = 4,
    pairs: Annotated[int, typer.Option(help="steps of each kind", min=2)] = 8,
    threads: Annotated[int, typer.Option(help="of a CPU", min=1)] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Measure steps of training with and without a pruner."""
    device, _ = place("cpu", None, threads)
    ways: dict[str, Pruner | None] = {WHOLE: None}
    ways |= {one: spec.parse(one) for one in method or METHODS}
    model, processor = embedded.load()
    model.train().model.vision_tower.requires_grad_(False)
    inputs = rows_of(processor, batch)
    learned = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    bytes_held, columns = dict[str, int](), dict[str, int]()
    # The first two steps of each are warm-ups: they prove the contract, and note what is held.
    for number in range(pairs + 2):
        order: Sequence[str] = list(ways) if number % 2 else list(ways)[::-1]
        for name in order:
            pruner, held = ways[name], Held(model) if number == 1 else None
            if pruner is None:
                spent = step(model, inputs, optimizer, held)
            else:
                # Attached for two steps, of which the second proves nothing any more.
                with pruner(model, logits="short") as handle:
                    step(model, inputs, optimizer, None)
                    spent = step(model, inputs, optimizer, held)
                    columns[name] = handle.report.visual_tokens_after
            if held is not None:
                bytes_held[name] = held.bytes
            if number > 1:
                seconds[name].append(spent)
    columns[WHOLE] = batch * 256
    setting = {"batch": batch, "pairs": pairs, "columns": inputs["input_ids"].shape[1]}
    found = content(device, setting, cpu_seconds=seconds, bytes_held=bytes_held, tokens=columns)
    print(f"{about(found['setting'], f'batches of {batch}')}.\n\n{lines(found)}")
    median = statistics.median(seconds[WHOLE])
    print(f"\nAn unpruned step takes {median:.2f} CPU seconds (median of {pairs}).")
    save(json_path, found)


if __name__ == "__main__":
    command(main)()
