"""A model that pruners are attached to: its methods shadowed on the instance, and given back.

One set of shadows serves any number of attachments to the same model. A call is one of

* the attachment whose call is under way, where it is the host's own within that call;
* the last of those made in the same context (thread, or task), which a `with` block is for;
* the last that `attach` made anywhere, for that is meant for every call of the model;
* the block of another context, as of a thread that one has started, if there is but one.

A shadow is a method like any other, so it knows on which object it is called: a copy of the model
that carries it along runs as what it is, a model of its own. What others put on the model later
stays when the last attachment goes, and what they call of ours then only passes on.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.generation import CRITERIA, PROCESSORS
from vlmprune.hosts.release import signature_of
from vlmprune.hosts.requests import FORWARD, GENERATE, base_of
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.scope import active, add_own, drop_own, had_own, own_attachments

# Weakly both ways: what stands on a model must not keep it alive.
_hosts: WeakKeyDictionary[nn.Module, weakref.ref[Shadows]] = WeakKeyDictionary()
_lock = threading.RLock()
_ABSENT = object()
# Where a shadow's function keeps what it belongs to.
_MARK = "vlmprune_shadow"
# What an instance is asked for its state by when it is copied or pickled, and for a replica.
_STATE, _REPLICA = "__getstate__", "_replicate_for_data_parallel"


@dataclass(frozen=True)
class Functions:
    """What stands in for a host's methods; each is given the acting attachment and the shadow.

    Attributes:
        generate: for `generate`: (attachment, shadow, *args, **kwargs).
        forward: for `forward` of the model, and of the one below its head, likewise.
        features: for those that encode, likewise.
        rules: for those by which `generate` makes what changes scores and what stops, likewise.
    """

    generate: Callable[..., Any]
    forward: Callable[..., Any]
    features: Callable[..., Any]
    rules: Callable[..., Any]


@dataclass(eq=False)
class Shadow:
    """One method of a host, shadowed.

    Attributes:
        name: of the method.
        place: the module on which it stands.
        inner: whether that is the one below the language-model head.
        original: the method as it was.
        before: what the instance itself had under that name.
        function: what it has instead, as a method.
        stripped: the same on the class's own method. Whoever unwraps what stands on an instance,
            as `accelerator.unwrap_model` does, comes to it, and means what others put below ours.
    """

    name: str
    place: nn.Module
    inner: bool
    original: Callable[..., Any]
    before: Any = _ABSENT
    function: Any = None
    stripped: Shadow | None = None

    def owns(self, found: Any) -> bool:
        """Whether something on an instance is this method, unwrapped or not."""
        if not isinstance(found, types.MethodType) or found.__self__ is not self.place:
            return False
        return found.__func__ is self.function or (
            self.stripped is not None and self.stripped.owns(found)
        )

    def of(self, other: nn.Module) -> Callable[..., Any]:
        """The method as a copy of the model has it."""
        known: dict[int, Any] = {id(self.place): other}
        found: Callable[..., Any] = copy.deepcopy(self.original, known)
        return found

    def give_back(self) -> None:
        """Put back what the instance had, unless somebody has put something over ours since."""
        if not self.owns(vars(self.place).get(self.name)):
            return
        if self.before is _ABSENT:
            del vars(self.place)[self.name]
        else:
            vars(self.place)[self.name] = self.before


class Shadows:
    """Those on one model, and the attachments that they serve."""

    def __init__(self, model: nn.Module, functions: Functions) -> None:
        self.model, self.functions = model, functions
        self.attachments: list[Attachment] = []
        self.shadows: list[Shadow] = []
        # Calls under way, in any thread; the shadows stay until the last is through.
        self.calls = 0

    def add(self, attachment: Attachment) -> None:
        """Let an attachment act."""
        base = base_of(self.model)
        for name in (GENERATE, FORWARD, PROCESSORS, CRITERIA):
            self._shadow(name, self.model)
        if not attachment.family.counted:
            for name in (medium.method for medium in attachment.family.media):
                self._shadow(name, base)
        if base is not self.model:
            self._shadow(FORWARD, base)
        attachment.originals = {
            one.name: one.original for one in self.shadows if not one.inner or one.name != FORWARD
        }
        # Of this model alone, for it must keep no other alive.
        attachment.among = tuple(own_attachments(self.model))
        add_own(attachment)
        self.attachments.append(attachment)

    def settle(self) -> bool:
        """Give the model back if nobody needs the shadows any more; True if nobody does."""
        if self.attachments or self.calls:
            return False
        for shadow in reversed(self.shadows):
            shadow.give_back()
        for place in {one.place for one in self.shadows}:
            for name, made in ((_STATE, _clean), (_REPLICA, _replica)):
                found = vars(place).get(name)
                if isinstance(found, types.MethodType) and found.__func__ is made:
                    del vars(place)[name]
        self.shadows.clear()
        return True

    def acting(self) -> Attachment | None:
        """The attachment whose call one is that is made now; None for nobody's.

        Raises:
            VlmpruneError: several contexts have one of their own, and this one has none.
        """
        state = active.get()
        if state is not None and state.attachment.model is self.model:
            return state.attachment
        # As they are now: other threads may come and go meanwhile.
        there = tuple(self.attachments)
        own = [one for one in own_attachments(self.model) if one in there]
        if any(one.block for one in own):
            return own[-1]
        general = [one for one in there if not one.block]
        if general:
            return general[-1]
        # A context that has had some of its own on this model knows when it wants none.
        if had_own(self.model) or not there:
            return None
        last = there[-1]
        if all(one is last or one in last.among for one in there):
            return last
        raise VlmpruneError(
            f"{len(there)} `with` blocks of other threads are open on this "
            f"{type(self.model).__name__}, and this thread has none, so it is not known which is "
            "meant; open a block in this thread too, or run its work by "
            "contextvars.copy_context().run."
        )

    def _shadow(self, name: str, place: nn.Module) -> None:
        """Shadow one method, unless ours is what would be called."""
        while (old := _shadow_of(vars(place).get(name))) is not None:
            if old in self.shadows:
                return
            # Of an earlier attachment, left by somebody who had wrapped it.
            old.give_back()
        inner, before = place is not self.model, vars(place).get(name, _ABSENT)
        shadow = Shadow(name, place, inner, getattr(place, name), before)
        own = types.MethodType(getattr(type(place), name), place)
        shadow.stripped = Shadow(name, place, inner, own)
        for one in (shadow, shadow.stripped):
            one.function = self._function(one)
            vars(one.function)[_MARK] = shadow
        shadow.function.__wrapped__ = shadow.stripped.function
        vars(place)[name] = types.MethodType(shadow.function, place)
        self.shadows.append(shadow)
        for hook, made in ((_STATE, _clean), (_REPLICA, _replica)):
            vars(place).setdefault(hook, types.MethodType(made, place))

    def _function(self, shadow: Shadow) -> Callable[..., Any]:
        chosen = {
            GENERATE: self.functions.generate,
            FORWARD: self.functions.forward,
            PROCESSORS: self.functions.rules,
            CRITERIA: self.functions.rules,
        }.get(shadow.name, self.functions.features)

        def method(self_: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            if self_ is not shadow.place:
                return shadow.of(self_)(*args, **kwargs)
            with self._calling():
                attachment, state = self.acting(), active.get()
                if attachment is None:
                    return shadow.original(*args, **kwargs)
                # A call of another model may be under way, within which this is one of its own.
                own = state if state is not None and state.attachment is attachment else None
                if own is not None and own.passes(shadow):
                    with own.running(shadow):
                        return shadow.original(*args, **kwargs)
                return chosen(attachment, shadow, *args, **kwargs)

        functools.update_wrapper(method, shadow.original, updated=())
        # Others would take ours off together with their own.
        del method.__wrapped__  # type: ignore[attr-defined]
        # Transformers inspects the signature.
        signature = signature_of(shadow.original)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        takes = [own, *signature.parameters.values()]
        vars(method)["__signature__"] = signature.replace(parameters=takes)
        return method

    @contextmanager
    def _calling(self) -> Iterator[None]:
        with _lock:
            self.calls += 1
        try:
            yield
        finally:
            with _lock:
                self.calls -= 1
                _forget(self)


def join(attachment: Attachment, functions: Functions) -> None:
    """Let an attachment act in its model's calls."""
    with _lock:
        host = _host_of(attachment.model) or Shadows(attachment.model, functions)
        try:
            host.add(attachment)
        except BaseException:
            _forget(host)
            raise
        # The shadows keep it alive, and the model them.
        _hosts[attachment.model] = weakref.ref(host)


