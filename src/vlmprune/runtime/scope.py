"""Which pruned call is under way in this thread, and the report that it made last.

Modules are shared by threads, and so are the hooks on them. What hooks a module for one call keeps
the thread that it was made in (`OwnThread`) and does nothing in any other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vlmprune.report import Report


@dataclass
class Scope:
    """A call under way; `runtime.call.state.Active` adds what a pruned one knows.

    Attributes:
        attachment: the attachment that it belongs to.
    """

    attachment: Any


active: ContextVar[Scope | None] = ContextVar("vlmprune_active", default=None)
# The report that this thread made last.
made: ContextVar[Report | None] = ContextVar("vlmprune_made", default=None)


@dataclass(frozen=True)
class OwnThread:
    """The thread that made it.

    Attributes:
        number: Python's own for it.
    """

    number: int = field(default_factory=threading.get_ident)

    @property
    def runs(self) -> bool:
        """Whether it is the thread that asks."""
        return threading.get_ident() == self.number


@contextmanager
def under(scope: Scope | None) -> Iterator[None]:
    """Make a call the one under way inside the block; None for no pruned call."""
    token = active.set(scope)
    try:
        yield
    finally:
        active.reset(token)


def outside() -> AbstractContextManager[None]:
    """A block outside of any pruned call.

    A method of the host's may call another, whose shadow must not give what an outer call has
    pruned; and a call within a call is one of its own.
    """
    return under(None)
