"""Make the demonstration scenes that ship with the model, and what is asked about them.

    python demo.py --assets A --folder packages/vlmprune-embedded/src/vlmprune_embedded/scenes

The photographs are held out of training, the placements chosen by hand here. The pictures are 448
pixels a side, so that they are good to look at; the processor halves them. Questions that the
packaged model gets wrong are left out and named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from assets import HELD_OUT_PHOTOS, Assets
from evaluate import literal
from PIL import Image
from questions import KINDS, Question, ask
from scenes import SIDE, Placed, compose

from vlmprune import embedded
from vlmprune.files import write

SCALE = 2


@dataclass(frozen=True)
class Demo:
    """One scene: photograph, crop (left, top, side in its pixels) and what lies where."""

    name: str
    photo: str
    crop: tuple[int, int, int]
    cells: str
    seed: int


DEMOS = (
    Demo(
        "coffee",
        "coffee",
        (100, 0, 400),
        "cat - 42 apple / - star - - / banana - - star / guitar - rocket -",
        1,
    ),
    Demo(
        "astronaut",
        "astronaut",
        (0, 0, 512),
        "balloon - - rocket / - - - balloon / 87 - - balloon / dog - frog -",
        2,
    ),
    Demo(
        "launch",
        "rocket",
        (60, 0, 427),
        "- bird bird - / house - - boat / - 35 - tree / car - umbrella -",
        3,
    ),
    Demo(
        "grass",
        "grass",
        (0, 0, 420),
        "sunflower - ball - / - mushroom - lion / mushroom - 64 - / - burger - mushroom",
        4,
    ),
)


def placed(cells: str) -> list[Placed]:
    """Read `a - 42 b / ...`: rows by `/`, empty cells by `-`, numbers are signs."""
    found = []
    for r, row in enumerate(cells.split("/")):
        for c, word in enumerate(row.split()):
            if word.isdigit():
                found.append(Placed(r, c, "sign", int(word)))
            elif word != "-":
                found.append(Placed(r, c, word))
    return found


def questions(things: list[Placed], seed: int) -> list[Question]:
    """One or two questions of every kind about a scene, always the same."""
    rng = np.random.default_rng(seed)
    wants = [("at", 1), ("at", 0), ("where", None), ("presence", 1), ("presence", 0), ("count", 3)]
    wants += [("count", 2), ("count", 1), ("left", 1), ("left", 0), ("above", 1), ("above", 0)]
    drawn = [ask(kind, things, rng, want) for kind, want in wants]
    drawn += [ask(kind, things, rng) for kind in KINDS[-2:]]
    return [q for q in drawn if q is not None]


def main(
    assets: Annotated[Path, typer.Option(help="folder of the emoji package, fetched if absent")],
    folder: Annotated[Path, typer.Option(help="where pictures and scenes.json go")],
) -> None:
    """Write the pictures and `scenes.json`."""
    model, processor = embedded.load()
    pictures = Assets(assets)
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for demo in DEMOS:
        left, top, side = demo.crop
        photo = pictures.photo(demo.photo).crop((left, top, left + side, top + side))
        base = photo.resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.LANCZOS)
        things = placed(demo.cells)
        made = compose(base, things, pictures, np.random.default_rng(demo.seed), SCALE)
        made.image.save(folder / f"{demo.name}.jpg", quality=93)
        asked = []
        shown = Image.open(folder / f"{demo.name}.jpg")
        for q in questions(things, demo.seed):
            said = literal(model, processor, shown, q)
            if said == q.answer:
                asked.append({"kind": q.kind, "question": q.text, "answer": q.answer})
            else:
                typer.echo(f"{demo.name}: left out {q.text!r}, answered {said!r}, not {q.answer!r}")
        listed.append(
            {
                "file": f"{demo.name}.jpg",
                "photo": f"{demo.photo} (scikit-image)",
                "licence": HELD_OUT_PHOTOS[demo.photo].licence,
                "symbols": "Noto Color Emoji artwork by Google, Apache-2.0",
                "questions": asked,
            }
        )
    write(folder / "scenes.json", json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
