"""What `compare` compares: lists of specs and of budgets, made into configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmprune import spec
from vlmprune.costs.units import number
from vlmprune.errors import VlmpruneError
from vlmprune.io import options
from vlmprune.pruner import Pruner

RANDOM = "random"
"""The control that the others are compared with."""


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


def keeps_of(text: str) -> list[int | float]:
    """The budgets of a list parted by commas.

    Raises:
        VlmpruneError: one is no number, or given twice.
    """
    found: list[int | float] = []
    for part in text.split(","):
        one = number(part)
        if one is None:
            raise VlmpruneError(
                f"--keep {text} holds {part.strip()!r}, which is no number; part integers of at "
                "least 1, or fractions in (0, 1], by commas."
            )
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
        name=" + ".join(stage.text(without=("keep",)) for stage in stages),
        keep=keep,
        pruner=pruner,
        control=all(stage.is_control for stage in stages),
        reference=single is not None and single.name == RANDOM,
        # It would pass pictures whole, and its row would say that it loses nothing.
        videos=any(stage.for_videos for stage in stages),
    )
