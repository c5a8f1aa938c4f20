"""What is known of `torch.compile`: its marks on models, and how it goes with our functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

# Marks on a method, on a class of modules, and on a module.
_COMPILED, _COMPILED_CLASS, _COMPILED_CALL = (
    "_torchdynamo_orig_callable",
    "OptimizedModule",
    "_compiled_call_impl",
)
# What torch imports as something is given to it for the first time.
_COMPILER = "torch._dynamo"
_FORWARD = "forward"
_left = set[str]()


def is_compiled(model: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a model, or a module of it, was given to `torch.compile`.

    Args:
        model: the host.
        forward: its forward as it was before a pruner was attached.
    """
    # Asked at each call, and nothing is compiled before that is imported.
    if _COMPILER not in sys.modules:
        return False
    if hasattr(forward, _COMPILED):
        return True
    # By hand, for `modules()` takes three times as long for hundreds of them.
    left = [model]
    while left:
        module = left.pop()
        own = vars(module)
        if (
            (_FORWARD in own and hasattr(own[_FORWARD], _COMPILED))
            or type(module).__name__ == _COMPILED_CLASS
            or own.get(_COMPILED_CALL) is not None
        ):
            return True
        left += [one for one in module._modules.values() if one is not None]
    return False


def leave_out(soon: bool = False) -> None:
    """Have the compiler run this package's functions as they are, and compile what they call.

    They look at calls, and hardly touch a tensor: traced, each condition would be one more guard of
    the host's graphs, and each number that is read one more break in them.

    Args:
        soon: whether something is about to be compiled; else nothing is done where nothing was yet.
    """
    package = __name__.partition(".")[0]
    if package in _left or (not soon and _COMPILER not in sys.modules):
        return
    try:
        from torch._dynamo.trace_rules import add
    except ImportError:
        # Of no public name: without it the host's graphs are in more pieces.
        return
    _left.add(package)
    add(package)
