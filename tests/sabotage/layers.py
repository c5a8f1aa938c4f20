"""Rows about decoder layers: how they are called, what they return, and where they stand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import nn

from sabotage.hosts import Row
from sabotage.tools import Arguments, called, elsewhere, recast, rename, signature, unhooked
from stock import CACHE
from vlmprune import FastV

Change = Callable[[Any, MonkeyPatch], None]
COMPACT = {"FastV": FastV(keep=0.4, layer=1, positions="compact")}


def each(change: Callable[[Any], None]) -> Change:
    """The same change of every decoder layer."""

    def change_all(model: Any, patch: MonkeyPatch) -> None:
        for layer in model.get_decoder().layers:
            change(layer)

    return change_all


def _states_by_name(name: str) -> Callable[[Any], None]:
    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return (args[1:], kwargs | {name: args[0]}) if args else (args, kwargs)

    def back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return (kwargs[name], *args), {k: v for k, v in kwargs.items() if k != name}

    return lambda layer: called(layer, forth, back, {"hidden_states": name})


def _all_by_place(layer: Any) -> None:
    """Layers that are called as `layer(states, mask, positions, cache, caching, angles)`."""
    order = ("attention_mask", "position_ids", CACHE, "use_cache", "position_embeddings")

    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        others = {k: v for k, v in kwargs.items() if k not in order}
        return (*args, *(kwargs.get(name) for name in order)), others

    def back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return args[:1], dict(zip(order, args[1:], strict=True)) | kwargs

    called(layer, forth, back)


def _nameless(layer: Any) -> None:
    """A forward whose signature says nothing, as wrappers have it."""
    plain = type(layer).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    recast(layer, forward=forward)


def _returning(wrap: Callable[[Any], Any], unwrap: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Layers that return something else, which the decoder takes apart."""

    def change(layer: Any) -> None:
        cls = type(layer)
        plain = cls.forward

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return unwrap(cls.__call__(self, *args, **kwargs))

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return wrap(plain(self, *args, **kwargs))

        vars(forward)["__signature__"] = signature(plain, {})
        recast(layer, __call__=call, forward=forward)

    return change


def _elsewhere(decoy: Callable[[nn.ModuleList], nn.ModuleList | None]) -> Change:
    def change(model: Any, patch: MonkeyPatch) -> None:
        decoder = model.get_decoder()
        elsewhere(decoder, "layers", decoy(decoder.layers), "forward")

    return change


def _positions_of_its_own(model: Any, patch: MonkeyPatch) -> None:
    """A decoder that counts columns, whatever positions it is given."""
    decoder = model.get_decoder()

    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return args, kwargs

    def back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return args, kwargs | {"position_ids": None}

    called(decoder, forth, back)


