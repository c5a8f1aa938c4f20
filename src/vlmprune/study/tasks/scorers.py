"""Scorers: a text against the true answers, 0 to 1.

Those of the standard sets are re-stated from what their evaluation code does; see each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def same_words(text: str, answers: Sequence[str]) -> float:
    """1 where the text has all words of one of the answers, in order, and no others."""
    return float(any(words(text) == words(answer) for answer in answers))


def same_parts(text: str, answer: str) -> float:
    """Share of an answer's parts, parted by commas and full stops, that the text has in place."""
    said, true = (_parts(one) for one in (text, answer))
    hits = sum(a == b for a, b in zip(said, true, strict=False))
    return hits / len(true) if true else 0.0


def pope_says(text: str) -> str:
    """ "yes" or "no", as POPE's `evaluate.py` reads an answer.

    No if the first sentence has the word no, No or not; commas do not count. Anything else, even
    nothing, is a yes.
    """
    said = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(said) else "yes"


def mme_says(text: str) -> str:
    """ "yes", "no" or "other", as MME's `calculation.py` reads an answer.

    What counts is whether the first four characters, in lower case, have a yes, or else a no.
    """
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def gqa_words(text: str) -> str:
    """An answer as LLaVA hands it to GQA's `eval.py`: lower case, no full stops at the end."""
    return text.rstrip(".").lower()


def option_of(text: str) -> str | None:
    """The letter that a text chooses, as LLaVA's `eval_science_qa.py` finds it; None without one.

    The text is the letter, A to E; or it begins with the letter, a full stop and a space, as which
    a line end counts; or it says "The answer is" and the letter.
    """
    line = text.replace("\n", ". ")
    if line.strip() in _LETTERS:
        return line.strip()
    if line[:1] in _LETTERS and line[1:3] == ". ":
        return line[:1]
    # One with a full stop goes before any without.
    found = _CHOSEN_STOP.search(line) or _CHOSEN.search(line)
    return found[1] if found else None


_LETTERS = tuple("ABCDE")
_CHOSEN_STOP = re.compile(r"The answer is ([A-E])\.")
_CHOSEN = re.compile(r"The answer is ([A-E])")


@dataclass(frozen=True)
class YesNo:
    """Figures of a set of yes-or-no questions; "yes" is what is to be found.

    Attributes:
        accuracy: share of right answers.
        precision: of those answered yes, the share that is one; 0 without any.
        recall: of those that are yes, the share answered so; 0 without any.
        f1: their harmonic mean; 0 where both are.
        yes: share answered yes.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float


def yes_no(said: Sequence[str], true: Sequence[str]) -> YesNo:
    """The figures of at least one answer; anything but "yes" is a no."""
    pairs = [(a == "yes", b == "yes") for a, b in zip(said, true, strict=True)]
    both = pairs.count((True, True))
    said_yes, true_yes = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    return YesNo(
        accuracy=sum(a == b for a, b in pairs) / len(pairs),
        precision=both / said_yes if said_yes else 0.0,
        recall=both / true_yes if true_yes else 0.0,
        f1=2 * both / (said_yes + true_yes) if both else 0.0,
        yes=said_yes / len(pairs),
    )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[.,]", text.lower().rstrip(" .,"))]
