"""TextVQA: questions about writing in the picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.study.tasks.base import Sample
from vlmprune.study.tasks.local import WORD_OR_PHRASE, Listed, Local, below, field, read_json
from vlmprune.study.tasks.vqa_words import textvqa_accuracy

_FILE = "TextVQA_0.5.1_val.json"
_PLACES = ("train_images", "train_val_images/train_images", "images", ".")


@dataclass(frozen=True)
class TextVqa(Local):
    """Singh et al., "Towards VQA Models That Can Read" (1904.08920).

    Format: the published `TextVQA_0.5.1_val.json`, whose "data" lists objects with "question_id",
    "question", "image_id" and ten "answers". Pictures are `train_images/<image_id>.jpg`, where the
    validation set's are published too.

    Prompt: the question and LLaVA's "Answer the question using a single word or phrase."
    LLaVA's own prompts also name words that a reader of text found ("Reference OCR token"); those
    are not part of the set and are not given here, so figures are not to be set beside LLaVA's.

    Score: VQA accuracy after TextVQA's own normalisation (see `textvqa_accuracy`).
    """

    name: ClassVar[str] = "textvqa"
    names: ClassVar[str] = f"{_FILE} and the pictures in train_images"

    def found(self) -> list[Path]:
        """The file with the questions."""
        return [self.pick(_FILE)]

    def entries(self) -> Iterator[Listed]:
        """Of the file."""
        [path] = self.found()
        for number, one in enumerate(field(path, read_json(path), "data", list)):
            image = str(field(path, one, "image_id"))
            answers = one.get("answers", [])
            if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
                raise VlmpruneError(
                    f"{path} has an entry without usable 'answers'; give it as it is published."
                )
            yield Listed(
                id=str(one.get("question_id", number)),
                picture=image,
                files=below(_PLACES, f"{image}.jpg"),
                question=field(path, one, "question", str) + WORD_OR_PHRASE,
                answers=tuple(answers),
            )

    def score(self, sample: Sample, text: str) -> float:
        """Its accuracy against ten people's answers."""
        return textvqa_accuracy(text, sample.answers)
