"""MME: two yes-or-no questions about each picture, in fourteen categories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.files import is_folder
from vlmprune.study.tasks.answered import Answered
from vlmprune.study.tasks.base import Sample
from vlmprune.study.tasks.local import WORD_OR_PHRASE, Listed, Local
from vlmprune.study.tasks.scorers import mme_says

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_ROOTS = (".", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark")
_SUFFIXES = (".jpg", ".png", ".jpeg")
_ASKS = "Please answer yes or no."


@dataclass(frozen=True)
class Mme(Local):
    """Fu et al., "MME" (2306.13394).

    Format: the published folders, one a category. A text file for each picture has a line for each
    of its two questions: the question, a tab, and Yes or No. Text files and pictures lie in the
    category's folder, or in its `questions_answers_YN` and `images`. The kind is the category.

    Prompt: as LLaVA's evaluation has it, "Answer the question using a single word or phrase." in
    place of the question's own "Please answer yes or no."

    Score: the authors' `calculation.py` (see `mme_says`). `summary` has its points: for each
    category the percentage of right answers and that of pictures with both answers right, added
    up (0 to 200); and their sums, which are the scores of perception and cognition.
    """

    name: ClassVar[str] = "mme"
    names: ClassVar[str] = (
        "a folder a category (existence, count, …), each with pictures and text files of questions"
    )

    def found(self) -> list[Path]:
        """The text files, category by category."""
        paths = []
        for root in _ROOTS:
            for category in (*PERCEPTION, *COGNITION):
                folder = self.given / root / category
                inner = folder / "questions_answers_YN"
                paths += sorted((inner if is_folder(inner) else folder).glob("*.txt"))
            if paths:
                return paths
        raise self.missing()

    def entries(self) -> Iterator[Listed]:
        """Of all categories that are there."""
        for path in self.found():
            split = path.parent.name == "questions_answers_YN"
            folder = path.parent.parent if split else path.parent
            picture = f"{folder.name}/{path.stem}"
            places = (folder / "images", folder) if split else (folder,)
            files = tuple(
                str((place / (path.stem + end)).relative_to(self.given))
                for place in places
                for end in _SUFFIXES
            )
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise VlmpruneError(
                    f"{path} cannot be read ({error}); download it again."
                ) from error
            for number, line in enumerate(filter(str.strip, lines)):
                question, _, answer = line.rpartition("\t")
                if not question or answer.strip().lower() not in ("yes", "no"):
                    raise VlmpruneError(
                        f"line {number + 1} of {path} is no question, tab, and Yes or No; give it "
                        "as it is published."
                    )
                yield Listed(
                    id=f"{picture}-{number}",
                    picture=picture,
                    files=files,
                    question=question.replace(_ASKS, "").strip() + WORD_OR_PHRASE,
                    answers=(answer.strip().lower(),),
                    kind=folder.name,
                )

    def score(self, sample: Sample, text: str) -> float:
        """1 for the right one of yes and no."""
        return float(mme_says(text) == sample.answers[0])

    def summary(self, results: Sequence[Answered]) -> dict[str, float]:
        """Points by category, and their sums."""
        figures: dict[str, float] = {}
        points = _points(results)
        for name, kinds in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if any(kind in points for kind in kinds):
                figures[name] = sum(points.get(kind, 0.0) for kind in kinds)
        if figures:
            figures["total"] = sum(figures.values())
        return figures | points


def _points(results: Sequence[Answered]) -> dict[str, float]:
    """By category: percentage of right answers plus that of pictures with both right."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in results:
        if one.score is not None:
            found.setdefault(one.kind, {}).setdefault(one.group, []).append(one.score)
    points = {}
    for kind, pictures in found.items():
        scores = [score for some in pictures.values() for score in some]
        # A limit may have cut off a picture's second question.
        whole = [sum(some) == 2 for some in pictures.values() if len(some) == 2]
        plus = sum(whole) / len(whole) if whole else 0.0
        points[kind] = 100 * (sum(scores) / len(scores) + plus)
    return points
