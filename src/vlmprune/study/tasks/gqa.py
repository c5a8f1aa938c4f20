"""GQA: questions about objects, their attributes and relations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.study.tasks.answered import Answered
from vlmprune.study.tasks.base import Sample
from vlmprune.study.tasks.local import WORD_OR_PHRASE, Listed, Local, below, field, read_json
from vlmprune.study.tasks.scorers import gqa_words

_FILES = (
    "testdev_balanced_questions.json",
    "val_balanced_questions.json",
    "questions1.2/testdev_balanced_questions.json",
)
_PLACES = ("images", ".", "../images")
_OPEN = "query"


@dataclass(frozen=True)
class Gqa(Local):
    """Hudson and Manning, "GQA" (1902.09506).

    Format: the published questions files, by default `testdev_balanced_questions.json` (else the
    balanced validation set): an object by question id with "imageId", "question", "answer" and
    "types", of which the structural one is the kind. Pictures are `images/<imageId>.jpg`. As in
    the authors' `eval.py`, questions that are marked as not balanced are left out.

    Prompt: the question and LLaVA's "Answer the question using a single word or phrase."

    Score: equal or not, as in `eval.py`, once LLaVA's conversion has put the answer into lower
    case, as GQA's are, and has taken a full stop off its end. `summary` has the accuracy of open
    and of binary questions in percent.
    """

    name: ClassVar[str] = "gqa"
    names: ClassVar[str] = "testdev_balanced_questions.json and the pictures in images"

    def found(self) -> list[Path]:
        """The file with the questions."""
        return [self.pick(*_FILES)]

    def entries(self) -> Iterator[Listed]:
        """Of the balanced set."""
        [path] = self.found()
        listed: Any = read_json(path)
        if not isinstance(listed, dict):
            raise VlmpruneError(f"{path} is no object of questions; give it as it is published.")
        for key, one in listed.items():
            image = str(field(path, one, "imageId"))
            if one.get("isBalanced", True) is False:
                continue
            types = one.get("types")
            answer = one.get("answer")
            yield Listed(
                id=str(key),
                picture=image,
                files=below(_PLACES, f"{image}.jpg"),
                question=field(path, one, "question", str) + WORD_OR_PHRASE,
                answers=() if answer is None else (field(path, one, "answer", str),),
                kind="" if types is None else field(path, types, "structural", str),
            )

    def score(self, sample: Sample, text: str) -> float:
        """1 for the same words."""
        return float(gqa_words(text) == sample.answers[0].lower())

    def summary(self, results: Sequence[Answered]) -> dict[str, float]:
        """Accuracy in percent of open questions, and of those with two answers to choose from."""
        figures = {}
        for name, wanted in (("open %", True), ("binary %", False)):
            some = [
                one.score
                for one in results
                if one.score is not None and one.kind and (one.kind == _OPEN) == wanted
            ]
            if some:
                figures[name] = 100 * sum(some) / len(some)
        return figures
