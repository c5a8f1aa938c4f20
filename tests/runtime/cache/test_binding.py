"""Attention that takes something else than what the layers of a cut cache return."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from answers import TOLERANCE, distance, generate
from tiny import model, request
from vlmprune import PLPHP
from vlmprune.hosts.contract import ContractError
from zoo import ZOO

Attend = Callable[..., Any]


def through(built: Any, patch: pytest.MonkeyPatch, change: Callable[[Attend], Attend]) -> None:
    """Let the decoder's attention call what `change` makes of each attention function."""
    file = sys.modules[type(built.get_decoder().layers[0].self_attn).__module__]
    registry = file.ALL_ATTENTION_FUNCTIONS
    own = type(registry).get_interface
    patch.setattr(registry, "get_interface", lambda *args: change(own(registry, *args)))


def test_values_that_are_attended_to_in_parts_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    inputs = request(built, [1]).inputs
    plain = generate(built, inputs)

    def halved(attend: Attend) -> Attend:
        def run(module: Any, query: Any, key: Any, value: Any, *more: Any, **others: Any) -> Any:
            halves = value.chunk(2, dim=3)
            found = [attend(module, query, key, one, *more, **others)[0] for one in halves]
            return torch.cat(found, dim=3), None

        return run

    through(built, monkeypatch, halved)
    assert distance(plain, generate(built, inputs)) < TOLERANCE
    said = (
        "^LlamaAttention cannot be .*: it attends to a part of its values at a time; the model is"
    )
    with PLPHP()(built), pytest.raises(ContractError, match=said):
        generate(built, inputs)


def test_a_borrower_that_attends_to_other_keys_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sixth layer attends to what the fourth holds, of which it is handed a copy here."""
    built = ZOO["gemma4_small"].build("sdpa")
    inputs = ZOO["gemma4_small"].request(built, [["image", "image"]]).inputs
    borrower = built.get_decoder().layers[5].self_attn

    def copied(attend: Attend) -> Attend:
        def run(module: Any, query: Any, key: Any, *more: Any, **others: Any) -> Any:
            own = key.clone() if module is borrower else key
            return attend(module, query, own, *more, **others)

        return run

    pruner = PLPHP(alpha=0.8, beta=0.6, per_head="adaptive")
    with pruner(built):
        generate(built, inputs)
    through(built, monkeypatch, copied)
    said = ": it attends to other keys than the cache of layer 3; the model is as it was before"
    with pruner(built), pytest.raises(ContractError, match=said):
        generate(built, inputs)
