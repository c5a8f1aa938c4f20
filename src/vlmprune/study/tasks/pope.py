"""POPE: whether an object is in the picture, yes or no."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import ClassVar

from vlmprune.files import is_file
from vlmprune.study.tasks.answered import Answered
from vlmprune.study.tasks.base import Sample
from vlmprune.study.tasks.local import WORD_OR_PHRASE, Listed, Local, below, field, read_lines
from vlmprune.study.tasks.scorers import pope_says, yes_no

SPLITS = ("random", "popular", "adversarial")
_PLACES = (".", "val2014", "images", "../val2014", "../images")


@dataclass(frozen=True)
class Pope(Local):
    """Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (2305.10355).

    Format: the authors' `output/coco/coco_pope_{random,popular,adversarial}.json` (AoiDragon/POPE),
    JSON lines with "question_id", "image", "text" and "label"; the kind of a question is its split.
    Pictures are COCO's val2014, in the same folder, in `val2014` or `images`, or beside the folder.
    One split alone is asked if its file is given.

    Prompt: the question and LLaVA's "Answer the question using a single word or phrase."

    Score: the authors' `evaluate.py` (see `pope_says`). `summary` has its figures in percent: as
    the mean of the splits, which papers print, and the F1 of each.
    """

    name: ClassVar[str] = "pope"
    names: ClassVar[str] = (
        "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json and the "
        "pictures in val2014"
    )

    def found(self) -> list[Path]:
        """The files of the splits that there are."""
        if is_file(self.given):
            return [self.given]
        for place in (".", "coco"):
            paths = [self.folder / place / f"coco_pope_{split}.json" for split in SPLITS]
            there = [path for path in paths if is_file(path)]
            if there:
                return there
        raise self.missing()

    def entries(self) -> Iterator[Listed]:
        """Of all splits."""
        for path in self.found():
            split = next((name for name in SPLITS if name in path.stem), path.stem)
            for one in read_lines(path):
                image = field(path, one, "image", str)
                yield Listed(
                    id=f"{split}-{field(path, one, 'question_id')}",
                    picture=image,
                    files=below(_PLACES, image),
                    question=field(path, one, "text", str) + WORD_OR_PHRASE,
                    answers=(field(path, one, "label", str),),
                    kind=split,
                )

    def score(self, sample: Sample, text: str) -> float:
        """1 for the right one of yes and no."""
        # As the authors have it, any label but "no" is a yes.
        return float((pope_says(text) == "no") == (sample.answers[0] == "no"))

    def summary(self, results: Sequence[Answered]) -> dict[str, float]:
        """In percent: accuracy, precision, recall, F1 and share of yes; F1 of each split."""
        splits: dict[str, list[Answered]] = {}
        for one in results:
            splits.setdefault(one.kind, []).append(one)
        found = {}
        for split, some in splits.items():
            said = [pope_says(one.answer) for one in some]
            other = {"yes": "no", "no": "yes"}
            pairs = zip(said, some, strict=True)
            found[split] = yes_no(said, [a if one.score else other[a] for a, one in pairs])
        if not found:
            return {}
        several = ", mean of splits" if len(found) > 1 else ""
        figures = {
            title + several: 100 * mean(getattr(one, name) for one in found.values())
            for title, name in {
                "accuracy %": "accuracy",
                "precision %": "precision",
                "recall %": "recall",
                "F1 %": "f1",
                "yes ratio %": "yes",
            }.items()
        }
        if several:
            figures |= {f"F1 %, {split}": 100 * one.f1 for split, one in found.items()}
        return figures
