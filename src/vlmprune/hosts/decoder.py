"""The language model of a host: its layers, how they are called, and its rotary angles."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, release
from vlmprune.hosts.contract import broken
from vlmprune.hosts.outputs import last_of

# The kind of a decoder layer in which a token sees all before it, and those that attend at all.
FULL = "full_attention"
ATTENDING = (FULL, "sliding_attention", "chunked_attention")

_DECODER, _LAYERS, _INNER = "get_decoder", "layers", "model"
# The norm behind the last layer.
_NORM = "norm"

# Arguments of a decoder layer. The states come first, whatever they are called.
_MASK, _ANGLES, _POSITIONS = "attention_mask", "position_embeddings", "position_ids"
_CACHING = "use_cache"
# What the language model is called with: the embedded prompt.
_EMBEDDED = "inputs_embeds"
_AS_FIELDS = "return_dict"
# What some layers take of each token beside its state, which nobody gathers; by the field of the
# config that is 0 where a model has none of it, or "" where all have.
_OF_TOKENS = {"per_layer_input": "hidden_size_per_layer_input", "attention_scaling": ""}
# Attention that cannot be followed, and why. What is not here is told by the first call.
_TWICE = {"DiffLlamaAttention": "attends twice to the keys that its cache returns"}
_CHANGED = {"JetMoeAttention": "repeats the keys that its cache returns before it attends to them"}
# Those that have an entry a column, and that are gathered.
_FOLLOWED = frozenset({_MASK, _ANGLES, _POSITIONS})


def decoder_of(model: Any) -> Any:
    """The module of the language model whose child `layers` are its layers.

    Raises:
        VlmpruneError: it is not found.
    """
    decoder = getattr(model, _DECODER, None)
    decoder = None if decoder is None else decoder()
    # A language model with a head holds the decoder as its `model`.
    decoder = getattr(decoder, _INNER, decoder)
    if not isinstance(getattr(decoder, _LAYERS, None), nn.ModuleList):
        raise VlmpruneError(
            f"{type(model).__name__} of transformers {release.version()} has no list of decoder "
            f"layers where {_DECODER}().{_LAYERS} should be, so what happens between them cannot "
            f"be followed; install transformers{release.TESTED}."
        )
    return decoder


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of the language model.

    Raises:
        VlmpruneError: they are not found.
    """
    layers: nn.ModuleList = getattr(decoder_of(model), _LAYERS)
    return layers


def final_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """The norm behind the last layer of the language model, [..., D] → [..., D].

    Raises:
        VlmpruneError: it is not found.
    """
    norm = getattr(decoder_of(model), _NORM, None)
    if not isinstance(norm, nn.Module):
        raise VlmpruneError(
            f"{type(decoder_of(model)).__name__} of transformers {release.version()} has no final "
            f"{_NORM}, so states cannot be compared behind it; set normed=False."
        )
    # Not by the module's call, whose hooks would take it for the host's own.
    return norm.forward


def recomputes(model: Any) -> bool:
    """Whether the language model would recompute activations in a forward now, without a cache."""
    return release.recomputes((decoder_of(model), *decoder_layers(model)))


def rotary_modules(model: Any) -> list[nn.Module]:
    """The modules of the language model that make rotary angles for all layers."""
    own = [child for name, child in decoder_of(model).named_children() if name != _LAYERS]
    return [child for child in own if "rotary" in type(child).__name__.lower()]


def full_attention_layers(model: Any, lending: bool = True) -> list[int]:
    """The decoder layers with full attention and a cache of their own, which may be cut.

    A sliding window drops old columns by itself, and linear attention has none.

    Args:
        model: the host.
        lending: whether those count, too, whose keys and values later layers attend to.
    """
    borrow, lend = config.sharing_layers(model.config)
    left = borrow if lending else borrow | lend
    kinds = enumerate(config.layer_kinds(model.config))
    return [i for i, kind in kinds if kind == FULL and i not in left]


def borrowing_layers(model: Any) -> dict[int, int]:
    """By decoder layer with full attention that has no cache, the one whose keys it attends to."""
    borrow, lend = config.sharing_layers(model.config)
    kinds = config.layer_kinds(model.config)
    own = [i for i in lend if kinds[i] == FULL]
    return {i: own[0] for i in sorted(borrow) if own and kinds[i] == FULL}


