"""Rows about records that models return, whose fields have other names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field as entry
from dataclasses import make_dataclass
from functools import wraps
from typing import Any

from pytest import MonkeyPatch
from transformers.utils import ModelOutput

from sabotage.hosts import Row
from sabotage.tools import recast, standing_in
from stock import CACHE

Change = Callable[[Any, MonkeyPatch], None]


def _record(output: Any, names: dict[str, str | None]) -> Any:
    """The same record, of a class with other fields; those named None are gone."""
    held = {names.get(k, k): v for k, v in output.items() if names.get(k, k) is not None}
    fields = [(str(name), Any, entry(default=None)) for name in held]
    made: Any = make_dataclass("Output", fields, bases=(ModelOutput,))
    return made(**held)


def _from_encoder(**names: str | None) -> Change:
    """What `get_image_features` returns has other fields, which the host's forward knows."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        base = model.model
        cls = type(base)
        encode, plain = cls.get_image_features, cls.forward
        before = {str(new): old for old, new in names.items() if new is not None}

        @wraps(encode)
        def features(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _record(encode(self, *args, **kwargs), names)

        @wraps(plain)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked = self.get_image_features

            def translated(*given: Any, **others: Any) -> Any:
                return _back(asked(*given, **others), before)

            ahead = kwargs.get("mm_encoder_outputs")
            if ahead:
                kind = {k: _back(v, before) for k, v in ahead.items()}
                kwargs = kwargs | {"mm_encoder_outputs": kind}
            with standing_in(self, "get_image_features", translated):
                return plain(self, *args, **kwargs)

        recast(base, get_image_features=features, forward=forward)

    return change


def _back(output: Any, before: dict[str, str]) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if output is None or not any(name in output for name in before):
        return output
    held = {before.get(name, name): value for name, value in output.items()}
    plain = {k: held.pop(k, None) for k in ("last_hidden_state", "pooler_output")}
    made = BaseModelOutputWithPooling(**plain)
    for name, value in held.items():
        made[name] = value
    return made


def _cache_returned(model: Any, patch: MonkeyPatch) -> None:
    """A model whose output holds the cache under another name."""
    plain = type(model).forward

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _record(plain(self, *args, **kwargs), {CACHE: "kv"})

    recast(model, forward=forward)
    cls = type(model)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "kv" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k != "kv"} | {CACHE: kwargs["kv"]}
        return cls.__call__(self, *args, **kwargs)

    recast(model, __call__=call)


def _generated(name: str, other: str) -> Change:
    """`generate` returns a record with another name for one of its fields."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        plain = type(model).generate

        @wraps(plain)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = plain(self, *args, **kwargs)
            return out if not isinstance(out, ModelOutput) else _record(out, {name: other})

        recast(model, generate=generate)

    return change


ROWS: list[Row] = [
    Row("pooler_output is called tokens", _from_encoder(pooler_output="tokens")),
    Row("last_hidden_state is called states", _from_encoder(last_hidden_state="states")),
    Row("the encoder returns no states", _from_encoder(last_hidden_state=None)),
    Row("hidden_states are called layers", _from_encoder(hidden_states="layers")),
    Row(
        "deepstack_features is called deep",
        _from_encoder(deepstack_features="deep"),
        host="qwen3_vl",
    ),
    Row("the output's cache is called kv", _cache_returned, call="turns", names={"cache": "kv"}),
    Row("sequences are called ids", _generated("sequences", "ids")),
]
