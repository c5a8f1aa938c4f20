"""A folder of pictures with a file of questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.files import is_file, path_of
from vlmprune.io.listed import entries
from vlmprune.study.tasks.base import Sample, Task, first
from vlmprune.study.tasks.scorers import same_words

QUESTIONS = "questions.json"
_FORM = '[{"image": "a.jpg", "question": "…", "answers": ["…"], "kind": "…"}, …]'


@dataclass(frozen=True)
class Folder(Task):
    """Questions about one's own pictures.

    `questions.json` in the folder is a list of objects with "image" (a file of the folder, or a
    list of files for a question about several), "question" and, if they are known, "answers" (one
    text or a list of all that are right) and "kind". Without answers, methods can be compared by
    how often they answer as the unpruned model does.

    An answer is right if it has the same words as a true one; case and punctuation do not count.

    Attributes:
        folder: where the pictures and the file are.
    """

    folder: Path

    name: ClassVar[str] = "folder"

    @property
    def label(self) -> str:
        """The task and its folder."""
        return f"{self.name}:{self.folder}"

    def samples(self, limit: int | None = None) -> list[Sample]:
        """The questions, in the file's order but those about the same pictures together."""
        path = path_of(self.folder) / QUESTIONS
        found: dict[tuple[Path, ...], list[Sample]] = {}
        for number, one in enumerate(entries(path, "questions", _FORM)):
            sample = _sample(path, number, one)
            found.setdefault(sample.images, []).append(sample)  # type: ignore[arg-type]
        return first([sample for group in found.values() for sample in group], limit)

    def score(self, sample: Sample, text: str) -> float:
        """1 for one of the true answers."""
        return same_words(text, sample.answers)


def _sample(path: Path, number: int, one: Any) -> Sample:
    """Entry `number` of a questions file.

    Raises:
        VlmpruneError: something of it is missing or of another type, or a picture is not there.
    """
    fields = one if isinstance(one, dict) else {}
    images, answers = _texts(fields.get("image")), _texts(fields.get("answers", []))
    question, kind = fields.get("question"), fields.get("kind", "")
    for name, usable in (
        ("image", bool(images)),
        ("answers", answers is not None),
        ("question", isinstance(question, str) and bool(question.strip())),
        ("kind", isinstance(kind, str)),
    ):
        if not usable:
            raise VlmpruneError(
                f"entry {number + 1} of {path} has no usable {name!r}; write it as {_FORM}."
            )
    assert images and answers is not None
    files = tuple(path.parent / name for name in images)
    for file in files:
        if not is_file(file):
            raise VlmpruneError(
                f"entry {number + 1} of {path} names {str(file)!r}, which does not exist; give "
                "pictures relative to the questions file."
            )
    return Sample(
        id=str(number),
        images=files,
        question=str(question),
        answers=tuple(answers),
        kind=str(kind),
        group="|".join(images),
    )


def _texts(value: Any) -> list[str] | None:
    """One text or several as a list; None for anything else."""
    if isinstance(value, str):
        return [value]
    usable = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return value if usable else None
