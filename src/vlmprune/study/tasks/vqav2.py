"""VQAv2 and sets in its format: open questions with ten people's answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.files import is_file
from vlmprune.study.tasks.base import Sample
from vlmprune.study.tasks.local import WORD_OR_PHRASE, Listed, Local, below, field, read_json
from vlmprune.study.tasks.vqa_words import textvqa_words, vqa_accuracy

_FILE = "v2_OpenEnded_mscoco_val2014_questions.json"


@dataclass(frozen=True)
class Vqav2(Local):
    """Goyal et al., "Making the V in VQA Matter" (1612.00837).

    Format: the published pair `v2_OpenEnded_mscoco_val2014_questions.json` ("questions": a list of
    "question_id", "image_id", "question"; and "data_subtype") and
    `v2_mscoco_val2014_annotations.json` ("annotations": a list of "question_id", "answer_type",
    which is the kind, and ten "answers"). Pictures are COCO's, as
    `val2014/COCO_val2014_000000000042.jpg`. The questions file of another set in this format may
    be given; its annotations have the same name without "OpenEnded_" and with "annotations" for
    "questions". A test set has none, so that only agreement can be told.

    Prompt: the question and LLaVA's "Answer the question using a single word or phrase."

    Score: the authors' `vqaEval.py` (see `vqa_accuracy`), for which LLaVA's conversion of answers
    normalises them first.
    """

    name: ClassVar[str] = "vqav2"
    names: ClassVar[str] = (
        f"{_FILE}, v2_mscoco_val2014_annotations.json and the pictures in val2014"
    )

    def found(self) -> list[Path]:
        """Questions and, but for a test set, annotations."""
        questions = self.pick(_FILE)
        name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
        annotations = questions.with_name(name)
        if is_file(annotations) and name != questions.name:
            return [questions, annotations]
        if "test" in questions.name:
            return [questions]
        raise VlmpruneError(
            f"{questions} has no {name} beside it, so that no answer is known; {self._expects()}."
        )

    def entries(self) -> Iterator[Listed]:
        """Of the questions file."""
        questions, *rest = self.found()
        known: dict[int, tuple[tuple[str, ...], str]] = {}
        for path in rest:
            for one in field(path, read_json(path), "annotations", list):
                people = field(path, one, "answers", list)
                given = tuple(field(path, person, "answer", str) for person in people)
                key = field(path, one, "question_id", int)
                known[key] = given, str(one.get("answer_type") or "")
        content: Any = read_json(questions)
        subtype = field(questions, content, "data_subtype", str)
        # The development part of a test set has that set's pictures.
        subtype = subtype.replace("test-dev", "test")
        for one in field(questions, content, "questions", list):
            key = field(questions, one, "question_id", int)
            if rest and key not in known:
                raise VlmpruneError(
                    f"{rest[0]} has nothing about question {key}; give the file that belongs to "
                    f"{questions.name}."
                )
            answers, kind = known.get(key, ((), ""))
            image = f"COCO_{subtype}_{field(questions, one, 'image_id', int):012d}.jpg"
            yield Listed(
                id=str(key),
                picture=image,
                files=below((subtype, "images", "."), image),
                question=field(questions, one, "question", str) + WORD_OR_PHRASE,
                answers=answers,
                kind=kind,
            )

    def score(self, sample: Sample, text: str) -> float:
        """Its accuracy against ten people's answers."""
        return vqa_accuracy(textvqa_words(text), sample.answers)
