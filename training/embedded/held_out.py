"""Write the held-out scenes that ship with the model, with their questions.

    python held_out.py --assets A --folder packages/vlmprune-embedded/src/vlmprune_embedded/held_out

The scenes, and what is asked about each, are the first of those that `evaluate.py` asks: the test
split, with photographs, places and contents that training never saw. Nothing is left out, neither
what the model gets wrong. The validation split can be had in the same way, for settings that are
to be chosen on other scenes than they are tested on:

    python held_out.py --assets A --folder V --scenes 60 --split validation
    vlmprune search gsearch --task folder:V

So can scenes of any other seed, of the same photographs, on which nothing was ever chosen:

    python held_out.py --assets A --folder N --seed 20
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import typer
from assets import HELD_OUT_PHOTOS, Assets
from batches import fixed_questions
from features import SEEDS, photos
from scenes import scene

QUALITY = 85
"""Of the JPEG files, whose colours keep their full resolution."""


def photo_of(index: int, split: str, seed: int) -> str:
    """The photograph of a scene: what `scenes.scene` draws first."""
    names = photos(split)
    return names[int(np.random.default_rng([seed, index]).integers(len(names)))]


def main(
    assets: Annotated[Path, typer.Option(help="folder of the emoji package, fetched if absent")],
    folder: Annotated[Path, typer.Option(help="where pictures and scenes.json go")],
    scenes: Annotated[int, typer.Option(help="how many, from the first")] = 120,
    split: Annotated[str, typer.Option(help="test; or validation, as a folder task")] = "test",
    seed: Annotated[int | None, typer.Option(help="another seed, as a folder task")] = None,
) -> None:
    """Write the pictures and `scenes.json`; of other scenes than test's own `questions.json`."""
    pictures = Assets(assets)
    drawn = SEEDS[split] if seed is None else seed
    if seed in SEEDS.values():
        raise typer.BadParameter(
            f"seed {seed} is a split's own; use one above {max(SEEDS.values())}."
        )
    made = [scene(i, drawn, photos(split), pictures) for i in range(scenes)]
    asked = fixed_questions(SimpleNamespace(placed=[one.placed for one in made]), drawn)
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for index, (one, questions) in enumerate(zip(made, asked, strict=True)):
        name = f"{index:03d}.jpg"
        one.image.save(folder / name, quality=QUALITY, subsampling=0, optimize=True)
        photo = photo_of(index, split, drawn)
        listed.append(
            {
                "file": name,
                "photo": f"{photo} (scikit-image)",
                "licence": HELD_OUT_PHOTOS[photo].licence,
                "symbols": "Noto Color Emoji artwork by Google, Apache-2.0",
                "questions": [
                    {"kind": q.kind, "question": q.text, "answer": q.answer} for q in questions
                ],
            }
        )
    if split == "test" and seed is None:
        (folder / "scenes.json").write_text(json.dumps(listed, indent=1) + "\n")
    else:
        flat = [
            {"image": one["file"], "kind": q["kind"], "question": q["question"]}
            | {"answers": [q["answer"]]}
            for one in listed
            for q in one["questions"]
        ]
        (folder / "questions.json").write_text(json.dumps(flat, indent=1) + "\n")
    total = sum(file.stat().st_size for file in folder.iterdir())
    typer.echo(f"{scenes} scenes, {sum(map(len, asked))} questions, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    typer.run(main)
