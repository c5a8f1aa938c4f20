"""The entrance of the language model: the embedded prompt, and the positions that come with it.

Whatever a host makes of its pixels, it is in the embedded prompt by then; so of a model that no
record knows, visual tokens can be left out there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import decoder, release
from vlmprune.hosts.requests import ModelCall, base_of, unknown_of

_EMBEDDED, _POSITIONS = "inputs_embeds", "position_ids"
# What comes along however a prompt was made.
_USUAL = frozenset({_EMBEDDED, _POSITIONS, "input_ids", "attention_mask", "mm_token_type_ids"})


class EntranceReachedError(Exception):
    """Ends a forward that was run for what it hands to its language model."""


def check(model: Any, who: str) -> None:
    """Refuse a model whose visual tokens cannot be left out where its language model begins.

    Args:
        model: the host.
        who: the method.

    Raises:
        VlmpruneError: one sentence says why.
    """
    name, inside = type(model).__name__, decoder.decoder_of(model)
    takes = inspect.signature(type(inside).forward).parameters
    handed = (_EMBEDDED, *((_POSITIONS,) if decoder.turns_in_three(model) else ()))
    missing = [one for one in handed if one not in takes]
    if inside is model or inside is base_of(model):
        why = "embeds images and runs its decoder layers in one module"
    elif missing:
        why = f"has a language model that takes no {missing[0]}"
    elif (added := decoder.adds_between(model)) is not None:
        why = f"adds features to visual tokens between its decoder layers ({added})"
    else:
        return
    raise VlmpruneError(
        f"{name} of transformers {release.version()} is in no record and {why}, so {who} cannot "
        "leave tokens out before the language model; prune inside it instead."
    )


def whole_forward(call: ModelCall, ids: Tensor, mask: Tensor) -> ModelCall:
    """The forward of a whole request without a cache, of a call of `generate` or `forward`.

    Args:
        call: the call.
        ids: [B, L] of all columns.
        mask: [B, L] of them.
    """
    takes = {*inspect.signature(type(call.model).forward).parameters, *unknown_of(call)}
    own = ModelCall(call.model, {name: one for name, one in call.given.items() if name in takes})
    return own.with_cache(None).with_(ids=ids, mask=mask)


@dataclass(frozen=True)
class EntranceCall:
    """One call of the language model by its host, taken apart.

    Attributes:
        given: its arguments by the host's names.
    """

    given: Mapping[str, Any]

    @property
    def embedded(self) -> Tensor | None:
        """[B, L, D]; None where it is given ids alone."""
        return decoder.embeddings_of(self.given)

    @property
    def positions(self) -> Tensor | None:
        """[B, L] or [3 or more, B, L]; None where it counts by itself."""
        found = self.given.get(_POSITIONS)
        return found if isinstance(found, Tensor) else None

    def with_embedded(self, embedded: Tensor) -> EntranceCall:
        """The call with another prompt."""
        return EntranceCall({**self.given, _EMBEDDED: embedded})

    def with_positions(self, positions: Tensor) -> EntranceCall:
        """The call with other positions."""
        return EntranceCall({**self.given, _POSITIONS: positions})

    def more_than(self, other: EntranceCall) -> str | None:
        """What this call brings, by name, and the other one does not; None for nothing.

        What is made of images, and not of ids, would be missing without them.
        """
        for name, value in self.given.items():
            if name not in _USUAL and isinstance(value, Tensor | list | tuple | dict):
                there = other.given.get(name)
                if there is None:
                    return name
        return None
