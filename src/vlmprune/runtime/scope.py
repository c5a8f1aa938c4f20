"""Which pruned call is under way in this context, whose attachments are its own, and its reports.

Modules are shared by threads and by calls within calls, and so are the hooks on them. What hooks a
module for one call keeps the call that it was made in (`OwnCall`) and does nothing in any other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
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
        under_way: the host's methods that run for it now, as `runtime.shadows.Shadow`s.
    """

    attachment: Any
    under_way: list[Any] = field(default_factory=list, kw_only=True)

    def passes(self, shadow: Any) -> bool:
        """Whether a method is called by the host itself, within another that runs for this call.

        It then goes on as it is. One that is under way and is called once more is called by
        somebody else, and that is a call of its own.
        """
        return True

    @contextmanager
    def running(self, shadow: Any) -> Iterator[None]:
        """Note that a method of the host's runs for this call inside the block."""
        self.under_way.append(shadow)
        try:
            yield
        finally:
            self.under_way.remove(shadow)


active: ContextVar[Scope | None] = ContextVar("vlmprune_active", default=None)
# By model, the attachments that this context made and has not left; none of a model that it never
# attached anything to.
mine: ContextVar[Mapping[weakref.ref[Any], tuple[weakref.ref[Any], ...]]] = ContextVar(
    "vlmprune_mine",
    default={},  # noqa: B039
)
# The reports that this context made last, by what holds an attachment's latest.
made: ContextVar[Mapping[weakref.ref[Any], Report]] = ContextVar("vlmprune_made", default={})  # noqa: B039


def had_own(model: Any) -> bool:
    """Whether this context ever made an attachment to a model."""
    return weakref.ref(model) in mine.get()


def own_attachments(model: Any) -> list[Any]:
    """The attachments to a model that this context made and has not left, in order."""
    held = mine.get().get(weakref.ref(model), ())
    return [one for ref in held if (one := ref()) is not None]


def add_own(attachment: Any) -> None:
    """Note an attachment as this context's."""
    _set_own(attachment.model, [*own_attachments(attachment.model), attachment])


def drop_own(attachment: Any) -> None:
    """Note that an attachment was left."""
    if had_own(attachment.model):
        left = [one for one in own_attachments(attachment.model) if one is not attachment]
        _set_own(attachment.model, left)


def _set_own(model: Any, own: list[Any]) -> None:
    held = {ref: one for ref, one in mine.get().items() if ref() is not None}
    mine.set({**held, weakref.ref(model): tuple(map(weakref.ref, own))})


def reported(holder: Any) -> Report | None:
    """The report that this context made last with an attachment, by what holds its latest."""
    return made.get().get(weakref.ref(holder))


def note_report(holder: Any, report: Report) -> None:
    """Note a report as the one that this context made last with an attachment."""
    held = {ref: one for ref, one in made.get().items() if ref() is not None}
    made.set({**held, weakref.ref(holder): report})


# Stands for the block of `under` that runs in this context, each time anew; None outside of all.
_block: ContextVar[object | None] = ContextVar("vlmprune_block", default=None)


@dataclass(frozen=True)
class OwnCall:
    """The call that made it, in its thread.

    Attributes:
        number: Python's own for the thread.
        block: of `under`, in which the call runs. One that somebody makes meanwhile has another.
    """

    number: int = field(default_factory=threading.get_ident)
    block: object = field(default_factory=_block.get)

    @property
    def runs(self) -> bool:
        """Whether it is the call that asks."""
        return threading.get_ident() == self.number and _block.get() is self.block


@contextmanager
def under(scope: Scope | None) -> Iterator[None]:
    """Make a call the one under way inside the block; None for no pruned call."""
    token, block = active.set(scope), _block.set(object())
    try:
        yield
    finally:
        _block.reset(block)
        active.reset(token)


def outside() -> AbstractContextManager[None]:
    """A block outside of any pruned call.

    A method of the host's may call another, whose shadow must not give what an outer call has
    pruned; and a call within a call is one of its own.
    """
    return under(None)
