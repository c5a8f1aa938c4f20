"""The embedded model's own held-out scenes, installed with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from vlmprune import embedded
from vlmprune.study.tasks.base import Sample, Task, first
from vlmprune.study.tasks.scorers import same_words

KINDS = {
    "presence": "presence",
    "count": "count",
    "at": "position",
    "where": "position",
    "left": "relation",
    "above": "relation",
    "read": "reading",
    "describe": "listing",
}
"""Kind of question by the generator's name of it."""

# Tokens of the longest answers, and some to spare.
_LISTING, _SHORT = 40, 16


@dataclass(frozen=True)
class Scenes(Task):
    """Questions about 120 test scenes on which the embedded model was not trained.

    An answer is right only if every word is. Other models understand the questions too, but do
    not word their answers as these are.
    """

    name: ClassVar[str] = "scenes"

    def __post_init__(self) -> None:
        # So that it is told before any work if they are not installed.
        embedded.held_out()

    def samples(self, limit: int | None = None) -> list[Sample]:
        """The samples, scene by scene."""
        return first(_all(), limit)

    def max_new_tokens(self, sample: Sample) -> int:
        """Enough for the longest answer of the kind."""
        return _LISTING if sample.kind == "listing" else _SHORT

    def score(self, sample: Sample, text: str) -> float:
        """1 for the true answer; case and punctuation do not count."""
        return same_words(text, sample.answers)


@cache
def _all() -> tuple[Sample, ...]:
    folder = embedded.held_out()
    listed = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    return tuple(
        Sample(
            id=f"{scene['file'].partition('.')[0]}-{asked['kind']}",
            images=(folder / scene["file"],),
            question=asked["question"],
            answers=(asked["answer"],),
            kind=KINDS[asked["kind"]],
            group=scene["file"],
        )
        for scene in listed
        for asked in scene["questions"]
    )