def leave(attachment: Attachment) -> None:
    """Take an attachment off its model; a call that is under way goes on with it."""
    with _lock:
        drop_own(attachment)
        host = _host_of(attachment.model)
        if host is not None and attachment in host.attachments:
            host.attachments.remove(attachment)
            _forget(host)


def _forget(host: Shadows) -> None:
    # What others hold of earlier shadows may still be called.
    if host.settle() and _host_of(host.model) is host:
        del _hosts[host.model]


def _host_of(model: nn.Module) -> Shadows | None:
    known = _hosts.get(model)
    return None if known is None else known()


def _shadow_of(found: Any) -> Shadow | None:
    """The shadow that something on an instance is, if it is ours."""
    if not isinstance(found, types.MethodType) or not hasattr(found.__func__, _MARK):
        return None
    # Who wraps a function takes its attributes along.
    shadow: Shadow = getattr(found.__func__, _MARK)
    return shadow if shadow.owns(found) else None


def _clean(place: nn.Module) -> dict[str, Any]:
    """What a copy or a pickle of an instance is made of: a model that nobody is attached to."""
    return _without_shadows(vars(place))


def _without_shadows(state: Mapping[str, Any]) -> dict[str, Any]:
    clean = {name: one for name, one in state.items() if name not in (_STATE, _REPLICA)}
    for name in state:
        while (shadow := _shadow_of(clean.get(name))) is not None and shadow.name == name:
            clean[name] = shadow.before
    return {name: one for name, one in clean.items() if one is not _ABSENT}


def _replica(place: nn.Module) -> Any:
    """A replica of an instance (`torch.nn.DataParallel`), which nobody is attached to."""
    warnings.warn(
        f"a replica of this {type(place).__name__} keeps every visual token, for a pruner acts on "
        "the model that it is attached to; run one process a device instead of DataParallel.",
        stacklevel=2,
    )
    replica: Any = type(place)._replicate_for_data_parallel(place)
    clean = _without_shadows(vars(replica))
    vars(replica).clear()
    vars(replica).update(clean)
    return replica
