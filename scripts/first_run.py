"""What `make demo` shows: the same answer from fewer tokens, and what that is worth in time.

Three things, measured in the run itself but for the last:

1. the embedded model's answer with all visual tokens and with a quarter of them;
2. the time to the first token of a LLaVA of half a billion random weights: all tokens, pruned,
   and the floor, a natively short prompt for which nothing is chosen. Once for one picture, vision
   tower included, and once for five, of the language model alone;
3. what the same pruning is worth on LLaVA-NeXT-7B, by formula.

Times differ from machine to machine and from run to run, so ratios are what is shown. Runs offline.

    python scripts/first_run.py [--quick] [--save-overlay FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmprune import VisPruner, embedded
from vlmprune.cli import app
from vlmprune.io import models
from vlmprune.study.bench import shapes
from vlmprune.study.bench.floor import counts_of, floor_of
from vlmprune.study.measure import timed

SCENE, QUESTION, KEEP = "coffee.jpg", "where is the cat?", 64
SHAPE, QUICK = "llava-0.5b", "small"
# Pictures of a prompt, visual tokens kept of each, and what is timed.
WORKS = ((1, 64, "first_ms"), (5, 29, "prefill_ms"))
WHAT = {
    "first_ms": "time to the first token, vision tower included",
    "prefill_ms": "the language model alone",
}
TEXT = 64
FLOOR = "floor: a natively short prompt, for which nothing is chosen and nothing attached"
AFTER = "the same on LLaVA-NeXT-7B, by formula"
PLAN = ["plan", "llava-next-7b", "--keep", "29"]


def question() -> list[str]:
    """The command that asks the embedded model."""
    return ["run", str(embedded.scenes() / SCENE), QUESTION, "--keep", str(KEEP)]


@dataclass(frozen=True)
class Way:
    """One way of answering a prompt.

    Attributes:
        name: of it.
        tokens: visual tokens that the language model sees.
        ms: that it took.
    """

    name: str
    tokens: int
    ms: float


def measured(model: Any, images: int, keep: int, what: str, warm: bool) -> list[Way]:
    """All tokens, pruned, and the floor, on the same pictures and words.

    Args:
        model: from `shapes.build`.
        images: pictures of the prompt.
        keep: visual tokens to keep of each.
        what: the field of `Timed` that counts.
        warm: whether all that is short is done once before, and does not count.
    """
    inputs = shapes.prompt(model, 1, images, TEXT)
    pruner = VisPruner(keep=keep)
    for _ in range(1 + warm):
        with models.attached(pruner, model) as handle:
            pruned = timed(model, inputs, 1)
            assert handle is not None and handle.report is not None
            report = handle.report
        floor = floor_of(model, inputs, counts_of(report)[0])
        with floor.on(model):
            short = timed(model, floor.inputs, 1)
    whole = timed(model, inputs, 1)
    return [
        Way("all tokens", report.visual_tokens_before, getattr(whole, what)),
        Way(f"vispruner, keep={keep}", report.visual_tokens_after, getattr(pruned, what)),
        Way("floor", floor.visual_tokens, getattr(short, what)),
    ]


def lines(ways: Sequence[Way], images: int, what: str) -> list[str]:
    """A table of ratios to the first way."""
    pictures = "a picture" if images == 1 else f"{images} pictures"
    found = [f"{pictures}, {WHAT[what]}"]
    for way in ways:
        share = way.ms / ways[0].ms
        faster = "" if way is ways[0] else f"{1 / share:.1f}x"
        found.append(f"  {way.name:<24}{way.tokens:>6} tokens {share:>6.2f} {faster:>7}".rstrip())
    return found


def heading(name: str, weights: int, dtype: torch.dtype, device: str, threads: int) -> str:
    """What was timed, where."""
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{name} shape, {weights / 1e9:.2f} billion random weights; {kind}, {device}, "
        f"{threads} thread(s)"
    )


def main() -> None:
    """Run it."""
    asked = argparse.ArgumentParser(description="The same answer from a quarter of the tokens.")
    asked.add_argument("--quick", action="store_true", help=f"time the {QUICK} shape instead")
    asked.add_argument("--save-overlay", metavar="FILE", help="draw the kept tokens there")
    given = asked.parse_args()
    drawn = ["--save-overlay", given.save_overlay] if given.save_overlay else []
    app([*question(), *drawn], standalone_mode=False)
    print(flush=True)

    name = QUICK if given.quick else SHAPE
    config = shapes.config_of(name)
    device, dtype = torch.device("cpu"), torch.float32
    shapes.check_memory(name, config, device, dtype, max(n for n, *_ in WORKS) * 576 + TEXT)
    with models.quiet():
        model = shapes.build(config, device, dtype)
        weights = shapes.parameters(config)
        print(heading(name, weights, dtype, device.type, torch.get_num_threads()), flush=True)
        for number, (images, keep, what) in enumerate(WORKS):
            # The second work finds everything warm.
            ways = measured(model, images, keep, what, warm=not number)
            print("\n".join(["", *lines(ways, images, what)]), flush=True)
    print(f"\n{FLOOR}\n\n{AFTER}", flush=True)
    app(PLAN, standalone_mode=False)


if __name__ == "__main__":
    main()
