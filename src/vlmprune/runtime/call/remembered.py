"""What a cache was filled with under a pruner, kept on the cache, which then watches who goes on.

A cache that holds fewer columns than the prompt looks like any other, and a model without a pruner
would read the prompt's length, mask and positions off it wrongly. So a cache that a pruned call
filled becomes one of a class of ours on top of its own. That refuses new columns which do not come
from a pruned call, unless nothing was dropped; it keeps the record in step where samples are
selected or repeated; and it is the plain class again once it is empty. Copies and pickles are
watched, too, and to read it is as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as once
from functools import wraps
from typing import Any

import torch

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches
from vlmprune.runtime.cache.alone import check_alone
from vlmprune.runtime.call.shorten import Prefix
from vlmprune.runtime.call.state import Active


class Going:
    """A pruned call that goes on with a cache; the copies that it makes of the cache share it.

    Attributes:
        open: whether it is under way.
    """

    def __init__(self, under_way: bool = False) -> None:
        self.open = under_way

    def __deepcopy__(self, _: Any) -> Going:
        return self

    def __reduce__(self) -> Any:
        return Going, ()


class Watched:
    """What the classes of caches share that watch who goes on with them.

    It stands on the cache, so that a copy carries it too.

    Attributes:
        vlmprune_prefix: what it was filled with.
        vlmprune_going: the call that goes on with it. Compiled models can read it.
    """

    vlmprune_prefix: Prefix
    vlmprune_going: Going


def prefix_of(cache: Any) -> Prefix | None:
    """What a cache was filled with under a pruner, if it was."""
    return cache.vlmprune_prefix if isinstance(cache, Watched) else None


def remember(cache: Any, prefix: Prefix, refusal: str = "") -> None:
    """Put on a cache what it was filled with, or why it cannot be continued."""
    if not caches.is_cache(cache):
        return
    if not isinstance(cache, Watched):
        cls: Any = type(cache)
        cache.__class__ = _watched(cls)
        cache.vlmprune_going = Going()
    cache.vlmprune_prefix = replace(prefix, refusal=refusal or prefix.refusal)


def forget(cache: Any) -> None:
    """Make a cache what it was before it was filled."""
    if isinstance(cache, Watched):
        del cache.vlmprune_prefix, cache.vlmprune_going
        cache.__class__ = _plain(type(cache))


@contextmanager
def filling(state: Active, given: Any, prefix: Prefix, refusal: str = "") -> Iterator[None]:
    """A block that fills a cache; one that an error leaves half full is not gone on with.

    Args:
        state: of the call.
        given: the cache that it was given; None without one.
        prefix: what the cache holds afterwards.
        refusal: why the cache cannot be continued even when all is well.
    """
    before = caches.length_of(given)
    if before == 0:
        forget(given)
    going = Going(True)
    if isinstance(given, Watched):
        given.vlmprune_going = going
    try:
        yield
    except BaseException:
        progress = state.progress
        for holder in {id(one): one for one in (given, progress.cache)}.values():
            length = caches.length_of(holder)
            if length == (before if holder is given else 0):
                continue
            whole = length == progress.length >= progress.columns
            broken = "" if whole else "the call that filled it was broken off"
            remember(holder, prefix.repeat(state.times), refusal or broken)
        raise
    finally:
        going.open = False


def _check_grown(cache: Any) -> None:
    """Refuse new columns from a model that does not know what is missing.

    Raises:
        VlmpruneError: they come from no pruned call, and columns of the prompt were dropped.
    """
    if cache.vlmprune_going.open:
        return
    if caches.length_of(cache) == 0:
        # It was reset, or cropped to nothing, and serves as any other.
        forget(cache)
        return
    if not cache.vlmprune_prefix.whole:
        raise VlmpruneError(
            "this cache was filled with fewer visual tokens than its prompt has, and the model "
            "alone would misread it; continue it with the pruner attached, or start with a fresh "
            "cache."
        )
    # Before the first layer has added to it, so that the cache stays as it is.
    check_alone(cache)


def _cropped(cache: Any) -> None:
    """Note that columns were taken off the end."""
    prefix, length = cache.vlmprune_prefix, caches.length_of(cache)
    if length == 0:
        forget(cache)
    elif length < prefix.prompt.ids.shape[1]:
        # It may grow again, with columns that nobody tells us.
        why = "it was cropped into its pruned prompt, whose columns cannot be told apart any more"
        cache.vlmprune_prefix = replace(prefix, refusal=why)


def _emptied(cache: Any) -> None:
    """Let a cache that was reset be empty, which early releases fill with zeros at its length."""
    length = caches.length_of(cache)
    if length:
        getattr(cache, caches.CROP)(-length)
    forget(cache)


def _selected(cache: Any, rows: Any) -> None:
    """Note that samples were taken in another order, or several times, or left out."""
    # A call that is under way notes at its end what the cache holds then.
    if not cache.vlmprune_going.open:
        rows = torch.as_tensor(rows, device=cache.vlmprune_prefix.full_ids.device)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        cache.vlmprune_prefix = cache.vlmprune_prefix.select(rows)


def _repeated(cache: Any, repeats: int) -> None:
    """Note that each sample was repeated."""
    _selected(cache, torch.arange(len(cache.vlmprune_prefix.full_ids)).repeat_interleave(repeats))


def _plain(cls: type) -> type:
    """The class of a cache before it was watched."""
    return cls.__mro__[2]


@once
def _watched(cls: type) -> type:
    """A class of caches that watches who goes on, on top of another."""

    def before(name: str) -> Callable[..., Any]:
        original = getattr(cls, name)

        @wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            _check_grown(self)
            return original(self, *args, **kwargs)

        return method

    def after(name: str, note: Callable[..., None], told: bool) -> Callable[..., Any]:
        original = getattr(cls, name)

        @wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            note(self, *(args or kwargs.values())) if told else note(self)
            return result

        return method

    members: dict[str, Any] = {name: before(name) for name in caches.growing(cls)}
    notes: dict[str, tuple[Callable[..., None], bool]] = {
        caches.CROP: (_cropped, False),
        caches.RESET: (_emptied, False),
        caches.REPEAT: (_repeated, True),
        **dict.fromkeys(caches.SELECT, (_selected, True)),
    }
    there = [name for name in notes if name in dir(cls)]
    members |= {name: after(name, *notes[name]) for name in there}
    # By its name nothing would find the class again.
    members["__reduce_ex__"] = lambda self, _: (_blank, (cls,), vars(self))
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Watched, cls), members)


def _blank(cls: type) -> Any:
    """An empty cache of a watched class, for a copy or a pickle to fill."""
    watched: Any = _watched(cls)
    return watched.__new__(watched)
