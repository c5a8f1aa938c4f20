"""Encodings that are remembered within `encoded_once` change no choice and run no encoder."""

from __future__ import annotations

import torch

from encoded_once import encoded_once
from tiny import model, request
from vlmprune import DivPrune, FasterVLM


def test_a_second_call_takes_what_was_encoded() -> None:
    built = model()
    inputs = request(built, [1]).inputs
    runs: list[None] = []
    tower = built.model.vision_tower
    hook = tower.register_forward_hook(lambda *_: runs.append(None))

    def kept(pruner: FasterVLM | DivPrune) -> torch.Tensor:
        with torch.no_grad(), pruner(built) as handle:
            built(**inputs)
        assert handle.report is not None
        return handle.report.kept[0]

    pruners = [FasterVLM(keep=4), FasterVLM(keep=7), DivPrune(keep=5)]
    plain = [kept(one) for one in pruners]
    with encoded_once():
        first = [kept(one) for one in pruners]
        runs.clear()
        again = [kept(one) for one in pruners[::-1]][::-1]
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(runs) < len(pruners)
