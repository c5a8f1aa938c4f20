"""Clips: four small pictures one after the other, over which symbols move, with questions.

A picture has 112 pixels a side, so that the embedded model sees it as 8 x 8 visual tokens; four of
them in one prompt have as many tokens as one scene. Each holds 2 x 2 cells of the size that scenes
have. Everything follows from `(seed, index)`: the same pair gives the same clip on any machine.

Questions keep to the words that the embedded model knows: the pictures are called picture one to
picture four. Kinds:

    describe  describe the picture.                       cat, nothing, nothing, star. ...
    where     where is the cat in picture two?            row two column one.
    end       where is the cat in picture four?           row one column two.
    at        what is in row one column two in picture three?      a cat. | nothing.
    presence  is there a cat in picture two?              yes. | no.
    moves     how many cells is the cat in?               one. ... four.
    which     which symbol is in two cells?               a cat.
    left      is the cat in picture four left of the cat in picture one?    yes. | no.
    above     is the cat in picture four above the cat in picture one?      yes. | no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from assets import SYMBOLS, Assets
from PIL import Image
from questions import NOTHING, PLACES, Question, article, place
from scenes import CELL, background, symbol

FRAMES = 4
GRID = 2
SIDE = GRID * CELL
CELLS = GRID * GRID
KINDS = ("describe", "where", "end", "at", "presence", "moves", "which", "left", "above")
WORDINGS: dict[str, tuple[str, str]] = {
    "describe": ("describe the picture.", "list all the cells."),
    "where": ("where is the {name} in {frame}?", "in which cell is the {name} in {frame}?"),
    "end": ("where is the {name} in {frame}?", "in which cell is the {name} in {frame}?"),
    "at": ("what is in {place} in {frame}?", "which symbol is in {place} in {frame}?"),
    "presence": ("is there {a_name} in {frame}?", "can you see {a_name} in {frame}?"),
    "moves": ("how many cells is the {name} in?", "count the cells of the {name}."),
    "which": ("which symbol is in {cells}?", "what is in {cells}?"),
    "left": (
        "is the {name} in picture four left of the {name} in picture one?",
        "is the {name} in picture four to the left of the {name} in picture one?",
    ),
    "above": (
        "is the {name} in picture four above the {name} in picture one?",
        "is the {name} in picture four over the {name} in picture one?",
    ),
}
BALANCE: dict[str, int] = {"at": 2, "presence": 2, "moves": 3, "which": 2, "left": 2, "above": 2}
"""Kinds whose answers are balanced, and over how many cases (see `ask`)."""
SHIFT = 2
"""Pixels by which a symbol may be off its place in its cell, from picture to picture."""


@dataclass(frozen=True)
class Thing:
    """One symbol and where it is.

    Attributes:
        name: of the symbol; no other thing of the clip has it.
        path: its cell in each picture, counted row by row from 0; None where it is not there.
    """

    name: str
    path: tuple[int | None, ...]

    @property
    def cells(self) -> int:
        """In how many different cells it is in the course of the clip."""
        return len({cell for cell in self.path if cell is not None})


@dataclass
class Clip:
    """Pictures and what is in them.

    Attributes:
        frames: RGB, 112 x 112 pixels each, in order.
        things: one to three.
    """

    frames: list[Image.Image] = field(repr=False)
    things: list[Thing]

    def at(self, frame: int, cell: int) -> str:
        """Name of what is in a cell of a picture; `nothing` if it is empty."""
        return next((t.name for t in self.things if t.path[frame] == cell), NOTHING)


def path(rng: np.random.Generator) -> tuple[int | None, ...]:
    """A way through the pictures: still, moving from cell to cell, or there for a while only."""
    here = int(rng.integers(CELLS))
    moves = rng.random() < 0.6
    steps = rng.random(FRAMES - 1) < 0.6
    if moves and not steps.any():
        steps[int(rng.integers(FRAMES - 1))] = True
    found: list[int | None] = [here]
    for step in steps.tolist():
        if moves and step:
            row, column = divmod(here, GRID)
            across = rng.random() < 0.5
            row, column = (row, 1 - column) if across else (1 - row, column)
            here = row * GRID + column
        found.append(here)
    if rng.random() < 0.25:
        # It comes later, or leaves early.
        count = int(rng.integers(1, FRAMES))
        gone = range(count) if rng.random() < 0.5 else range(FRAMES - count, FRAMES)
        found = [None if frame in gone else cell for frame, cell in enumerate(found)]
    return tuple(found)


def contents(rng: np.random.Generator) -> list[Thing]:
    """Draw what a clip holds: one to three things, never two in a cell at once."""
    names = rng.permutation(list(SYMBOLS)).tolist()
    wanted = int(rng.choice([1, 2, 3], p=[0.2, 0.45, 0.35]))
    things: list[Thing] = []
    while len(things) < wanted:
        way = path(rng)
        taken = {(f, t.path[f]) for t in things for f in range(FRAMES)}
        if not any((f, cell) in taken for f, cell in enumerate(way) if cell is not None):
            things.append(Thing(names.pop(), way))
    return things


def compose(
    base: Image.Image, things: Sequence[Thing], assets: Assets, rng: np.random.Generator
) -> list[Image.Image]:
    """Draw the things onto a copy of `base` (112 pixels a side) for each picture."""
    frames = [base.copy() for _ in range(FRAMES)]
    for thing in things:
        part = symbol(assets.symbol(thing.name), rng)
        room = np.array([CELL - part.width, CELL - part.height])
        rest = rng.integers(0, room + 1)
        for frame, cell in zip(frames, thing.path, strict=True):
            off = np.clip(rest + rng.integers(-SHIFT, SHIFT + 1, size=2), 0, room)
            if cell is not None:
                row, column = divmod(cell, GRID)
                at = (column * CELL + int(off[0]), row * CELL + int(off[1]))
                frame.paste(part, at, part)
    return frames


def clip(index: int, seed: int, photos: Sequence[str], assets: Assets) -> Clip:
    """Clip number `index` of the set `seed`, on one of the named photographs."""
    # The last number keeps clips apart from the scenes of the same seed.
    rng = np.random.default_rng([seed, index, FRAMES])
    base = background(assets.photo(photos[int(rng.integers(len(photos)))]), rng)
    x, y = (int(v) for v in rng.integers(0, base.width - SIDE + 1, size=2))
    things = contents(rng)
    return Clip(compose(base.crop((x, y, x + SIDE, y + SIDE)), things, assets, rng), things)


def ask(
    kind: str, made: Clip, rng: np.random.Generator, want: int | None = None
) -> Question | None:
    """Draw a question of a kind about a clip, or `None` where the clip allows none.

    Args:
        kind: one of `KINDS`.
        made: the clip.
        rng: draws the picture, the cell, the symbol and the wording.
        want: which case of `BALANCE` it should be: for `at` 0 for "nothing"; for `presence`,
            `left` and `above` 1 for yes; for `moves` and `which` how many cells, less one (2
            stands for more, too). `None`: draw it, and take another case where the clip lacks it.
    """
    if kind in BALANCE and want is None:
        first = int(rng.integers(BALANCE[kind]))
        tries = [first, *(w for w in rng.permutation(BALANCE[kind]).tolist() if w != first)]
        found = (ask(kind, made, rng, w) for w in tries)
        return next((q for q in found if q is not None), None)
    fields: dict[str, str] = {}

    def pick(options: Sequence):
        return options[int(rng.integers(len(options)))] if options else None

    if kind == "describe":
        sentences = (
            ", ".join(made.at(frame, cell) for cell in range(CELLS)) for frame in range(FRAMES)
        )
        answer = " ".join(f"{one}." for one in sentences)
    elif kind in ("where", "end"):
        frames = [FRAMES - 1] if kind == "end" else range(FRAMES - 1)
        seen = [(t, f) for t in made.things for f in frames if t.path[f] is not None]
        if not seen:
            return None
        thing, frame = pick(seen)
        fields = {"name": thing.name, "frame": called(frame)}
        answer = f"{place(*divmod(thing.path[frame], GRID))}."
    elif kind == "at":
        cells = [
            (f, c)
            for f in range(FRAMES)
            for c in range(CELLS)
            if (made.at(f, c) != NOTHING) == bool(want)
        ]
        frame, cell = pick(cells)
        fields = {"place": place(*divmod(cell, GRID)), "frame": called(frame)}
        name = made.at(frame, cell)
        answer = f"{article(name)}." if want else f"{NOTHING}."
    elif kind == "presence":
        frame = int(rng.integers(FRAMES))
        there = [t.name for t in made.things if t.path[frame] is not None]
        # What is in another picture is asked about rather than what is in none.
        elsewhere = [t.name for t in made.things if t.path[frame] is None]
        absent = elsewhere or [n for n in SYMBOLS if n not in there]
        name = pick(there if want else absent)
        if name is None:
            return None
        fields = {"a_name": article(name), "frame": called(frame)}
        answer = "yes." if want else "no."
    elif kind in ("moves", "which"):
        fits = [t for t in made.things if min(t.cells, BALANCE[kind]) - 1 == want]
        if kind == "which":
            often = [t.cells for t in made.things]
            fits = [t for t in fits if often.count(t.cells) == 1]
        thing = pick(fits)
        if thing is None:
            return None
        fields = {"name": thing.name, "cells": "one cell"}
        if thing.cells > 1:
            fields["cells"] = f"{PLACES[thing.cells - 1]} cells"
        many = f"{PLACES[thing.cells - 1]}."
        answer = many if kind == "moves" else f"{article(thing.name)}."
    elif kind in ("left", "above"):
        # Only what moved along that line, one way or the other, is asked about.
        fits = []
        for thing in made.things:
            start, stop = thing.path[0], thing.path[-1]
            if start is not None and stop is not None:
                ends = divmod(start, GRID), divmod(stop, GRID)
                axis = 1 if kind == "left" else 0
                if ends[0][axis] != ends[1][axis] and (ends[1][axis] < ends[0][axis]) == bool(want):
                    fits.append(thing)
        thing = pick(fits)
        if thing is None:
            return None
        fields = {"name": thing.name}
        answer = "yes." if want else "no."
    else:
        raise ValueError(f"unknown kind {kind!r}: one of {', '.join(KINDS)}")
    wording = WORDINGS[kind][int(rng.integers(2))]
    return Question(kind, wording.format(**fields), answer)


def clip_questions(
    made: Clip, rng: np.random.Generator, kinds: Sequence[str] = KINDS
) -> list[Question]:
    """One question of each kind that the clip allows."""
    found = (ask(kind, made, rng) for kind in kinds)
    return [question for question in found if question is not None]


def called(frame: int) -> str:
    """`picture one` for frame 0."""
    return f"picture {PLACES[frame]}"


def prompt(question: str) -> str:
    """The text that the processor gets; the pictures come with `size` of 112 pixels a side."""
    return f"USER: {'<image>' * FRAMES}\n{question} ASSISTANT:"
