"""ScienceQA-IMG: school questions with options, those that have a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.files import is_file
from vlmprune.runtime.encoder.bare_question import OPTION_LETTER as SUFFIX
from vlmprune.study.tasks.base import Sample
from vlmprune.study.tasks.local import Listed, Local, below, field, read_json
from vlmprune.study.tasks.scorers import option_of

SPLIT = "test"
LETTERS = "ABCDE"
_PLACES = (f"images/{SPLIT}", SPLIT, "images")


@dataclass(frozen=True)
class ScienceQa(Local):
    """Lu et al., "Learn to Explain" (2209.09513); the test questions that have a picture.

    Format: the published `problems.json`, an object by id with "question", "choices", "answer"
    (number of the right choice), "hint", "image" (null without a picture) and "subject", which is
    the kind; and `pid_splits.json`, which lists the ids of "test". Pictures are
    `images/test/<id>/image.png`.

    Prompt: as LLaVA's guide has it for options: "Context: " and the hint where there is one, the
    question, a line for each option ("A. …"), and "Answer with the option's letter from the given
    choices directly."

    Score: whether the letter is the right one, found as LLaVA's `eval_science_qa.py` does (see
    `option_of`); an answer without a letter is wrong, not drawn by lot as in the authors' code.
    """

    name: ClassVar[str] = "scienceqa"
    names: ClassVar[str] = "problems.json, pid_splits.json and the pictures in images/test"

    def found(self) -> list[Path]:
        """Problems and splits."""
        paths = [self.folder / name for name in ("problems.json", "pid_splits.json")]
        if not all(is_file(path) for path in paths):
            raise self.missing()
        return paths

    def entries(self) -> Iterator[Listed]:
        """Of the test split."""
        path, splits = self.found()
        problems = read_json(path)
        for key in field(splits, read_json(splits), SPLIT, list):
            one = field(path, problems, str(key), dict)
            if not one.get("image"):
                continue
            choices = field(path, one, "choices", list)
            right = field(path, one, "answer", int)
            if not 0 <= right < len(choices) <= len(LETTERS):
                raise VlmpruneError(
                    f"{path} has no choice {right} among the {len(choices)} of question {key}; "
                    "give it as it is published."
                )
            context = str(one.get("hint") or "").strip()
            lines = [f"Context: {context}"] if context else []
            lines.append(field(path, one, "question", str))
            lines += [f"{a}. {choice}" for a, choice in zip(LETTERS, choices, strict=False)]
            image = f"{key}/{field(path, one, 'image', str)}"
            yield Listed(
                id=str(key),
                picture=image,
                files=below(_PLACES, image),
                question="\n".join(lines) + SUFFIX,
                answers=(LETTERS[right],),
                kind=str(one.get("subject") or ""),
            )

    def score(self, sample: Sample, text: str) -> float:
        """1 for the right option's letter."""
        return float(option_of(text) == sample.answers[0])
