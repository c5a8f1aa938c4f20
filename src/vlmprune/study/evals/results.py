"""What an evaluation gave: scores, their intervals, and what was spent; nothing is run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from vlmprune.errors import VlmpruneError

FORMAT = "vlmprune evaluation 1"
UNPRUNED = "unpruned"
DRAWS = 2000
"""Resamples of a bootstrap."""
LEVEL = 0.95


@dataclass(frozen=True)
class Result:
    """One sample's answer.

    Figures of cost are those of a prefill by the published formulas, as the pruner reports them.
    Samples that were answered together share their batch's figures alike.

    Attributes:
        id: the sample's.
        group: the pictures that it shares with other samples.
        kind: of the question.
        answer: the text.
        score: 0 to 1; None where the true answer is not known.
        visual_tokens: that the language model's layers saw, on average over the layers.
        visual_tokens_before: that it would have seen without pruning.
        decoder_flops: of the language model on the visual tokens.
        decoder_flops_before: without pruning.
        flops: the same with the vision tower's, once for each question.
        flops_before: without pruning.
        kv_bytes: of the visual tokens' keys and values once the prompt is read.
        kv_bytes_before: without pruning.
        seconds: wall time; of what was done for several samples at once, the sample's share.
    """

    id: str
    group: str
    kind: str
    answer: str
    score: float | None
    visual_tokens: float
    visual_tokens_before: float
    decoder_flops: float
    decoder_flops_before: float
    flops: float
    flops_before: float
    kv_bytes: float
    kv_bytes_before: float
    seconds: float

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Result:
        """What `dataclasses.asdict` made of one; unknown names are passed over.

        Raises:
            VlmpruneError: something is missing.
        """
        names = [one.name for one in fields(cls)]
        missing = [name for name in names if name not in given]
        if missing:
            raise VlmpruneError(
                f"a stored result lacks {', '.join(missing)}; evaluate anew into another file."
            )
        return cls(**{name: given[name] for name in names})


@dataclass(frozen=True)
class Mean:
    """A mean score with the ends of its 95 % interval, and of how many samples.

    Attributes:
        value: the mean.
        low, high: 2.5th and 97.5th percentile over resamples of the groups.
        count: samples.
    """

    value: float
    low: float
    high: float
    count: int


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
    results: tuple[Result, ...]

    @cached_property
    def scored(self) -> tuple[Result, ...]:
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
        return None if self.mean is None else (self.mean.low, self.mean.high)

    @cached_property
    def by_kind(self) -> dict[str, Mean]:
        """The mean score of each kind of question, in the order in which they come first."""
        found: dict[str, list[Result]] = {}
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
        """A figure relative to what it was before pruning; 1 where there was nothing.

        Args:
            name: "visual_tokens", "decoder_flops", "flops" or "kv_bytes".
        """
        before = self.total(f"{name}_before")
        return self.total(name) / before if before else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold: a summary and all results."""
        mean = self.mean
        return {
            "format": FORMAT,
            "task": self.task,
            "method": self.method,
            "model": self.model,
            "samples": len(self.results),
            "accuracy": None if mean is None else asdict(mean),
            "by_kind": {kind: asdict(one) for kind, one in self.by_kind.items()},
            "shares": {
                name: self.share(name)
                for name in ("visual_tokens", "decoder_flops", "flops", "kv_bytes")
            },
            "seconds": self.total("seconds"),
            "results": [asdict(one) for one in self.results],
        }

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Evaluation:
        """What `as_dict` made of one.

        Raises:
            VlmpruneError: it is of another kind.
        """
        if given.get("format") != FORMAT:
            raise VlmpruneError(f"format {given.get('format')!r} is not {FORMAT!r}; evaluate anew.")
        results = tuple(Result.from_dict(one) for one in given["results"])
        return cls(given["task"], given["method"], given["model"], results)


def _mean(results: Sequence[Result]) -> Mean | None:
    """Bootstrap over groups: each resample draws as many groups as there are, with replacement."""
    if not results:
        return None
    numbers: dict[str, int] = {}
    for one in results:
        numbers.setdefault(one.group, len(numbers))
    which = [numbers[one.group] for one in results]
    sums = np.bincount(which, weights=[one.score or 0.0 for one in results])
    counts = np.bincount(which)
    # The same seed and number of groups give the same draws for every method.
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(float(sums.sum() / counts.sum()), float(low), float(high), len(results))
