"""Short clips of moving symbols, installed with the embedded model, for methods of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmprune import embedded
from vlmprune.study.tasks.base import Sample, Task
from vlmprune.study.tasks.folder import Folder
from vlmprune.study.tasks.scorers import same_words


@dataclass(frozen=True)
class Clips(Task):
    """428 questions about 60 clips of four frames, each a picture of the prompt.

    Frames are fed at 112 x 112 pixels, 64 visual tokens each in the embedded model, which was
    trained on single pictures: only what was trained on clips (`mod:weights=embedded-mod`) answers
    well. Photographs, placements and contents are held out of all training.
    """

    name: ClassVar[str] = "clips"
    side: ClassVar[int | None] = 112

    def __post_init__(self) -> None:
        # So that it is told before any work if they are not installed.
        embedded.clips()

    def samples(self, limit: int | None = None) -> list[Sample]:
        """The samples, clip by clip."""
        return Folder(embedded.clips()).samples(limit)

    def score(self, sample: Sample, text: str) -> float:
        """1 for the true answer; case and punctuation do not count."""
        return same_words(text, sample.answers)
