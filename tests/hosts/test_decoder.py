"""Layers that are not called as the release calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

from answers import generate
from tiny import model, request
from vlmprune import FastV, ToMe
from vlmprune.hosts.contract import ContractError


@pytest.mark.parametrize(
    ("pruner", "layers"),
    [
        (FastV(keep=4), lambda built: built.get_decoder().layers),
        (ToMe(keep=8), lambda built: built.model.vision_tower.encoder.layers),
    ],
    ids=["decoder", "tower"],
)
def test_layers_that_are_given_no_states_first_are_told(
    pruner: Any, layers: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States in a tuple, say."""
    built = model()
    inputs = request(built, [1]).inputs
    with pruner(built):
        generate(built, inputs)
    cls = type(layers(built)[0])
    own, called = cls.forward, cls.__call__

    @wraps(own)
    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        (states,) = hidden_states
        return own(self, states, *args, **kwargs)

    def call(self: Any, states: Any, *args: Any, **kwargs: Any) -> Any:
        return called(self, (states,), *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    monkeypatch.setattr(cls, "__call__", call)
    generate(built, inputs)
    said = f"^{cls.__name__} cannot be .*: it is not called with states first; the model is as it"
    with pruner(built), pytest.raises(ContractError, match=said):
        generate(built, inputs)


def test_a_layer_that_is_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose attention was to rank the tokens that the next one lacks."""
    built = model()
    inputs = request(built, [1]).inputs
    left = built.get_decoder().layers[1]
    own = type(left).__call__

    def call(self: Any, states: Any, *args: Any, **kwargs: Any) -> Any:
        return states if self is left else own(self, states, *args, **kwargs)

    monkeypatch.setattr(type(left), "__call__", call)
    said = (
        "^LlamaDecoderLayer cannot be .*: decoder layer 1 did not run before layer 2; the model is"
    )
    with FastV(keep=4, layer=2)(built), pytest.raises(ContractError, match=said):
        generate(built, inputs)
