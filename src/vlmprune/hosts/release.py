"""In what the releases of Transformers differ.

Releases rename arguments without notice; whoever asks for a former name gets nothing and goes on
with nothing. So a name is looked up here, in the signature of what it is handed to and not by
version number, and a name that is not there is an error. By version go the bound and faults of a
release alone; `tests/hosts/test_release.py` and `test_release_calls.py` hold on every release that
they are where we say.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.parallel import class_of

# The releases on which `make test-releases` passes; pyproject.toml allows the same.
TESTED = ">=5.16,<5.25"
# The environment variable that lets an untested release be tried.
UNTESTED = "VLMPRUNE_UNTESTED"

# The releases whose `generate` keeps images where it reads a prompt in chunks; earlier ones lose
# them without a word.
_CHUNKS_HOLD_IMAGES = ">=5.23"

# What the argument that holds the KV cache has been called, newest name first. A release takes the
# names before its own with a warning; later ones it may overlook.
_CACHE = ("cache", "past_key_values")
# What models with recurrent states alone called it: from 5.24 on `generate` of all models takes it
# for a cache, while their forward overlooks it.
_STATES = "cache_params"
# What a layer, or a model, is told to make its activations once more in the backward pass.
_RECOMPUTES = "gradient_checkpointing"


def version() -> str:
    """The release of Transformers that is installed."""
    return transformers.__version__


def check_release() -> None:
    """Refuse a release of Transformers that was not tested, unless the user wants to try it.

    Raises:
        VlmpruneError: it is none of those, and `VLMPRUNE_UNTESTED=1` is not set.
    """
    here = Version(transformers.__version__)
    if SpecifierSet(TESTED).contains(here, prereleases=False) or os.environ.get(UNTESTED) == "1":
        return
    raise VlmpruneError(
        f"this vlmprune was tested on transformers {TESTED}, not on {here}, where it might prune "
        f"wrongly without a word; run pip install 'transformers{TESTED}', or set {UNTESTED}=1 to "
        "try it all the same."
    )


def chunks_hold_images() -> bool:
    """Whether `generate` with `prefill_chunk_size` sees the prompt's images in this release."""
    here = Version(transformers.__version__)
    return SpecifierSet(_CHUNKS_HOLD_IMAGES).contains(here, prereleases=True)


def check_class(model: Any, fails: Mapping[str, str]) -> None:
    """Refuse a class of Transformers that a fault of this release keeps from being pruned.

    Args:
        model: the host. A subclass may have mended the fault, and is let through.
        fails: the releases that have the fault, and what it is, as a family's record has them.

    Raises:
        VlmpruneError: this is such a release.
    """
    cls, here = class_of(model), transformers.__version__
    stock = cls is getattr(transformers, cls.__name__, None)
    for releases, why in fails.items():
        if stock and Version(here) in SpecifierSet(releases):
            raise VlmpruneError(
                f"{cls.__name__} cannot be pruned in transformers {here}, where {why}; install a "
                f"release outside {releases}."
            )


def reason_here(faults: Mapping[str, str]) -> str:
    """Of faults by the releases that have them, the one of the release that is installed; or ""."""
    here = Version(transformers.__version__)
    found = (why for at, why in faults.items() if SpecifierSet(at).contains(here, prereleases=True))
    return next(found, "")


# By function, and whether it is bound: to find one of `generate` takes longer than to bind to it.
_signatures: WeakKeyDictionary[Any, dict[bool, inspect.Signature]] = WeakKeyDictionary()


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a bound method, or of what stands in for one.

    Who wraps a bound method of ours by `functools.wraps` takes along the signature of its function,
    whose first argument the wrapper does not take.
    """
    bound = isinstance(function, MethodType)
    plain = function.__func__ if isinstance(function, MethodType) else function
    try:
        known = _signatures.setdefault(plain, {})
    except TypeError:
        # Nothing that can be remembered, such as an object with slots.
        return _signature_of(function)
    if bound not in known:
        known[bound] = _signature_of(function)
    return known[bound]


def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    takes = list(signature.parameters.values())
    if takes and takes[0].name == "self" and takes[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        return signature.replace(parameters=takes[1:])
    return signature


def by_name(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A call's arguments, all of them by name.

    Args:
        function: what is called; bound, if a method. Releases differ in what they call the rest of
            the keyword arguments, so that is found by its kind.
        args: by place.
        kwargs: by name.

    Raises:
        TypeError: the function does not take them.
    """
    signature = signature_of(function)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= value if rest else {name: value}
    return named


