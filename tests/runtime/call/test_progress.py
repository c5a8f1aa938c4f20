"""A cache that is changed between the steps of an answer."""

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
