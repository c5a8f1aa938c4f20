"""Hosts that change between the steps of an answer, or between two calls."""

from __future__ import annotations

import re
from functools import wraps
from typing import Any

import pytest

from answers import generate
from stock import CACHE
from tiny import model, request
from vlmprune import PLPHP, FastV, VisPruner
from vlmprune.hosts.contract import ContractError


@pytest.mark.parametrize("pruner", [VisPruner(keep=4), PLPHP(), FastV(keep=4)], ids=repr)
def test_a_cache_that_lost_a_column_between_steps_is_told(
    pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = model()
    inputs = request(built, [1]).inputs
    cls, calls = type(built), list[int]()
    own = cls.prepare_inputs_for_generation

    @wraps(own)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(self, *args, **kwargs)
        calls.append(1)
        # Before the second step.
        if len(calls) == 3:
            made[CACHE].crop(-1)
        return made

    monkeypatch.setattr(cls, "prepare_inputs_for_generation", prepare)
    with pruner(built):
        said = r"a step begins at (\d+) columns of a cache that was left at (\d+); the model is as"
        with pytest.raises(ContractError, match=said) as told:
            generate(built, inputs, max_new_tokens=5)
        (found,) = re.findall(said, str(told.value))
        assert int(found[0]) == int(found[1]) - 1
        # Control: one that is left alone.
        generate(built, inputs, max_new_tokens=5)


def test_features_that_a_later_call_makes_otherwise_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they stand was proved by the first call, and is not looked at again."""
    built = model()
    inputs = request(built, [1]).inputs
    cls, past_us = type(built.model), False
    plain = cls.forward

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            if past_us:
                patch.delitem(vars(self), "get_image_features")
            return plain(self, *args, **kwargs)

    def uncounted(self: Any, input_ids: Any, inputs_embeds: Any, **_: Any) -> Any:
        return (input_ids == self.config.image_token_id)[..., None]

    monkeypatch.setattr(cls, "forward", forward)
    monkeypatch.setattr(cls, "get_placeholder_mask", uncounted)
    said = "it makes its features otherwise than by get_image_features; the model is as it was"
    with VisPruner(keep=4)(built):
        built(**inputs)
        past_us = True
        with pytest.raises(ContractError, match=said):
            built(**inputs)
