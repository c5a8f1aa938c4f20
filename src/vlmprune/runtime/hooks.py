"""Hooks on modules that are there for a block, and act in the call alone that made them.

Modules are shared by threads, by calls within calls, and what hangs on them goes along with a copy:
each hook asks first whether its own call runs, on the module that it was put on. May import
`runtime.scope`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlmprune.runtime.scope import OwnCall

# (module, arguments by place, arguments by name) → None, or both instead.
Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
# (module, arguments by place, arguments by name, output) → None, or the output instead.
After = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]


class Hooks(ExitStack):
    """Hooks and a stack of other contexts; leaving it takes all hooks away, then the contexts."""

    def __init__(self, every: bool = False) -> None:
        """Prepare a stack.

        Args:
            every: whether hooks act in every call, of any thread, as what measures a call needs.
        """
        super().__init__()
        self.every = every
        # Apart from the stack, as layers are hooked at each step and its entries cost more.
        self._hooks: list[RemovableHandle] = []

    def __exit__(self, *details: Any) -> bool | None:
        while self._hooks:
            self._hooks.pop().remove()
        return super().__exit__(*details)

    def before(self, module: nn.Module, act: Before) -> None:
        """Call `act` before each forward of a module."""

        call = OwnCall()

        # One that another thread takes away may be called once more by this one, without keywords;
        # in its own thread that cannot happen.
        def hook(own: nn.Module, *given: Any) -> Any:
            return act(own, *given) if self._runs(call, own, module) else None

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
        call = OwnCall()

        def hook(own: nn.Module, *given: Any) -> Any:
            return act(own, *given) if self._runs(call, own, module) else None

        self._hooks.append(
            module.register_forward_hook(hook, prepend=first, with_kwargs=True, always_call=always)
        )

    def _runs(self, call: OwnCall, own: nn.Module, module: nn.Module) -> bool:
        return own is module and (self.every or call.runs)