def cache_name(cls: type) -> str:
    """What the forward of a model, or of a decoder layer, calls the KV cache.

    Raises:
        VlmpruneError: it takes none by any name that was ever used.
    """
    return _cache_name(cls)


# Decoder layers are asked at each step.
@cache
def _cache_name(cls: type) -> str:
    takes = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    for name in _CACHE:
        if name in takes:
            return name
    raise VlmpruneError(
        f"{cls.__name__} of transformers {transformers.__version__} takes a KV cache neither as "
        f"{' nor as '.join(_CACHE)}, so it cannot be told what happens to it; install "
        f"transformers{TESTED}, or tell vlmprune's developers."
    )


def cache_given(cls: type, arguments: Mapping[str, Any]) -> Any:
    """The KV cache among a call's keyword arguments; None if it has none.

    Args:
        cls: of the model or the decoder layer that is called.
        arguments: by name. A former name counts as well, since the host takes it, too.

    Raises:
        VlmpruneError: the cache comes under a name of later releases or of other models, which the
            host might ignore.
    """
    name = cache_name(cls)
    if name in arguments:
        return arguments[name]
    found = next((one for one in (*_CACHE, _STATES) if arguments.get(one) is not None), None)
    if found is None:
        return None
    if found == _STATES or _CACHE.index(found) < _CACHE.index(name):
        raise VlmpruneError(
            f"{found} is called {name} in transformers {transformers.__version__}; pass the cache "
            "under that name."
        )
    return arguments[found]


def with_cache(cls: type, arguments: Mapping[str, Any], held: Any) -> dict[str, Any]:
    """A call's keyword arguments with another KV cache, or None, instead of theirs."""
    others = {key: value for key, value in arguments.items() if key not in _CACHE}
    return others | {cache_name(cls): held}


def cache_returned(output: Any) -> Any:
    """The KV cache in what a model or `generate` returned, tuples included; None if none is."""
    if isinstance(output, tuple):
        return next((one for one in output if isinstance(one, Cache)), None)
    # Asked for by a former name, an output warns.
    names = {field.name for field in fields(output)} if is_dataclass(output) else set()
    return next((getattr(output, name) for name in _CACHE if name in names), None)


def recomputes(modules: Iterable[nn.Module]) -> bool:
    """Whether a forward now would recompute what modules make, and go without a cache.

    Args:
        modules: a language model and its layers. What a vision tower recomputes is no matter.
    """
    told = any(one.training and getattr(one, _RECOMPUTES, False) for one in modules)
    return told and (torch.is_grad_enabled() or _recomputes_without_gradients())


@cache
def _recomputes_without_gradients() -> bool:
    """Whether layers that were told to recompute do so where no gradient is wanted; tried once."""
    with torch.no_grad():
        return bool(_recomputed()[0])


@cache
def recomputes_hooks() -> bool:
    """Whether what is recomputed holds the hooks of a layer, which may be gone then; tried once.

    Releases before 5.23 recompute a layer's whole call, later ones its forward alone.
    """
    with torch.enable_grad():
        calls, hooked = _recomputed()
    return calls > 0 and not hooked


def _recomputed() -> tuple[int, bool]:
    """How often a layer that was told to recompute does, and whether its hooks ran before that."""
    seen = list[str]()

    class Layer(GradientCheckpointingLayer):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states

    def recorded(forward: Callable[..., Any], *args: Any) -> Any:
        seen.append("recomputed")
        return forward(*args)

    layer: Any = Layer()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = recorded
    layer.register_forward_pre_hook(lambda *_: seen.append("hook"))
    layer.train()(torch.zeros(1))
    return seen.count("recomputed"), seen[:1] == ["hook"]


def is_quantized(model: nn.Module) -> bool:
    """Whether a model, or a module of it, works on rounded activations."""
    places = ("quantized", "bitsandbytes", "torchao")
    return bool(getattr(model, "is_quantized", False)) or any(
        any(place in type(one).__module__ for place in places) for one in model.modules()
    )


def miscounts(error: ValueError) -> bool:
    """Whether a host says that it has not as many features as placeholders."""
    return "do not match" in str(error)


@contextmanager
def computed_once(layer: Any) -> Iterator[None]:
    """With a layer that does not recompute inside the block, whatever it was told."""
    again = getattr(layer, _RECOMPUTES, False)
    if again:
        setattr(layer, _RECOMPUTES, False)
    try:
        yield
    finally:
        if again:
            setattr(layer, _RECOMPUTES, True)