def turns_in_three(model: Any) -> bool:
    """Whether a visual token has three positions, as far as a model that no record knows tells."""
    return hasattr(getattr(model, "base_model", None), "get_rope_index")


def check_counted(model: Any) -> None:
    """Refuse a language model that attends several times a layer, of whose caches each has one.

    Raises:
        VlmpruneError: its config tells of another number of layers than there are.
    """
    text = config.of_text(model.config)
    told, there = int(config.required(text, "num_hidden_layers")), len(decoder_layers(model))
    if told != there:
        raise VlmpruneError(
            f"{type(model).__name__} has {there} decoder layers and a config that tells of {told}, "
            "so it attends several times a layer, which is not followed; prune before the language "
            "model."
        )


def check_attended(model: Any, index: int, cut: bool) -> None:
    """Refuse a decoder layer that does something to what its cache returns before it attends.

    Args:
        model: the host.
        index: number of the layer.
        cut: whether its cache is to be cut, or read in part; else its attention is only read.

    Raises:
        VlmpruneError: it does.
    """
    for module in decoder_layers(model)[index].modules():
        for cls in type(module).__mro__:
            twice = _TWICE.get(cls.__name__)
            found = twice or (_CHANGED.get(cls.__name__) if cut else None)
            if found is not None:
                raise VlmpruneError(
                    f"the decoder layers of {type(model).__name__} have {cls.__name__}, which "
                    f"{found}, and that is not followed; prune before the language model."
                )


def adds_between(model: Any) -> str | None:
    """What the language model adds to visual tokens between its layers; None if nothing."""
    takes = inspect.signature(type(decoder_of(model)).forward).parameters
    return next((name for name in takes if name.startswith("deepstack")), None)


def takes_angles(layer: nn.Module) -> bool:
    """Whether a decoder layer takes rotary angles from outside."""
    return _ANGLES in _parameters(type(layer))


def _parameters(cls: type) -> tuple[str, ...]:
    """Names that a layer's forward takes, without itself."""
    return _taken(cls)


# Decoder layers are asked at each step.
@cache
def _taken(cls: Any) -> tuple[str, ...]:
    takes = inspect.signature(cls.forward).parameters
    return tuple(takes)[1:]


def check_layers(model: Any) -> None:
    """Refuse decoder layers that cannot be given other rows, from their signatures alone.

    Raises:
        VlmpruneError: one sentence says what they do not take.
    """
    for cls in dict.fromkeys(type(layer) for layer in decoder_layers(model)):
        release.cache_name(cls)
        takes = _parameters(cls)
        own = [name for name in takes if name in _OF_TOKENS and _comes(model, name)]
        if own:
            raise VlmpruneError(
                f"{cls.__name__} of transformers {release.version()} takes {own[0]} of each token, "
                "of which tokens cannot be dropped; prune before the language model."
            )
        missing = [name for name in (_MASK, _ANGLES) if name not in takes]
        if not takes or missing:
            raise VlmpruneError(
                f"{cls.__name__} of transformers {release.version()} takes no "
                f"{' and no '.join(missing) or 'states'}, so it cannot be given those of the "
                "tokens that go on; prune before the language model."
            )


def _comes(model: Any, name: str) -> bool:
    """Whether layers are given an argument of `_OF_TOKENS`; a call that brings it all the same is
    refused."""
    field = _OF_TOKENS[name]
    return not field or config.stated(config.of_text(model.config), field) != 0


