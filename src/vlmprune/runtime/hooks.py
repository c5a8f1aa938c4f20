"""Hooks on modules that are there for a block, and act in the thread alone that made them.

Modules are shared by threads, and so are the hooks on them: each hook asks first whether its own
thread runs. May import `runtime.scope`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlmprune.runtime.scope import OwnThread

# (module, arguments by place, arguments by name) → None, or both instead.
Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
# (module, arguments by place, arguments by name, output) → None, or the output instead.
After = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]


class Hooks(ExitStack):
    """Hooks and a stack of other contexts; leaving it takes all hooks away, then the contexts."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = OwnThread()
        # Apart from the stack, as layers are hooked at each step and its entries cost more.
        self._hooks: list[RemovableHandle] = []

    def __exit__(self, *details: Any) -> bool | None:
        while self._hooks:
            self._hooks.pop().remove()
        return super().__exit__(*details)

    def before(self, module: nn.Module, act: Before) -> None:
        """Call `act` before each forward of a module."""

        # One that another thread takes away may be called once more by this one, without keywords;
        # in its own thread that cannot happen.
        def hook(*given: Any) -> Any:
            return act(*given) if self.thread.runs else None

        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(
        self, module: nn.Module, act: After, first: bool = False, always: bool = False
    ) -> None:
        """Call `act` behind each forward of a module.

        Args:
            module: the module.
            act: what is done.
            first: before the hooks that are there, as those of the host's that record states.
            always: with None for an output too, where the forward fails.
        """

        def hook(*given: Any) -> Any:
            return act(*given) if self.thread.runs else None

        self._hooks.append(
            module.register_forward_hook(hook, prepend=first, with_kwargs=True, always_call=always)
        )
