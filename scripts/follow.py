"""Follow one pruned call through the rooms of src/vlmprune.

    python scripts/follow.py [--method SPEC] [--edges]

A tiny LLaVA with random weights answers one question under a pruner, and a tracer notes each call
of one module of the package by another. Rooms, and the parts of `runtime`, are ranked as in
`.importlinter`. Printed are, up to the host's own `generate` and for the whole call, the modules
and rooms entered, how often the way goes from one module to another ("stays"), and which calls
climb, from a room to one above it. A method's own choice, asked for by the record `method.Method`,
is the one climb that is meant, and is counted apart; so is what the host calls of ours.
"""

from __future__ import annotations

import argparse
import configparser
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune
from vlmprune.spec import parse

ROOT = Path(vlmprune.__file__).parent
HERE = Path(__file__).resolve().parent.parent
# Who calls where Transformers or torch stand between: hooks, shadows, cache layers.
HOST = "host"
# It hands on what the host calls.
HOOKS = "runtime.hooks"
# What a method's own file, or its base, is called for.
CHOICES = ("methods", "pruner")


def ranks() -> dict[str, int]:
    """How high rooms stand, and within `runtime` its parts, the lowest 0."""
    config = configparser.ConfigParser()
    config.read(HERE / ".importlinter")
    out: dict[str, int] = {}
    inner = config["importlinter:contract:runtime"]["layers"].split("\n")
    parts = [line for line in inner if line.strip()]
    at = 0
    for line in reversed(
        [x for x in config["importlinter:contract:rooms"]["layers"].split("\n") if x]
    ):
        rooms = [one.strip() for one in line.split("|")]
        if "runtime" in rooms:
            for part in reversed(parts):
                out |= {f"runtime.{one.strip()}": at for one in part.split("|")}
                at += 1
        else:
            out |= dict.fromkeys(rooms, at)
            at += 1
    return out


class Tracer:
    """Notes calls from one module of the package to another."""

    def __init__(self, ranked: dict[str, int]) -> None:
        self.ranked = ranked
        self.before: list[tuple[str, str, str]] = []
        self.after: list[tuple[str, str, str]] = []
        self.generating = False
        # Frames that were seen, for a generator enters anew each time it goes on.
        self.seen: dict[int, Any] = {}

    def _module(self, code: Any) -> str | None:
        path = Path(code.co_filename)
        if not path.is_relative_to(ROOT):
            return None
        return ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def _room(self, module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2]) if parts[0] == "runtime" else parts[0]

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        """Note one event of Python's own tracing."""
        if event != "call":
            return
        code = frame.f_code
        if code.co_name == "generate" and "generation/utils" in code.co_filename.replace("\\", "/"):
            self.generating = True
        own = self._module(code)
        if own in (None, HOOKS) or code.co_name.startswith("<"):
            return
        if id(frame) in self.seen:
            return
        self.seen[id(frame)] = frame
        back, foreign = frame.f_back, False
        while back is not None and self._module(back.f_code) in (None, HOOKS):
            name = back.f_code.co_filename
            foreign |= "transformers" in name or "torch" in name
            back = back.f_back
        caller = "" if back is None else self._module(back.f_code) or ""
        if caller != own:
            edges = self.after if self.generating else self.before
            edges.append((HOST if foreign else caller, own, code.co_qualname))

    def told(self, edges: list[tuple[str, str, str]]) -> dict[str, Any]:
        """What passages come to."""
        climbs = Counter(
            (self._room(a), self._room(b), name)
            for a, b, name in edges
            if a not in ("", HOST)
            and self.ranked.get(self._room(b), 0) > self.ranked.get(self._room(a), 0)
        )
        meant = {edge: n for edge, n in climbs.items() if edge[1] in CHOICES}
        hooks = sum(a == HOST for a, _, _ in edges)
        return {
            "modules": len({b for _, b, _ in edges}),
            "rooms": sorted({self._room(b) for _, b, _ in edges}),
            "stays": len(edges),
            "climbs": {" > ".join(e): n for e, n in climbs.items() if e not in meant},
            "choices asked of the method": sum(meant.values()),
            "calls by the host": hooks,
        }


def tiny() -> tuple[Any, dict[str, Any]]:
    """A model and a request for it."""
    torch.manual_seed(0)
    shape: Any = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**shape, num_hidden_layers=3, image_size=56, patch_size=14)
    text = LlamaConfig(**shape, num_hidden_layers=3, vocab_size=64, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 7, *[5] * 16, 8, 9, 10]])
    pixels = torch.randn(1, 3, 56, 56)
    return model, {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    """Follow a call and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", default="vispruner:keep=8")
    parser.add_argument("--edges", action="store_true", help="print every passage, in order")
    given = parser.parse_args()
    model, inputs = tiny()
    options = {"max_new_tokens": 2, "do_sample": False}
    with parse(given.method)(model):
        # The first call proves the contract with Transformers, which later ones do not.
        model.generate(**inputs, **options)
        tracer = Tracer(ranks())
        sys.setprofile(tracer)
        try:
            model.generate(**inputs, **options)
        finally:
            sys.setprofile(None)
    for name, edges in (
        ("before the host's generate", tracer.before),
        ("the whole call", tracer.before + tracer.after),
    ):
        told = tracer.told(edges)
        print(
            f"{name}: {told['modules']} modules in {len(told['rooms'])} rooms, "
            f"{told['stays']} stays,"
        )
        print(f"  {sum(told['climbs'].values())} climbs,", end=" ")
        print(f"{told['choices asked of the method']} choices asked of the method,", end=" ")
        print(f"{told['calls by the host']} calls of ours by the host")
        for climb, times in told["climbs"].items():
            print(f"    {climb} ({times})")
    if given.edges:
        print(*(f"{a or 'user'} > {b}: {n}" for a, b, n in tracer.before), sep="\n")


if __name__ == "__main__":
    main()
