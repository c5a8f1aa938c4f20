"""What an evaluation gave: scores, their intervals, and what was spent; nothing is run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from vlmprune.costs.units import ready
from vlmprune.errors import VlmpruneError
from vlmprune.study.measure import versions
from vlmprune.study.stats import Mean, mean_of
from vlmprune.study.tasks.answered import Answered

FORMAT = "vlmprune evaluation 1"
UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Evaluation:
    """All samples' results by one method on one task.

    Attributes:
        task: its label.
        method: the pruner, with its settings; "unpruned" without one.
        model: in words.
        results: in the task's order.
    """

    task: str
    method: str
    model: str
    results: tuple[Answered, ...]

    @cached_property
    def scored(self) -> tuple[Answered, ...]:
        """Those whose true answer is known."""
        return tuple(one for one in self.results if one.score is not None)

    @cached_property
    def mean(self) -> Mean | None:
        """The mean score over samples; None where no true answer is known."""
        return _mean(self.scored)

    @property
    def accuracy(self) -> float | None:
        """The mean score; None where no true answer is known."""
        return None if self.mean is None else self.mean.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of its 95 % interval."""
        return None if self.mean is None else self.mean.ends

    @cached_property
    def by_kind(self) -> dict[str, Mean]:
        """The mean score of each kind of question, in the order in which they come first."""
        found: dict[str, list[Answered]] = {}
        for one in self.scored:
            found.setdefault(one.kind, []).append(one)
        means = {kind: _mean(some) for kind, some in found.items()}
        return {kind: mean for kind, mean in means.items() if mean is not None}

    def minus(self, other: Evaluation) -> Mean | None:
        """How much better this is than the other, sample by sample; resamples are the same.

        Only samples count that both have. Where the interval lies on one side of 0, the
        difference is no accident of which pictures were asked about.
        """
        theirs = {one.id: one.score for one in other.scored}
        pairs = [
            replace(one, score=one.score - theirs[one.id])  # type: ignore[operator]
            for one in self.scored
            if one.id in theirs
        ]
        return _mean(pairs)

    def agreeing(self, other: Evaluation) -> Evaluation:
        """This, scored by whether each answer is also the other's: for samples without labels.

        With the unpruned model's own evaluation, `agreeing(full).mean` says how often pruning left
        the answer as it was. Samples that the other lacks are left out.
        """
        theirs = {one.id: one.answer for one in other.results}
        same = tuple(
            replace(one, score=float(one.answer == theirs[one.id]))
            for one in self.results
            if one.id in theirs
        )
        return replace(self, results=same)

    def total(self, name: str) -> float:
        """The sum of one of the results' figures."""
        return float(sum(getattr(one, name) for one in self.results))

    def share(self, name: str) -> float:
        """A figure relative to what it was before pruning; 1 of nothing, NaN of what is unknown.

        Args:
            name: "visual_tokens", "decoder_flops", "flops", "kv_bytes" or "kv_read".
        """
        before = self.total(f"{name}_before")
        return self.total(name) / before if before else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold: a summary and all results; None for what is unknown."""
        mean = self.mean
        return {
            "format": FORMAT,
            "versions": versions(),
            "task": self.task,
            "method": self.method,
            "model": self.model,
            "samples": len(self.results),
            "accuracy": None if mean is None else asdict(mean),
            "by_kind": {kind: asdict(one) for kind, one in self.by_kind.items()},
            "shares": {
                name: ready(self.share(name))
                for name in ("visual_tokens", "decoder_flops", "flops", "kv_bytes", "kv_read")
            },
            "seconds": self.total("seconds"),
            "results": [one.as_dict() for one in self.results],
        }

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Evaluation:
        """What `as_dict` made of one.

        Raises:
            VlmpruneError: it is of another kind.
        """
        if given.get("format") != FORMAT:
            raise VlmpruneError(f"format {given.get('format')!r} is not {FORMAT!r}; evaluate anew.")
        results = tuple(Answered.from_dict(one) for one in given["results"])
        return cls(given["task"], given["method"], given["model"], results)


def _mean(some: Sequence[Answered]) -> Mean | None:
    return mean_of([one.score or 0.0 for one in some], [one.group for one in some])
