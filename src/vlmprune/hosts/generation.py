"""What `generate` makes to change scores and to stop: shown the prompt as the user gave it.

`generate` builds two lists of its own rules and the user's. Of a request that was made shorter they
would see the shorter prompt, and count from its length. Here they are built by the lengths of the
whole prompt, and called with it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import release

# The methods by which `generate` makes its lists.
PROCESSORS, CRITERIA = "_get_logits_processor", "_get_stopping_criteria"
_CONFIG, _LENGTH, _ENCODED = "generation_config", "input_ids_seq_length", "encoder_input_ids"
_POSITIONS, _MASK = "position_ids", "attention_mask"
_OWN_CRITERIA, _STOP = "stopping_criteria", "stop_strings"


@dataclass(frozen=True)
class WholePrompt:
    """The prompt of a `generate` as the user gave it, and as the host has it.

    Attributes:
        ids: [B, L] as the user gave it.
        short: columns of the shorter one, which the host has.
        around: what the user's functions run in, so that a call of the model that they make is one
            of its own.
    """

    ids: Tensor
    short: int
    around: Callable[[], AbstractContextManager[Any]]

    @property
    def removed(self) -> int:
        """Columns that the host has less."""
        return self.ids.shape[1] - self.short

    def widened(self, seen: Tensor) -> Tensor:
        """[N, L + n] the user's prompt, and what follows the shorter one in `seen` [N, S + n]."""
        own = self.ids.repeat_interleave(max(1, len(seen) // len(self.ids)), dim=0)
        return torch.cat((own.to(seen.device), seen[:, self.short :]), dim=1)


def processors(whole: WholePrompt, make: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The list of what changes scores, which sees the whole prompt.

    Args:
        whole: the prompt.
        make: the host's method.
        args: what it is called with, by place.
        kwargs: by name.
    """
    given = release.by_name(make, *args, **kwargs)
    longer = {_CONFIG: _lengthened(given[_CONFIG], whole.removed), _ENCODED: whole.ids}
    longer[_LENGTH] = whole.ids.shape[1]
    found = make(**given | longer)
    return _shown(found, whole) if len(found) else found


def criteria(whole: WholePrompt, make: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The list of what stops, likewise; the host's own rules alone need no more than the end."""
    given = release.by_name(make, *args, **kwargs)
    config = given[_CONFIG]
    if not given.get(_OWN_CRITERIA) and not getattr(config, _STOP, None):
        return make(**given)
    return _shown(make(**given | {_CONFIG: _lengthened(config, whole.removed)}), whole)


def check_made(model: Any) -> None:
    """Refuse a class whose `generate` makes its lists otherwise.

    Raises:
        VlmpruneError: one sentence says what is missing.
    """
    cls = type(model)
    for name, takes in ((PROCESSORS, (_CONFIG, _LENGTH, _ENCODED)), (CRITERIA, (_CONFIG,))):
        method = getattr(cls, name, None)
        known = () if method is None else inspect.signature(method).parameters
        if method is None or any(one not in known for one in takes):
            raise VlmpruneError(
                f"{cls.__name__} of transformers {release.version()} makes what changes scores or "
                f"stops otherwise than by {name}, so it would see a shortened prompt; install "
                f"transformers{release.TESTED}, or tell vlmprune's developers."
            )


def drops_positions(model: Any) -> bool:
    """Whether `generate` lets go of the positions that it is given, and the model counts columns.

    It is asked what it makes of two columns, which takes no forward. What cannot be told so is told
    by the first call.
    """
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    given = {_POSITIONS: torch.arange(2, device=model.device)[None], _MASK: torch.ones_like(ids)}
    try:
        made = model.prepare_inputs_for_generation(ids, **given, use_cache=True)
    # A class may want more to be there, each in its own way.
    except Exception:
        return False
    return isinstance(made, Mapping) and made.get(_POSITIONS) is None


def _lengthened(config: Any, removed: int) -> Any:
    """A generation config whose lengths count the user's prompt."""
    config = copy.copy(config)
    for name in ("max_length", "min_length"):
        value = getattr(config, name)
        if value:
            setattr(config, name, value + removed)
    return config


def _shown(found: Any, whole: WholePrompt) -> Any:
    """A list of the host's that shows the whole prompt to all that stand in it."""
    kind: Any = type(found)
    shown = _shown_class(kind)(found)
    shown.whole = whole
    return shown


@functools.cache
def _shown_class(cls: Any) -> Any:
    class Shown(cls):
        """What the host makes of the list, called with the user's prompt."""

        whole: WholePrompt

        def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            with self.whole.around():
                return super().__call__(self.whole.widened(input_ids), *args, **kwargs)

        @property
        def max_length(self) -> Any:
            """As the host counts, which has the shorter prompt."""
            longest = super().max_length
            return None if longest is None else longest - self.whole.removed

    return Shown


class ShownPrompt:
    """A streamer's stand-in that shows it the prompt as the user gave it."""

    def __init__(self, streamer: Any, whole: WholePrompt) -> None:
        self.streamer, self.whole = streamer, whole
        self.first = True

    def put(self, value: Tensor) -> None:
        """Pass tokens on; the first are the prompt."""
        with self.whole.around():
            self.streamer.put(self.whole.ids.cpu() if self.first else value)
        self.first = False

    def end(self) -> None:
        """Pass the end on."""
        with self.whole.around():
            self.streamer.end()
