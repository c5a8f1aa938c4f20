"""What a host returns: its fields, read and written here alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import release

# Of an encoder's output: the visual tokens, features for later layers of the language model, and
# the encoder's own states.
_TOKENS, _DEEP, _LAST = "pooler_output", "deepstack_features", "last_hidden_state"
_STATES, _ATTENTIONS = "hidden_states", "attentions"
# Of what `generate` returns.
_SEQUENCES = "sequences"

# What encoder outputs are where nothing says otherwise.
ENCODED: type = BaseModelOutputWithPooling


def field(output: Any, name: str) -> Any:
    """A field of what a host returned.

    Raises:
        VlmpruneError: there is no such field in this release.
    """
    if not hasattr(output, name):
        raise VlmpruneError(
            f"{type(output).__name__} of transformers {release.version()} has no {name}, which "
            f"vlmprune reads; install transformers{release.TESTED}."
        )
    return getattr(output, name)


def tokens_of(output: Any) -> Any:
    """Visual tokens of an encoder's output, as the host has them: a tensor, or one an item."""
    return field(output, _TOKENS)


def set_tokens(output: Any, tokens: Any) -> None:
    """Put other visual tokens into an encoder's output."""
    field(output, _TOKENS)
    setattr(output, _TOKENS, tokens)


def last_of(output: Any) -> Tensor:
    """The encoder's own last states."""
    states: Tensor = field(output, _LAST)
    return states


def set_last(output: Any, states: Any) -> None:
    """Put other last states into an encoder's output."""
    field(output, _LAST)
    setattr(output, _LAST, states)


def states_of(output: Any) -> tuple[Tensor | None, ...]:
    """States behind each encoder layer, where the host was asked for them; else none."""
    return field(output, _STATES) or ()


def set_states(output: Any, states: tuple[Tensor | None, ...]) -> None:
    """Put other states behind each encoder layer into an encoder's output."""
    setattr(output, _STATES, states)


def deep_of(output: Any, due: int = 0) -> Sequence[Any]:
    """Features for later layers of the language model, layer by layer; none of most hosts.

    Args:
        output: of an encoder.
        due: how many layers the config says.

    Raises:
        VlmpruneError: they are not there.
    """
    if due:
        found: Sequence[Any] = field(output, _DEEP)
        return found
    return getattr(output, _DEEP, None) or ()


def encoded(like: Any, cls: type, tokens: list[Tensor], deep: list[Any], whole: bool) -> Any:
    """An encoder's output with other visual tokens.

    Fresh each time, for `generate` expands what it is given in place.

    Args:
        like: whose further fields it takes over; None for none.
        cls: its class, where there is no other.
        tokens: [k, D] of each item.
        deep: features for later layers; none of most hosts.
        whole: whether the encoder's own states go along, which a forward hands out to the user.
    """
    large = () if whole else (_LAST, _STATES, _ATTENTIONS)
    held = {} if like is None else dict(like.items())
    fields = {name: value for name, value in held.items() if name not in large}
    # Each in its place, for tuples are made of them in order; and as items, for a host may ask
    # whether the output holds anything.
    fields[_TOKENS] = tokens
    if deep:
        fields[_DEEP] = deep
    made: Any = cls() if like is None else type(like)()
    for name, value in fields.items():
        made[name] = value
    return made


def output_class(function: Callable[..., Any]) -> type:
    """The class of outputs that a method of a model is annotated to return."""
    said = inspect.signature(function).return_annotation
    found = [one for one in (said, *get_args(said)) if isinstance(one, type)]
    return next((one for one in found if issubclass(one, ModelOutput)), ENCODED)


def sequences_of(result: Any) -> Tensor:
    """[B, L] ids in what `generate` returned."""
    ids: Tensor = result if isinstance(result, Tensor) else field(result, _SEQUENCES)
    return ids


def with_sequences(result: Any, ids: Tensor) -> Any:
    """What `generate` returned, with other ids."""
    if isinstance(result, Tensor):
        return ids
    setattr(result, _SEQUENCES, ids)
    return result


def at_columns(result: Any, columns: Tensor | None) -> Any:
    """What a model below a head returned, its states at other columns.

    Args:
        result: with the last states [B, S, D] and, where they were asked for, those behind each
            layer; as a tuple, the last states come first.
        columns: [B, L] which of its columns is to stand at each; None for the same.
    """
    if columns is None:
        return result

    def widened(states: Any) -> Any:
        if isinstance(states, tuple):
            return tuple(widened(one) for one in states)
        return states.gather(
            1, columns[..., None].to(states.device).expand(-1, -1, states.shape[-1])
        )

    def behind_layers(one: Any) -> bool:
        return isinstance(one, tuple) and all(
            isinstance(states, Tensor) and states.ndim == 3 for states in one
        )

    if isinstance(result, tuple):
        rest = (widened(one) if behind_layers(one) else one for one in result[1:])
        return (widened(result[0]), *rest)
    set_last(result, widened(last_of(result)))
    if states_of(result):
        set_states(result, widened(states_of(result)))
    return result


def joined(tokens: Sequence[Tensor]) -> Tensor:
    """[1, n, D] the visual tokens of all items as one."""
    return torch.cat(list(tokens))[None]