# Not frozen: one is made of each call of a layer that is followed. Nobody changes one.
@dataclass(slots=True)
class LayerCall:
    """One call of a decoder layer, taken apart.

    Attributes:
        cls: the layer's class.
        named: all arguments by the host's names, the states among them.
        placed: how many of them the host gives by place.
    """

    cls: type
    named: Mapping[str, Any]
    placed: int = 1

    @property
    def hidden(self) -> Tensor:
        """[B, R, D] the states that come."""
        states: Tensor = self.named[_parameters(self.cls)[0]]
        return states

    @property
    def mask(self) -> Tensor | None:
        """As `AttentionCall.mask`."""
        return self.named.get(_MASK)

    @property
    def angles(self) -> Any:
        """Rotary angles: a tensor or a tuple of them, each [..., B or 1, R, D]."""
        return self.named.get(_ANGLES)

    @property
    def positions(self) -> Tensor | None:
        """[..., R] that flash attention reads; None where the layer is not given any."""
        found = self.named.get(_POSITIONS)
        return found if isinstance(found, Tensor) else None

    @property
    def cache(self) -> Any:
        """The KV cache; None without one."""
        return release.cache_given(self.cls, self.named)

    def with_hidden(self, hidden: Tensor) -> LayerCall:
        """The call on other states."""
        return self._with(_parameters(self.cls)[0], hidden)

    def with_mask(self, mask: Tensor | None) -> LayerCall:
        """The call with another mask."""
        return self._with(_MASK, mask)

    def with_angles(self, angles: Any) -> LayerCall:
        """The call with other rotary angles."""
        return self._with(_ANGLES, angles)

    def with_positions(self, positions: Tensor) -> LayerCall:
        """The call with other positions."""
        return self._with(_POSITIONS, positions)

    def without_cache(self) -> LayerCall:
        """The call of a layer that neither reads a cache nor fills one."""
        alone = release.with_cache(self.cls, self.named, None) | {_CACHING: False}
        return replace(self, named=alone, placed=min(1, self.placed))

    def unfollowed(self, length: int) -> str | None:
        """The name of an argument that has an entry a column and that nobody knows to gather."""
        states = _parameters(self.cls)[0]
        for name, value in self.named.items():
            if name == states or name in _FOLLOWED or not isinstance(value, Tensor):
                continue
            if value.ndim >= 2 and value.shape[1] == length:
                return name
        return None

    def unbuilt(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the layer takes them, by place and by name."""
        rest = dict(self.named)
        return tuple(rest.pop(name) for name in _parameters(self.cls)[: self.placed]), rest

    def _with(self, name: str, value: Any) -> LayerCall:
        return replace(self, named={**self.named, name: value})


def embeddings_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """[B, L, D] the embedded prompt that the language model is given; None if it is not found."""
    found = kwargs.get(_EMBEDDED)
    return found if isinstance(found, Tensor) else None


def states_alone(model: Any, ids: Tensor) -> Tensor:
    """[B, L, D] states behind the last layer of prompts of text alone, without padding or cache.

    Args:
        model: the host.
        ids: [B, L] token ids.
    """
    return last_of(
        decoder_of(model)(
            **{
                _EMBEDDED: model.get_input_embeddings()(ids),
                _MASK: torch.ones_like(ids),
                _CACHING: False,
                _AS_FIELDS: True,
            }
        )
    )


def layer_call(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall:
    """Take the call of a decoder or encoder layer apart, as a hook before it is given it."""
    names = _parameters(type(layer))
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or not isinstance(named.get(names[0]), Tensor):
        raise broken(layer, "it is not called with states first")
    return LayerCall(type(layer), named, len(args))


def states_of(output: Any) -> Tensor:
    """The states in what a layer returned, which may be the first of several things.

    Raises:
        ContractError: it returned something else.
    """
    states = output[0] if isinstance(output, tuple) else output
    if not isinstance(states, Tensor):
        raise broken(output, "a layer returns it, and no states")
    return states


def with_states(output: Any, states: Tensor) -> Any:
    """What a layer returned, with other states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


@dataclass(frozen=True)
class RotaryCall:
    """One call of a module that makes rotary angles for positions.

    Attributes:
        module: the module.
        args: by place.
        kwargs: by name.
        output: the angles.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def positions(self) -> Tensor:
        """[..., B or 1, L] that the angles were made for."""
        found: Tensor = self.kwargs[_POSITIONS] if _POSITIONS in self.kwargs else self.args[1]
        return found

    def again(self, positions: Tensor) -> Any:
        """Angles of the same kind for other positions."""
        args, kwargs = self.args, dict(self.kwargs)
        if _POSITIONS in kwargs:
            kwargs[_POSITIONS] = positions
        else:
            args = (args[0], positions, *args[2:])
        # Not by the module's call, whose hooks would take it for the host's own.
        return self.module.forward(*args, **kwargs)
