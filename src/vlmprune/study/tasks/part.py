"""Half of a task: every other picture, to check on one half what was chosen on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmprune.study.tasks.answered import Answered
from vlmprune.study.tasks.base import Sample, Task, first


class Part(Task):
    """The samples about every other picture of a task.

    Attributes:
        whole: the task.
        odd: whether the pictures are the second, fourth, … rather than the first, third, …
        limit: samples at most; None for all of this half.
    """

    def __init__(self, whole: Task, odd: bool, limit: int | None = None) -> None:
        self.whole, self.odd, self.limit = whole, odd, limit

    @property
    def label(self) -> str:
        """The task's own, and which half."""
        amount = "" if self.limit is None else f" (at most {self.limit} samples)"
        return f"{self.whole.label}, {'second' if self.odd else 'first'} half{amount}"

    def samples(self, limit: int | None = None) -> list[Sample]:
        """As the task has them, without the other half's."""
        numbers: dict[str, int] = {}
        half = [
            sample
            for sample in self.whole.samples()
            if numbers.setdefault(sample.group, len(numbers)) % 2 == self.odd
        ]
        return first(first(half, self.limit), limit)

    def prompt(self, sample: Sample, processor: Any) -> str:
        """The task's own."""
        return self.whole.prompt(sample, processor)

    def max_new_tokens(self, sample: Sample) -> int:
        """The task's own."""
        return self.whole.max_new_tokens(sample)

    def score(self, sample: Sample, text: str) -> float:
        """The task's own."""
        return self.whole.score(sample, text)

    def summary(self, results: Sequence[Answered]) -> dict[str, float]:
        """The task's own, of this half."""
        return self.whole.summary(results)
