"""VQA accuracy and the two ways in which answers are made comparable first.

Re-stated from what the evaluation code of VQA (GT-Vision-Lab/VQA, `vqaEval.py`) and the answer
processor of Pythia (`EvalAIAnswerProcessor`), which TextVQA and LLaVA use, do. Both take
punctuation and articles away, write small numbers as digits and put the apostrophe into
contractions; before that, TextVQA's drops commas and question marks and parts a possessive from
its word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = ("a", "an", "the")

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# A point stays only before a digit.
_POINT = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")


def _forms() -> Iterator[tuple[str, str]]:
    """Contractions without their apostrophes, and with them."""
    negated = "ai are ca could did does do had has have is might must need ought sha should was"
    negated += " were wo would"
    for word in negated.split():
        yield f"{word}nt", f"{word}n't"
    for ending, stems in {
        "ve": "could might must not should they we what where who would you",
        "d": "he how it someone something there they where who you",
        "ll": "how it somebody someone something they what who why you",
        "s": "he how somebody someone that there what when where who why",
        "re": "there they what why you",
    }.items():
        for stem in stems.split():
            yield stem + ending, f"{stem}'{ending}"
    # Two endings, of which either may lack its apostrophe.
    for word in ("could", "had", "might", "should", "would"):
        yield from _twice(f"{word}n", "t", "ve")
    subjects = "he it she somebody someone something there they we who you"
    for word in subjects.split():
        yield from _twice(word, "d", "ve")
    yield from {
        "maam": "ma'am",
        "oclock": "o'clock",
        "twas": "'twas",
        "yall": "y'all",
        "yall'll": "y'all'll",
        "y'allll": "y'all'll",
        # An apostrophe that the table takes away.
        "somebody'd": "somebodyd",
    }.items()
    for broken in ("yall'd've", "y'alld've", "y'all'dve"):
        yield broken, "y'all'd've"
    for broken in ("ow's'at", "'ows'at", "'ow'sat"):
        yield broken, "'ow's'at"


def _twice(stem: str, first: str, second: str) -> Iterator[tuple[str, str]]:
    whole = f"{stem}'{first}'{second}"
    yield f"{stem}{first}'{second}", whole
    yield f"{stem}'{first}{second}", whole


_CONTRACTIONS = dict(_forms())


def vqa_words(text: str) -> str:
    """An answer as VQA's evaluation compares it, where people's answers differ."""
    return _plain_words(_without_marks(text))


def textvqa_words(text: str) -> str:
    """An answer as TextVQA's evaluation compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(_without_marks(_one_line(text)))


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """VQA's accuracy of an answer against those of (mostly ten) people, 0 to 1.

    Each person is left out in turn, and the answer is right to a third for each of the others that
    gave it, at most to the whole; the mean over turns counts. Where all people agree, the answer
    must be theirs as it stands; else both sides are normalised first.
    """
    said, true = _one_line(text), [_one_line(answer) for answer in answers]
    if len(set(true)) > 1:
        said, true = vqa_words(said), [vqa_words(answer) for answer in true]
    return _left_out(said, true)


def textvqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """The same as TextVQA computes it, which always normalises both sides."""
    return _left_out(textvqa_words(text), [textvqa_words(answer) for answer in answers])


def _left_out(said: str, true: Sequence[str]) -> float:
    hits = true.count(said)
    turns = [min(1.0, (hits - (one == said)) / 3) for one in true]
    return sum(turns) / len(turns) if turns else 0.0


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str) -> str:
    """Without punctuation: a mark at a word's edge goes, one inside becomes a space.

    All go where a number has a comma for its thousands.
    """
    joined = _THOUSANDS.search(text) is not None
    out = text
    for mark in _MARKS:
        edge = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if edge or joined else " ")
    return _POINT.sub("", out)


def _plain_words(text: str) -> str:
    found = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in found if word not in _ARTICLES)
