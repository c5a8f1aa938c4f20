"""Choices by the kernels of `choice_triton`, held to the plain rules."""

from __future__ import annotations

import random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from repository import ROOT
from vlmprune.select import duplicates, rules


def crops(count: int, tokens: int, channels: int, seed: int, signs: bool) -> tuple[Tensor, Tensor]:
    """Attention and features; of signs, 4^n channels of them, no cosine is rounded anywhere."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(count, tokens, generator=generator).softmax(dim=1)
    features = torch.randn(count, tokens, channels, generator=generator)
    return attention, features.sign() if signs else features


def plain(rule: Any, *given: Any) -> Tensor:
    """What the plain rule chooses, on a CPU."""
    made: Tensor = rule(*(one.cpu() if isinstance(one, Tensor) else one for one in given))
    return made


def check(device: str, count: int) -> None:
    """`count` random cases of each rule, and the authors' masks."""
    from vlmprune.select import choice_triton

    draw = random.Random(0)
    asked = []
    before = rules._kernels

    def kernels(features: Tensor, steps: int = 0) -> Any:
        asked.append(choice_triton.fits(features, steps))
        return choice_triton

    for seed in range(count):
        tokens = draw.randint(2, 70)
        keep, ratio = draw.randint(1, tokens), draw.choice((0.0, 0.3, 0.5, 0.75, 1.0))
        channels = draw.choice((1, 4, 16, 64))
        attention, features = crops(draw.randint(1, 3), tokens, channels, seed, True)
        if draw.random() < 0.5:
            attention = (attention * tokens).round() / tokens
        _, uneven = crops(len(attention), tokens, 32, seed, False)
        relevance = torch.rand(attention.shape, generator=torch.Generator().manual_seed(seed))
        given = (
            (rules.vispruner, attention, features, keep, ratio),
            (rules.farthest_point, features, keep),
            (rules.conditional_dpp, uneven, relevance, min(keep, 24)),
        )
        for rule, *rest in given:
            want = plain(rule, *rest)
            rules._kernels = kernels
            try:
                got = rule(*(one.to(device) if isinstance(one, Tensor) else one for one in rest))
            finally:
                rules._kernels = before
            assert torch.equal(got.cpu(), want), (rule.__name__, seed, got, want)
    assert len(asked) > 2 * count and all(asked)


def check_golden(device: str) -> None:
    """The authors' masks, of which another ratio chooses others."""
    from vlmprune.select import choice_triton

    golden = load_file(ROOT / "tests/golden/selection.safetensors")
    attention = golden["cls_attention"].mean(dim=1).to(device)
    unit = torch.nn.functional.normalize(golden["features"].to(device).float(), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    if device == "cpu":
        # What the interpreter does takes its time by tiles, not by what is in them.
        choice_triton._TILE = 1 << 19
    want = golden["vispruner.keep64.important0.5"].to(device)
    for important, same in ((32, True), (16, False)):
        kept = choice_triton.thin(attention, similarity, 64, important, duplicates.ROUND)
        assert torch.equal(torch.zeros_like(want).scatter(1, kept, True), want) == same


def check_compiled() -> None:
    """The kernels' code for GPUs that need not be there."""
    from triton_compiled import Compiled
    from vlmprune.select import choice_triton

    compiled = Compiled()
    for capability, tokens in ((80, 576), (90, 576), (90, 4096)):
        compiled.target(capability)
        similarity, weight = torch.empty(1, tokens, tokens), torch.empty(1, tokens)
        choice_triton.thin(weight, similarity, 64, 32, duplicates.ROUND)
        choice_triton.spread(similarity, 64)
        choice_triton.explain(similarity, weight, 64)
        compiled.check(capability, 3)
    assert len(compiled.made) == 9
    # Registers of a program hold what it works on: nothing is spilled at a usual size.
    assert not any("local.depot" in kernel.asm["ptx"] for kernel in compiled.made)
