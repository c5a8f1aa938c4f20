"""Questions about a scene, in words, with their true answers and the way they are scored.

Kinds, each with two wordings:

    at        what is in row two column three?        a cat. | a sign. | nothing.
    where     where is the cat?                       row two column three.
    presence  is there a cat?                         yes. | no.
    count     how many cats are there?                zero. ... four.
    left      what is left of the cat?                a dog. | nothing.
    above     what is above the cat?                  a dog. | nothing.
    read      which number is on the sign?            forty two.
    describe  describe the picture.                   cat, nothing, nothing, star. nothing, ...
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from export import SPECIAL
from scenes import GRID, NAMES, Placed

KINDS = ("at", "where", "presence", "count", "left", "above", "read", "describe")
NOTHING = "nothing"
PLACES = ("one", "two", "three", "four")
COUNTS = ("zero", *PLACES)
UNITS = ("", *PLACES, "five", "six", "seven", "eight", "nine")
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

WORDINGS: dict[str, tuple[str, str]] = {
    "at": ("what is in {place}?", "which symbol is in {place}?"),
    "where": ("where is the {name}?", "in which cell is the {name}?"),
    "presence": ("is there {a_name}?", "can you see {a_name}?"),
    "count": ("how many {names} are there?", "count the {names}."),
    "left": ("what is left of the {name}?", "what is to the left of the {name}?"),
    "above": ("what is above the {name}?", "what is over the {name}?"),
    "read": ("what number is in {place}?", "which number is on the sign?"),
    "describe": ("describe the picture.", "list all the cells."),
}
BALANCE: dict[str, int] = {"at": 3, "presence": 2, "count": 5, "left": 3, "above": 3}
"""Kinds whose answers are balanced, and over how many cases (see `ask`)."""


@dataclass(frozen=True)
class Question:
    """One question with its true answer, both as the model reads and writes them.

    `cells` says where one has to look for the answer, `(row, column)` from 0: nowhere if what is
    asked for is not there.
    """

    kind: str
    text: str
    answer: str
    cells: tuple[tuple[int, int], ...] = ()


def vocabulary() -> list[str]:
    """Every word of every question and answer, after the special tokens; `##s` is the plural."""
    texts = " ".join(text for pair in WORDINGS.values() for text in pair)
    words = [word for word in split(texts) if word[0] != "{"]
    words += [*COUNTS, *UNITS[1:], *TENS[2:], *NAMES, NOTHING, "a", "an", "row", "column", "yes"]
    words += ["no", ".", ",", "?", "##s"]
    return list(dict.fromkeys([*SPECIAL, *words]))


def split(text: str) -> list[str]:
    """Words and punctuation marks of a text, as the tokenizer splits it (plurals left whole)."""
    return re.findall(r"\{\w+\}|\w+|[^\w\s]", text.lower())


def encode(text: str, words: dict[str, int]) -> list[int]:
    """Token numbers of a text; the shipped tokenizer gives the same."""
    found: list[int] = []
    for word in split(text):
        if word in words:
            found.append(words[word])
        else:
            found += [words[word[:-1]], words["##s"]]
    return found


def article(name: str) -> str:
    """`a cat`, `an apple`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def in_words(number: int) -> str:
    """20 to 99 in words, without a hyphen."""
    return f"{TENS[number // 10]} {UNITS[number % 10]}".strip()


def place(row: int, column: int) -> str:
    """`row two column three`; row and column count from 0 here and from one in words."""
    return f"row {PLACES[row]} column {PLACES[column]}"


def ask(
    kind: str, placed: Sequence[Placed], rng: np.random.Generator, want: int | None = None
) -> Question | None:
    """Draw a question of a kind about a scene, or `None` where the scene allows none.

    Args:
        kind: one of `KINDS`.
        placed: what the scene holds.
        rng: draws the cell, the symbol and the wording.
        want: which case of `BALANCE` it should be: for `count` the number itself; for `presence`
            1 for yes; for the others 0 for "nothing" and more for something. `None`: draw it, and
            take another case where the scene lacks it.
    """
    if kind in BALANCE and want is None:
        first = int(rng.integers(BALANCE[kind]))
        tries = [first, *(w for w in rng.permutation(BALANCE[kind]).tolist() if w != first)]
        made = (ask(kind, placed, rng, w) for w in tries)
        return next((q for q in made if q is not None), None)
    grid = {(p.row, p.column): p for p in placed}
    often = Counter(p.name for p in placed)
    once = [p for p in placed if often[p.name] == 1]
    fields: dict[str, str] = {}
    look: list[tuple[int, int]] = []
    wording = int(rng.integers(2))

    def pick(options: Sequence):
        return options[int(rng.integers(len(options)))] if options else None

    def name_fields(name: str) -> dict[str, str]:
        return {"name": name, "a_name": article(name), "names": f"{name}s"}

    def called(thing: Placed | None) -> str:
        return f"{article(thing.name)}." if thing else f"{NOTHING}."

    if kind == "at":
        cells = [(r, c) for r in range(GRID) for c in range(GRID) if ((r, c) in grid) == bool(want)]
        cell = pick(cells)
        if cell is None:
            return None
        fields["place"], answer = place(*cell), called(grid.get(cell))
        look = [cell]
    elif kind == "where":
        thing = pick(once)
        if thing is None:
            return None
        fields, answer = name_fields(thing.name), f"{place(thing.row, thing.column)}."
        look = [(thing.row, thing.column)]
    elif kind in ("presence", "count"):
        wanted = [n for n in NAMES if (often[n] > 0 if kind == "presence" else often[n]) == want]
        name = pick(wanted)
        if name is None:
            return None
        fields = name_fields(name)
        look = [(p.row, p.column) for p in placed if p.name == name]
        answer = ("yes." if want else "no.") if kind == "presence" else f"{COUNTS[often[name]]}."
    elif kind in ("left", "above"):
        down, right = (0, 1) if kind == "left" else (1, 0)
        inner = [p for p in once if (p.column if kind == "left" else p.row) > 0]
        thing = pick([p for p in inner if ((p.row - down, p.column - right) in grid) == bool(want)])
        if thing is None:
            return None
        fields = name_fields(thing.name)
        look = [(thing.row, thing.column)]
        answer = called(grid.get((thing.row - down, thing.column - right)))
    elif kind == "read":
        signs = [p for p in placed if p.number is not None]
        thing = pick(signs)
        if thing is None or thing.number is None:
            return None
        wording = wording if len(signs) == 1 else 0
        fields["place"], answer = place(thing.row, thing.column), f"{in_words(thing.number)}."
        look = [(thing.row, thing.column)]
    elif kind == "describe":
        rows = (
            ", ".join(grid[r, c].name if (r, c) in grid else NOTHING for c in range(GRID))
            for r in range(GRID)
        )
        answer = " ".join(f"{row}." for row in rows)
        look = [(r, c) for r in range(GRID) for c in range(GRID)]
    else:
        raise ValueError(f"unknown kind {kind!r}: one of {', '.join(KINDS)}")
    return Question(kind, WORDINGS[kind][wording].format(**fields), answer, tuple(look))


def prompt(question: str, image: bool = True) -> str:
    """The text that the processor gets: LLaVA-1.5's form."""
    picture = "<image>\n" if image else ""
    return f"USER: {picture}{question} ASSISTANT:"


def right(question: Question, answer: str) -> bool:
    """Whether an answer is the true one: all words, in order; case and punctuation do not count."""
    return re.findall(r"\w+", answer.lower()) == re.findall(r"\w+", question.answer)
