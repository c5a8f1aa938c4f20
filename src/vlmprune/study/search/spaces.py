"""What `vlmprune search` may vary: the settings of each method, and their ranges.

A range is written `keep=0.05..0.5` (whole numbers on both sides: whole numbers), a choice
`important_ratio=0.25,0.5,0.75`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmprune.costs.units import number
from vlmprune.errors import VlmpruneError, meant

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, both included.

    Attributes:
        low: the lower end.
        high: the upper end.
        log: whether a tenth of a value counts as far as ten times of it.
        whole: whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Space = Mapping[str, Range | Choice]

# By the names of settings, whichever method they belong to; a fraction of tokens is searched as
# finely at 3 % as at 30 %.
KNOWN: Space = {
    "keep": Range(0.02, 1.0, log=True),
    "read": Range(0.01, 0.5, log=True),
    "important_ratio": Range(0.0, 1.0),
    "k": Range(0.05, 5.0, log=True),
    "tau": Range(0.6, 1.0),
    "r": Range(0.05, 0.7),
    "dr": Range(0.0, 0.3),
    "coverage": Range(0.0, 1.0),
}


def space_of(fields: Sequence[str], fixed: Sequence[str], given: Sequence[str]) -> Space:
    """What is varied of a method.

    Args:
        fields: the method's settings.
        fixed: those that its spec gives, which stay.
        given: ranges and choices of the command line; without any, all settings in `KNOWN`.

    Raises:
        VlmpruneError: one cannot be read, names no setting of the method or a fixed one, or
            nothing is left to vary.
    """
    asked = dict(_read(text) for text in given)
    for name in asked:
        if name not in fields:
            near = meant(name, fields)
            raise VlmpruneError(
                f"--over {name}=… names no setting of the method{near}; it has {', '.join(fields)}."
            )
        if name in fixed:
            raise VlmpruneError(f"{name} is both given and to be varied; leave one of them out.")
    found = asked or {n: s for n, s in KNOWN.items() if n in fields and n not in fixed}
    if not found:
        raise VlmpruneError(
            "nothing is left to vary; name a setting, as in --over keep=0.05..0.5, or leave one "
            "out of the method."
        )
    return found


def _read(text: str) -> tuple[str, Range | Choice]:
    from vlmprune.spec import pair, value_of

    named = pair(text)
    if named is None:
        raise VlmpruneError(f"--over {text!r} is not of the form keep=0.05..0.5 or keep=16,32,64.")
    name, rest = named
    low, dots, high = (part.strip() for part in rest.partition(".."))
    if not dots:
        return name, Choice(tuple(value_of(part.strip()) for part in rest.split(",")))
    ends = [value_of(low), value_of(high)]
    if not all(isinstance(e, int | float) and not isinstance(e, bool) for e in ends):
        raise VlmpruneError(f"--over {text!r} has ends that are no numbers; write keep=0.05..0.5.")
    if not ends[0] < ends[1]:
        raise VlmpruneError(f"--over {text!r} has its lower end above; write keep=0.05..0.5.")
    known = KNOWN.get(name)
    log = isinstance(known, Range) and known.log and ends[0] > 0
    return name, Range(ends[0], ends[1], log, all(isinstance(e, int) for e in ends))


def share(text: str) -> float:
    """`1%` or `0.01` as a share.

    Raises:
        VlmpruneError: it is neither, or outside 0 to 100 %.
    """
    value = number(text)
    if value is None or not 0 <= value < 1:
        raise VlmpruneError(
            f"--max-loss {text} is no share from 0 up to 100 %; write --max-loss 1%, the same as "
            "0.01."
        )
    return value
