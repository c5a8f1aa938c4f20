"""One turn of `host_cost.py`, by whichever vlmprune is on the path: JSON of ratios and numbers.

    python benchmarks/host_cost_turn.py 15 20 32

Calls are timed in pairs, a pruned one and the one that it is compared with, each in the lead every
other time, on two copies of one model. Only names that every release of the library has are
imported, so that checkouts can be compared.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune
from vlmprune import PLPHP, FastV, VisPruner

HEADS, IMAGE, COUNTED = 4, 5, 8
METHODS: dict[str, Any] = {
    "VisPruner, all kept": VisPruner(keep=16),
    "PLPHP": PLPHP(r=0.4),
    "PLPHP, adaptive": PLPHP(r=0.4, per_head="adaptive"),
    "FastV": FastV(keep=8),
}
if hasattr(vlmprune, "Recall"):
    # Read in part at every size, where it would step aside by itself.
    METHODS["Recall"] = vlmprune.Recall(read=4, floor=0, always=True)
FIRST, STEP = "first token", "step"
LONG, KEPT, PICTURES = 576, 64, 64


@dataclass
class Side:
    """A model and what it is asked.

    Attributes:
        model: the model.
        inputs: of `generate`.
        on: what it runs within.
    """

    model: Any
    inputs: dict[str, torch.Tensor]
    on: Callable[[], Any] = nullcontext

    def answer(self, count: int) -> None:
        """Generate so many tokens."""
        self.model.generate(**self.inputs, max_new_tokens=count, do_sample=False)

    def cost(self, count: int) -> float:
        """CPU seconds of that."""
        start = time.process_time()
        self.answer(count)
        return time.process_time() - start

    def operations(self, count: int) -> int:
        """How many operations on tensors it is for torch's profiler, those within others apart."""
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            self.answer(count)
        found = [one for one in seen.events() if one.name.startswith("aten::")]
        above = [one.cpu_parent for one in found]
        return sum(one is None or not one.name.startswith("aten::") for one in above)


def tiny(layers: int, kv_heads: int, side: int = 56, pictures: int = 1) -> Side:
    """A model of so many narrow layers, and a request for it."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": HEADS}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=side, patch_size=14)
    text = LlamaConfig(
        **sizes, num_hidden_layers=layers, vocab_size=64, num_key_value_heads=kv_heads
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    pixels = torch.randn(pictures, 3, side, side)
    return Side(model, {**prompt((side // 14) ** 2 * pictures), "pixel_values": pixels})


def prompt(placeholders: int) -> dict[str, torch.Tensor]:
    """Words around so many visual tokens."""
    ids = torch.tensor([[1, 7, *[IMAGE] * placeholders, 8, 9, 10]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def natively_short(side: Side, kept: int) -> Side:
    """The same pixels in a prompt that has so many visual tokens from the start."""
    short = Side(copy.deepcopy(side.model), {**side.inputs, **prompt(kept)})
    original = short.model.model.get_image_features

    @functools.wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        # A list of pictures, or what has one.
        if isinstance(output, list | tuple):
            return [one[:kept] for one in output]
        output.pooler_output = [one[:kept] for one in output.pooler_output]
        return output

    short.model.model.get_image_features = features
    return short


def paired(ours: Side, other: Side, method: Any, times: int, tokens: int) -> dict[str, float]:
    """What a call under a method takes relative to the other: a first token, and a step."""
    found: dict[str, list[float]] = {FIRST: [], STEP: []}
    with method(ours.model):
        # A first call proves the contract with Transformers, which later ones do not.
        for side in (ours, other):
            side.answer(2)
        for number in range(times):
            took = {}
            for side in (ours, other)[:: 1 if number % 2 else -1]:
                first = side.cost(1)
                took[side is ours] = first, (side.cost(1 + tokens) - first) / tokens
            for what, mine, theirs in zip(found, took[True], took[False], strict=True):
                found[what].append(mine / theirs)
    return {what: statistics.median(each) for what, each in found.items()}


def operations(kv_heads: int, layers: int) -> dict[str, dict[str, float]]:
    """How many operations on tensors a layer has more, by method, in a first token and in a step.

    What a model of twice as many layers has more, so that what a call has once does not count. The
    first step, which lays out what the others read, is not among the steps. Of fewer layers, for a
    layer has as many in any model, and the profiler takes its time.
    """
    few = min(layers, COUNTED)
    found = [above(kv_heads, count) for count in (few, 2 * few)]
    return {
        name: {what: (found[1][name][what] - least) / few for what, least in calls.items()}
        for name, calls in found[0].items()
    }


def above(kv_heads: int, layers: int) -> dict[str, dict[str, int]]:
    """How many operations calls have more than those of the unpruned model."""
    other = tiny(layers, kv_heads)
    ours = Side(copy.deepcopy(other.model), other.inputs)

    def counted(side: Side) -> tuple[int, int]:
        first, second, third = (side.operations(count) for count in (1, 2, 3))
        return first, third - second

    bare, out = counted(other), {}
    for name, method in METHODS.items():
        with method(ours.model):
            ours.answer(2)
            pairs = zip((FIRST, STEP), counted(ours), bare, strict=True)
            out[name] = {what: mine - theirs for what, mine, theirs in pairs}
    return out


def main(times: int, tokens: int, layers: int) -> dict[str, dict[str, dict[str, float]]]:
    """By what is measured and method, ratios (and numbers) of a first token and of a step."""
    torch.set_num_threads(1)
    out: dict[str, dict[str, dict[str, float]]] = {}
    for heads, kv_heads in (("MHA", HEADS), ("GQA", HEADS // 2)):
        other = tiny(layers, kv_heads)
        ours = Side(copy.deepcopy(other.model), other.inputs)
        out[heads] = {
            name: paired(ours, other, method, times, tokens) for name, method in METHODS.items()
        }
        out[f"{heads}, operations"] = operations(kv_heads, layers)
    long = tiny(layers, HEADS, side=336)
    short = natively_short(long, KEPT)
    many = tiny(layers, HEADS, pictures=PICTURES)
    every = Side(copy.deepcopy(many.model), many.inputs)
    for name, pair, keep in (
        (f"{LONG} → {KEPT}, to a natively short prompt", (long, short), KEPT),
        (f"{PICTURES} pictures, all kept", (every, many), 16),
    ):
        found = paired(*pair, VisPruner(keep=keep), max(1, times // 3), 1)
        out[name] = {"VisPruner": {FIRST: found[FIRST]}}
    return out


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