def _positions_of_the_mask(model: Any, patch: MonkeyPatch) -> None:
    """A decoder that counts what its mask shows, whatever positions it is given."""
    decoder = model.get_decoder()

    def back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        mask = kwargs["attention_mask"]
        counted = (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
        length = kwargs["inputs_embeds"].shape[1]
        return args, kwargs | {"position_ids": counted[:, -length:]}

    called(decoder, lambda args, kwargs: (args, kwargs), back)


def _batch_backwards(model: Any, patch: MonkeyPatch) -> None:
    """A decoder that takes the rows of a batch in another order."""
    decoder = model.get_decoder()
    plain = type(decoder).forward

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = ("attention_mask", "position_ids", "inputs_embeds")
        turned = {k: v.flip(0) for k, v in kwargs.items() if k in names and v is not None}
        out = plain(self, *args, **kwargs | turned)
        out["last_hidden_state"] = out.last_hidden_state.flip(0)
        return out

    recast(decoder, forward=forward)


def _in_halves(model: Any, patch: MonkeyPatch) -> None:
    """A decoder that reads a prompt in two parts, one behind the other."""
    decoder = model.get_decoder()
    plain = type(decoder).forward

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = kwargs["inputs_embeds"]
        if states.shape[1] < 2 or kwargs.get(CACHE) is None or kwargs.get("position_ids") is None:
            return plain(self, *args, **kwargs)
        half, outs = states.shape[1] // 2, []
        for part in (slice(half), slice(half, None)):
            given = {k: kwargs[k][:, part] for k in ("inputs_embeds", "position_ids")}
            seen = kwargs["attention_mask"][:, : half if part.stop else None]
            outs.append(plain(self, *args, **kwargs | given | {"attention_mask": seen}))
        outs[1]["last_hidden_state"] = torch.cat([out.last_hidden_state for out in outs], dim=1)
        return outs[1]

    recast(decoder, forward=forward)


def _angles_of_its_own(model: Any, patch: MonkeyPatch) -> None:
    """Layers that make their rotary angles themselves, of positions under another name."""
    decoder = model.get_decoder()
    rotary: Any = decoder.rotary_emb

    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        others = {k: v for k, v in kwargs.items() if k not in ("position_embeddings",)}
        ids = others.pop("position_ids")
        return args, others | {"places": ids}

    def back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        ids = kwargs["places"]
        angles = rotary.forward(args[0], ids)
        others = {k: v for k, v in kwargs.items() if k != "places"}
        return args, others | {"position_ids": ids, "position_embeddings": angles}

    for layer in decoder.layers:
        called(layer, forth, back, {"position_ids": "places", "position_embeddings": None})


class _Angles(nn.Module):
    """Rotary angles under a name that does not say so, positions by place."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        object.__setattr__(self, "inner", inner)

    def forward(self, states: torch.Tensor, at: torch.Tensor) -> Any:
        inner: Any = self.inner
        return inner.forward(states, at)


def _rotary_renamed(model: Any, patch: MonkeyPatch) -> None:
    decoder = model.get_decoder()
    angles = _Angles(decoder.rotary_emb)
    del decoder.rotary_emb

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.angles: Any = angles

        def forward(self, states: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return self.angles(states, position_ids)

    decoder.rotary_emb = Call()


def _cloned_angles(model: Any, patch: MonkeyPatch) -> None:
    """A decoder that hands each layer rotary angles of its own, equal to all others'."""

    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        angles = tuple(one.clone() for one in kwargs["position_embeddings"])
        return args, kwargs | {"position_embeddings": angles}

    for layer in model.get_decoder().layers:
        called(layer, forth, lambda args, kwargs: (args, kwargs))


ROWS: list[Row] = [
    Row("hidden_states come by name", each(_states_by_name("hidden_states"))),
    Row("hidden_states are called states", each(_states_by_name("states"))),
    Row("layers' attention_mask is called mask", each(lambda x: rename(x, attention_mask="mask"))),
    Row(
        "layers' position_embeddings are called rotary",
        each(lambda layer: rename(layer, position_embeddings="rotary")),
    ),
    Row("layers' position_ids are called places", each(lambda x: rename(x, position_ids="places"))),
    Row("layers' cache is called kv", each(lambda layer: rename(layer, **{CACHE: "kv"}))),
    Row("layers' use_cache is called caching", each(lambda x: rename(x, use_cache="caching"))),
    Row("layers are called by place", each(_all_by_place)),
    Row("layers' signature says nothing", each(_nameless)),
    Row("layers return tuples", each(_returning(lambda out: (out, None), lambda out: out[0]))),
    Row(
        "layers return dictionaries",
        each(_returning(lambda out: {"states": out}, lambda out: out["states"])),
    ),
    Row("layers run without hooks", each(unhooked)),
    Row("layers run without hooks, sliding windows", each(unhooked), host="gemma3"),
    Row("layers stand under another attribute", _elsewhere(lambda layers: None)),
    Row("the layers that are listed are not those that run", _elsewhere(copy.deepcopy)),
    Row(
        "layers are listed in another order than they run",
        _elsewhere(lambda layers: nn.ModuleList([*layers[:1], *layers[:0:-1]])),
    ),
    Row(
        "one layer more is listed than runs",
        _elsewhere(lambda layers: nn.ModuleList([copy.deepcopy(layers[0]), *layers])),
    ),
    Row("the decoder ignores positions", _positions_of_its_own, batch="one"),
    Row("the decoder counts positions off the mask", _positions_of_the_mask),
    Row("the decoder reads the prompt in halves", _in_halves),
    Row("the decoder takes the batch backwards", _batch_backwards),
    Row("layers make their rotary angles themselves", _angles_of_its_own),
    Row("rotary angles come of a class of another name", _rotary_renamed, pruners=COMPACT),
    Row("each layer gets rotary angles of its own", _cloned_angles, pruners=COMPACT),
]
