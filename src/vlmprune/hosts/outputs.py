"""What a host returns: its fields, read and written here alone."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
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
# Of a model with a head.
_LOGITS = "logits"
# The arguments that ask for these.
_WANTED = ("output_hidden_states", "output_attentions")
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
    fields[_TOKENS] = _typed(held.get(_TOKENS), tokens)
    if deep:
        layers = held.get(_DEEP) or [None] * len(deep)
        fields[_DEEP] = [_typed(one, layer) for one, layer in zip(layers, deep, strict=True)]
    made: Any = cls() if like is None else _empty(type(like))
    for name, value in fields.items():
        made[name] = value
    return made


def _typed(like: Any, items: Any) -> Any:
    """Items as a tuple where the host has one."""
    return tuple(items) if isinstance(like, tuple) and isinstance(items, list) else items


def more_wanted(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a host's method that encodes: those that ask for states or attention."""
    return {name: arguments[name] for name in _WANTED if arguments.get(name)}


def in_form(held: Any, tokens: Sequence[Tensor], kept: Sequence[Tensor], ordered: bool) -> Any:
    """Visual tokens that are left, in the form in which an encoder returned all of them.

    So `[i]` is of the image (or crop, or row) of which it is in what the encoder returned. Where
    a tensor would need equally many tokens of each and they have not, it is a list.

    Args:
        held: what the encoder returned: [..., n, D], or a list or tuple of such.
        tokens: [k, D] of each item.
        kept: [n] bool of each item.
        ordered: whether an item's tokens do not lie as they did.

    Returns:
        It; None where the encoder returned other tokens than the items have.
    """
    parts = [held] if isinstance(held, Tensor) else list(held)
    lengths = [part.shape[:-1].numel() for part in parts]
    if sum(lengths) != sum(map(len, kept)):
        return None
    if ordered and sum(part.shape[:-2].numel() for part in parts) > len(tokens):
        return list(tokens)
    stays = torch.cat([one.cpu() for one in kept]).split(lengths)
    left = torch.cat(list(tokens)).split([int(one.sum()) for one in stays])
    # By number, for compiled hosts come here, and older torch cannot compile a strict zip.
    made = [_shaped(parts[i], left[i], stays[i]) for i in range(len(parts))]
    if isinstance(held, Tensor):
        return made[0]
    whole = [left[i] if isinstance(one, list) else one for i, one in enumerate(made)]
    return type(held)(whole)


def _shaped(part: Tensor, left: Tensor, stays: Tensor) -> Tensor | list[Tensor]:
    """[..., k, D] of [K, D] tokens that are left of [..., n, D]; a list where k differs."""
    lead = part.shape[:-2]
    if not len(stays):
        # Of a row without images.
        return part
    counts = stays.view(-1, part.shape[-2]).sum(dim=1).unique()
    if len(counts) == 1:
        return left.view(*lead, int(counts), left.shape[-1])
    return list(left.split(stays.view(lead[0], -1).sum(dim=1).tolist()))


def same_form(a: Any, b: Any) -> bool:
    """Whether two have the same form, but for how many tokens there are."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.shape[:-2] == b.shape[:-2]
    return type(a) is type(b) and len(a) == len(b) and all(map(same_form, a, b))


def _empty(cls: Any) -> Any:
    """An output of a class with nothing in it, of timm's towers too, whose states must be given."""
    needed = [one for one in dataclasses.fields(cls) if one.default is dataclasses.MISSING]
    return cls(**{one.name: None for one in needed})


def with_shown(result: Any, instead: Sequence[tuple[Any, Any]]) -> Any:
    """What a forward returned, with some of its values replaced.

    Args:
        result: fields or a tuple, which may hold such again.
        instead: pairs of a value, found by identity, and what to put in its place.
    """
    for value, other in instead:
        if result is value:
            return other
    if isinstance(result, ModelOutput):
        for name, value in list(result.items()):
            changed = with_shown(value, instead)
            if changed is not value:
                result[name] = changed
    elif type(result) is tuple:
        made = tuple(with_shown(value, instead) for value in result)
        return made if any(a is not b for a, b in zip(made, result, strict=True)) else result
    return result


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
            isinstance(states, Tensor)
            and states.ndim == 3
            and states.shape[:2] == result[0].shape[:2]
            for states in one
        )

    if isinstance(result, tuple):
        rest = (widened(one) if behind_layers(one) else one for one in result[1:])
        return (widened(result[0]), *rest)
    set_last(result, widened(last_of(result)))
    if states_of(result):
        set_states(result, widened(states_of(result)))
    return result


def logits_at(result: Any, columns: Tensor, silent: Tensor) -> Any:
    """What a model with a head returned, its logits at other columns.

    Args:
        result: with the logits [B, S, V]; as a tuple, the first of its tensors with as many
            dimensions.
        columns: [B, L] which of its columns is to stand at each.
        silent: [B, L] bool; where nothing is to stand, but -inf.

    Raises:
        VlmpruneError: it holds no logits.
    """

    def widened(logits: Tensor) -> Tensor:
        places = columns[..., None].to(logits.device).expand(-1, -1, logits.shape[-1])
        # In place, for one such tensor is large enough.
        return logits.gather(1, places).masked_fill_(
            silent[..., None].to(logits.device), -torch.inf
        )

    if isinstance(result, tuple):
        at = next(i for i, one in enumerate(result) if isinstance(one, Tensor) and one.ndim == 3)
        return (*result[:at], widened(result[at]), *result[at + 1 :])
    if not hasattr(result, _LOGITS):
        raise VlmpruneError(
            f"logits='full' puts logits at your own columns, and the forward returned a "
            f"{type(result).__name__}, which holds none; attach before a trainer puts a forward of "
            "its own on the model."
        )
    if getattr(result, _LOGITS) is not None:
        setattr(result, _LOGITS, widened(getattr(result, _LOGITS)))
    return result


def joined(tokens: Sequence[Tensor]) -> Tensor:
    """[1, n, D] the visual tokens of all items as one."""
    return torch.cat(list(tokens))[None]
