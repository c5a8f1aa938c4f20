"""How a host is changed: an object gets a subclass of its own class, a file another registry.

A change keeps what the host computes. What it hands on under a new name is translated back where
the host's own code takes it, so that whoever stands between (a hook, a function registered for
attention) finds the new name, as in a release that renamed it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from pytest import MonkeyPatch
from transformers.modeling_utils import AttentionInterface

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# A call's arguments, by place and by name → others.
Translate = Callable[[tuple[Any, ...], dict[str, Any]], Arguments]


def recast(one: Any, **members: Any) -> None:
    """Give an object a subclass of its class, of the same name and file, with other members."""
    cls = type(one)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    one.__class__ = type(cls.__name__, (cls,), {**names, **members})


def signature(function: Callable[..., Any], names: Mapping[str, str | None]) -> inspect.Signature:
    """A function's signature with parameters under other names, or without them (None)."""
    found = inspect.signature(function)
    kept = [p for n, p in found.parameters.items() if names.get(n, n) is not None]
    renamed = [p.replace(name=str(names.get(p.name, p.name))) for p in kept]
    return found.replace(parameters=renamed)


def renaming(names: Mapping[str, str]) -> tuple[Translate, Translate]:
    """Arguments by name under other names, and back; who takes them overlooks the former names."""
    before = {new: old for old, new in names.items()}

    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return args, {names.get(name, name): value for name, value in kwargs.items()}

    def back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        known = {name: value for name, value in kwargs.items() if name not in names}
        return args, {before.get(name, name): value for name, value in known.items()}

    return forth, back


def called(
    module: Any, forth: Translate, back: Translate, names: Mapping[str, str | None] | None = None
) -> None:
    """Have a module be called with other arguments, which hooks see and its forward translates.

    Args:
        module: it.
        forth: from what its callers give to what it is called with.
        back: from that to what its plain forward takes.
        names: how parameters of its forward are called; None for one that is gone.
    """
    cls = type(module)
    plain = cls.forward

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = forth(args, kwargs)
        return cls.__call__(self, *args, **kwargs)

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = back(args, kwargs)
        return plain(self, *args, **kwargs)

    if names is not None:
        vars(forward)["__signature__"] = signature(plain, names)
    recast(module, __call__=call, forward=forward)


def rename(module: Any, **names: str) -> None:
    """Have a module be called with arguments under other names."""
    called(module, *renaming(names), names=names)


class Registry(AttentionInterface):
    """A modeling file's own registry of attention functions, whose calls have another form."""

    def __init__(self, real: Any, forth: Translate, taking: Callable[[Any], Any]) -> None:
        super().__init__()
        self.forth = forth
        for name in ("sdpa", "eager", "flash_attention_2"):
            if name in real:
                self[name] = taking(real[name])

    def get_interface(self, attn_implementation: str, default: Callable[..., Any]) -> Any:
        """What a modeling file calls, in the new form."""
        held = super().get_interface(attn_implementation, default)

        def attend(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.forth(args, kwargs)
            return held(*args, **kwargs)

        return attend


def attention_file(module: Any) -> Any:
    """The modeling file of the first attention module inside another module."""
    for one in module.modules():
        if type(one).__name__.endswith("Attention"):
            return sys.modules[type(one).__module__]
    raise AssertionError("no attention")


def attending(
    patch: MonkeyPatch,
    file: Any,
    forth: Translate,
    back: Translate,
    names: Mapping[str, str | None] | None = None,
    after: Callable[[Any], Any] = lambda result: result,
) -> None:
    """Have a modeling file call attention functions in another form.

    Args:
        patch: undone after the row.
        file: the modeling file.
        forth: from what the file's code gives to what a registered function is called with.
        back: from that to what the plain functions take.
        names: how parameters of the functions are called; None for one that is gone.
        after: from what the plain functions give to what the registered ones do.
    """

    def taking(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def function(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = back(args, kwargs)
            return after(plain(*args, **kwargs))

        if names is not None:
            vars(function)["__signature__"] = signature(plain, names)
        return function

    registry = Registry(file.ALL_ATTENTION_FUNCTIONS, forth, taking)
    patch.setattr(file, "ALL_ATTENTION_FUNCTIONS", registry)
    eager = taking(file.eager_attention_forward)
    patch.setattr(file, "eager_attention_forward", eager)


def hide(config: Any, *fields: str, shown: Mapping[Any, tuple[str, ...]] | None = None) -> None:
    """Take fields out of a config that the host keeps elsewhere.

    Args:
        config: it.
        fields: the names that it has no more.
        shown: modules whose methods, as named, still find them; it is as if these read them under
            another name.
    """
    depth = [0]

    def kept(value: Any, name: str) -> property:
        def get(self: Any) -> Any:
            if depth[0]:
                return value
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def put(self: Any, new: Any) -> None:
            """Copies that early releases make of configs set all that they find."""

        return property(get, put)

    def opened(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                return plain(self, *args, **kwargs)
            finally:
                depth[0] -= 1

        return method

    mapped = getattr(config, "attribute_map", {})
    real = [mapped.get(name, name) for name in fields]
    members: dict[str, Any] = {name: kept(getattr(config, name), name) for name in real}
    made = getattr(type(config), "__post_init__", None)
    if made is not None:
        members["__post_init__"] = opened(made)
    for name in real:
        vars(config).pop(name, None)
    recast(config, **members)
    for module, methods in (shown or {}).items():
        cls = type(module)
        recast(module, **{name: opened(getattr(cls, name)) for name in methods})


def elsewhere(owner: Any, name: str, decoy: Any, *methods: str) -> None:
    """Have a module keep a part under another attribute than its name.

    Args:
        owner: the module.
        name: where the part stood.
        decoy: what stands there from outside; None for nothing.
        methods: of the owner, which find the part.
    """
    real = owner._modules.pop(name)
    if decoy is not None:
        owner._modules[name] = decoy
    owner._modules[f"{name}_in_use"] = real
    cls = type(owner)

    def inside(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._modules.get(name)
            self._modules[name] = self._modules[f"{name}_in_use"]
            try:
                return plain(self, *args, **kwargs)
            finally:
                if before is None:
                    del self._modules[name]
                else:
                    self._modules[name] = before

        return method

    recast(owner, **{one: inside(getattr(cls, one)) for one in methods})


def unhooked(module: Any) -> None:
    """Have a module run without hooks but those that it has now, which are the host's own."""
    own = list(module._forward_hooks.values())

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        for hook in own:
            changed = hook(self, args, output)
            output = output if changed is None else changed
        return output

    recast(module, __call__=call)


@contextmanager
def standing_in(place: Any, name: str, function: Any) -> Iterator[None]:
    """Inside the block a function stands in for an object's method, and then what stood there."""
    shadow = vars(place).get(name)
    vars(place)[name] = function
    try:
        yield
    finally:
        del vars(place)[name]
        if shadow is not None:
            vars(place)[name] = shadow


def first_forward_alone(model: Any, name: str) -> None:
    """Have `generate` hand an argument to the first forward alone, as it does with pixels."""
    step = type(model).prepare_inputs_for_generation

    @wraps(step)
    def inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = step(self, *args, **kwargs)
        if not kwargs.get("is_first_iteration"):
            found.pop(name, None)
        return found

    recast(model, prepare_inputs_for_generation=inputs)
