"""What `compare` compares: lists of specs and of budgets, made into configurations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlmprune import spec
from vlmprune.errors import VlmpruneError
from vlmprune.io import options
from vlmprune.methods import METHODS
from vlmprune.pruner import Pruner

RANDOM = "random"
"""The control that the others are compared with."""
CONTROL = "control"

_CONTINUES = re.compile(r"[A-Za-z_]\w*\s*=")
_PARTS = re.compile(r'("(?:[^"\\]|\\.)*")|(,)|(.)', re.DOTALL)


@dataclass(frozen=True)
class Way:
    """One configuration.

    Attributes:
        name: the method with its settings but the budget.
        keep: the budget; None for a method without one.
        pruner: the method.
        control: whether it is a control.
        reference: whether the others of its budget are compared with it.
        videos: whether it works on videos alone.
    """

    name: str
    keep: int | float | None
    pruner: Pruner
    control: bool
    reference: bool
    videos: bool = False

    @property
    def spec(self) -> str:
        """The whole spec."""
        return spec.dump(self.pruner)


def split(text: str) -> list[str]:
    """The specs of a list parted by commas, although commas also part a method's settings.

    A part of the form name=value is a setting of the method before it.
    """
    parts = [""]
    for quoted, comma, other in _PARTS.findall(text):
        if comma:
            parts.append("")
        else:
            parts[-1] += quoted or other
    specs: list[str] = []
    for part in map(str.strip, parts):
        if specs and _CONTINUES.match(part):
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    return specs


def keeps_of(text: str) -> list[int | float]:
    """The budgets of a list parted by commas.

    Raises:
        VlmpruneError: one is no number, or given twice.
    """
    found: list[int | float] = []
    for part in text.split(","):
        try:
            one: int | float = int(part)
        except ValueError:
            try:
                one = float(part)
            except ValueError:
                raise VlmpruneError(
                    f"--keep {text} holds {part.strip()!r}, which is no number; part integers of "
                    "at least 1, or fractions in (0, 1], by commas."
                ) from None
        if any(one == other and type(one) is type(other) for other in found):
            raise VlmpruneError(f"--keep {text} holds {part.strip()} twice; give it once.")
        found.append(one)
    return found


def ways_of(methods: Sequence[str], keeps: Sequence[int | float], given: bool = True) -> list[Way]:
    """All configurations: by budget, those of `keeps` first; of each the controls first.

    A method with a setting `keep` that its spec leaves open comes once for each budget, any other
    once.

    Args:
        methods: specs.
        keeps: the budgets.
        given: whether somebody asked for these budgets, so that they must be of use.

    Raises:
        VlmpruneError: a spec or a value is wrong, a configuration comes twice, or no method has a
            budget to be set.
    """
    found: list[Way] = []
    takes_any = False
    for text in methods:
        stages = spec.read(text)
        takes = [s for s in stages if "keep" in s.names and "keep" not in s.settings]
        takes_any = takes_any or any(stage.file is None for stage in takes)
        filled = bool(takes) and all(stage.file is None for stage in takes)
        for keep in keeps if filled else [None]:
            pruner = options.make_pruner(text, {} if keep is None else {"keep": keep})
            found.append(_way(stages, pruner))
    if given and not takes_any:
        raise VlmpruneError(
            f"--keep is no setting of {', '.join(methods)} that is left open; leave it out."
        )
    seen: set[str] = set()
    for way in found:
        if way.spec in seen:
            raise VlmpruneError(f"--methods holds {way.spec} twice; give it once.")
        seen.add(way.spec)
    budgets = [*keeps, *(way.keep for way in found if way.keep is not None)]
    kinds = dict.fromkeys((type(one), one) for one in budgets)
    order = {one: place for place, one in enumerate(kinds)}

    def place(way: Way) -> tuple[int, bool, bool]:
        at = len(order) if way.keep is None else order[type(way.keep), way.keep]
        return at, not way.control, not way.reference

    return sorted(found, key=place)


def _way(stages: Sequence[spec.Stage], pruner: Pruner) -> Way:
    keep, _ = options.budget_of(pruner)
    single = stages[0] if len(stages) == 1 else None
    return Way(
        name=" + ".join(map(_name, stages)),
        keep=keep,
        pruner=pruner,
        control=all(is_control(stage.name) for stage in stages),
        reference=single is not None and single.name == RANDOM,
        # It would pass pictures whole, and its row would say that it loses nothing.
        videos=any(_class(stage.name).needs.startswith("a video") for stage in stages),
    )


def is_control(name: str) -> bool:
    """Whether a method is there to be compared with, which is what it gives as its paper."""
    return _class(name).paper == CONTROL


def _class(name: str) -> type[Pruner]:
    return METHODS[name]


def _name(stage: spec.Stage) -> str:
    settings = {k: v for k, v in stage.settings.items() if k != "keep"}
    if stage.file is not None:
        settings[spec.FROM] = stage.file
    text = ",".join(f"{name}={value}" for name, value in settings.items())
    return f"{stage.name}:{text}" if text else stage.name
