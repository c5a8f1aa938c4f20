"""What a task is: samples, the prompt of each, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from vlmprune.io.models import prompt_of
from vlmprune.io.pictures import as_seen, open_image
from vlmprune.study.tasks.answered import Answered

MAX_NEW_TOKENS = 64
"""Limit of an answer where a task sets none."""


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: its name, unique within the task.
        images: pictures in prompt order, or files, which are opened when they are needed.
        question: as the task has it.
        answers: all that count as true; empty where nobody knows.
        kind: of the question, for figures by kind; may be empty.
        group: what it shares with other samples about the same pictures, over which intervals are
            bootstrapped and pictures encoded once; empty: the files' names, or the sample's own.
    """

    id: str
    images: tuple[Image.Image | Path, ...]
    question: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        if not self.group:
            files = [str(one) for one in self.images if isinstance(one, Path)]
            named = bool(files) and len(files) == len(self.images)
            object.__setattr__(self, "group", "|".join(files) if named else self.id)

    def opened(self) -> list[Image.Image]:
        """The pictures, in RGB.

        Raises:
            VlmpruneError: a file does not exist or is no picture.
        """
        return [
            as_seen(one) if isinstance(one, Image.Image) else open_image(one) for one in self.images
        ]


class Task:
    """A set of samples with its prompt and its scorer; subclasses implement `samples`, `score`."""

    name: ClassVar[str] = ""
    # Pixels a side that pictures are scaled to; None for the processor's own size.
    side: ClassVar[int | None] = None

    @property
    def label(self) -> str:
        """What tells this set from others of the task, for tables and stores."""
        return self.name

    def samples(self, limit: int | None = None) -> list[Sample]:
        """The samples, always in the same order; samples of one group stand together.

        Args:
            limit: how many from the first; None for all.

        Raises:
            VlmpruneError: the set cannot be read.
        """
        raise NotImplementedError

    def prompt(self, sample: Sample, processor: Any) -> str:
        """The text that the processor gets: by default the question in the model's chat form."""
        return prompt_of(processor, len(sample.images), sample.question)

    def max_new_tokens(self, sample: Sample) -> int:
        """Limit of the answer."""
        return MAX_NEW_TOKENS

    def score(self, sample: Sample, text: str) -> float:
        """How right an answer is, 0 to 1; asked only about samples that have true answers."""
        raise NotImplementedError

    def summary(self, results: Sequence[Answered]) -> dict[str, float]:
        """Figures beyond the mean score that the set is known for; by name, in their own units.

        Args:
            results: those of the task's samples, or of some of them.
        """
        return {}

    def read_from(self) -> tuple[Path, ...] | None:
        """What the questions are read from; None where nothing but `samples` tells.

        Answers that were kept are given up once one of these files has changed.
        """
        return None


def first(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first so many samples, or all."""
    return list(samples[:limit])
