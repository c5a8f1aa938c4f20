"""Scorers: a text against the true answers, 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Sequence


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


def _parts(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[.,]", text.lower().rstrip(" .,"))]
