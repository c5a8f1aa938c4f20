"""Hooks are there for a block, in their own thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from vlmprune.runtime.hooks import Hooks


def test_hooks_act_in_their_thread_and_are_gone_behind_the_block() -> None:
    layer = nn.Linear(2, 2)
    states, seen = torch.ones(1, 2), list[str]()

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        seen.append("before")
        return (args[0] * 0,), kwargs

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        seen.append("after")
        return output + 1

    plain = layer(states)
    with pytest.raises(RuntimeError, match="inside"), Hooks() as hooks:
        hooks.before(layer, before)
        hooks.after(layer, after)
        thread = threading.Thread(target=lambda: layer(states))
        thread.start()
        thread.join(30)
        assert not seen
        assert torch.equal(layer(states), layer.bias[None] + 1)
        raise RuntimeError("inside")
    assert seen == ["before", "after"] and torch.equal(layer(states), plain)
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_a_hook_that_is_always_called_is_told_of_a_failure() -> None:
    layer, outputs = nn.Linear(2, 2), list[Any]()
    with Hooks() as hooks:
        hooks.after(layer, lambda module, args, kwargs, output: outputs.append(output), always=True)
        with pytest.raises(RuntimeError):
            layer(torch.ones(1, 3))
    assert outputs == [None]


def test_the_first_hook_comes_before_those_that_are_there() -> None:
    layer, order = nn.Identity(), list[str]()
    layer.register_forward_hook(lambda *_: order.append("host"))
    with Hooks() as hooks:
        hooks.after(layer, lambda *_: order.append("first"), first=True)
        hooks.after(layer, lambda *_: order.append("last"))
        layer(torch.ones(1))
    assert order == ["first", "host", "last"]
