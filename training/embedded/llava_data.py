"""Write training data for `vlmprune train` in LLaVA's format: scenes, and clips of them.

    python llava_data.py --assets A --out DATA --scenes 4000
    vlmprune train quecc --data DATA/scenes.json --out RUN
    python llava_data.py --assets A --out DATA --clips 1500
    vlmprune train mod --data DATA/clips.json --out RUN

    python llava_data.py --assets A --out HELD --clips 60 --held-out    # the task folder:HELD/clips

One entry a scene: a description of all cells first, then questions of every other kind, as turns
of one conversation. Photographs, seeds and styles are those of training; the held-out photographs
and the validation and test scenes are in none of it. `--held-out` writes clips on the held-out
photographs instead, with questions as the task `folder` reads them. Clips are pictures of 112
pixels a side, which the processor has to leave so: `--side 112` in training.
"""

from __future__ import annotations

import json
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from assets import Assets
from features import photos
from questions import KINDS, Question, ask
from scenes import scene

SHARES = {"plain": 0.5, "clutter": 0.4, "many signs": 0.1}
"""Styles of the scenes and their shares."""
SEED, HELD_OUT_SEED = 11, 12
"""Of these scenes and clips; the embedded model was trained on others, of the same photographs."""
QUALITY = 95
"""Of the JPEG files, whose colours keep their full resolution."""
TURNS = 13
"""Questions of a scene at most, the description included."""


def style_of(index: int) -> str:
    """The style of a scene; every run of ten has them in their shares."""
    ends = np.cumsum([*SHARES.values()])
    return [*SHARES][int(np.searchsorted(ends, (index % 10 + 0.5) / 10))]


def questions(placed: Any, rng: np.random.Generator, turns: int = TURNS) -> list[Question]:
    """A description, then questions of the other kinds in turn, none twice."""
    first = ask("describe", placed, rng)
    assert first is not None
    found, kinds = [first], [kind for kind in KINDS if kind != "describe"]
    for _ in range(3):
        for kind in rng.permutation(kinds).tolist():
            question = ask(kind, placed, rng)
            if question is not None and question not in found and len(found) < turns:
                found.append(question)
    return found


def conversation(asked: list[Question], images: int = 1) -> list[dict[str, str]]:
    """Questions and answers as turns; the placeholders stand before the first question."""
    turns = []
    for number, one in enumerate(asked):
        before = "<image>\n" * images if number == 0 else ""
        turns.append({"from": "human", "value": before + one.text})
        turns.append({"from": "gpt", "value": one.answer})
    return turns


def write_scene(index: int, assets: Path, out: Path) -> dict[str, Any]:
    """Draw one scene, write its picture, and give its entry."""
    style = style_of(index)
    names = photos("clutter" if style == "clutter" else "train")
    made = scene(index, SEED, names, Assets(assets), style)
    file = f"scenes/{index:05d}.jpg"
    made.image.save(out / file, quality=QUALITY, subsampling=0)
    asked = questions(made.placed, np.random.default_rng([SEED, index, 1]))
    return {"id": f"scene-{index}", "image": file, "conversations": conversation(asked)}


def drawn(index: int, assets: Path, out: Path, held_out: bool) -> tuple[list[str], list[Question]]:
    """Draw one clip, write its frames, and give their files and the questions about it."""
    from clips import clip, clip_questions

    seed = HELD_OUT_SEED if held_out else SEED
    names = photos("test" if held_out else "train")
    made = clip(index, seed, names, Assets(assets))
    files = [f"clips/{index:05d}-{number}.jpg" for number in range(len(made.frames))]
    for frame, file in zip(made.frames, files, strict=True):
        frame.save(out / file, quality=QUALITY, subsampling=0)
    rng = np.random.default_rng([seed, index, 2])
    # One of each kind, in training twice; what is drawn again stands once.
    found = [one for _ in range(1 if held_out else 2) for one in clip_questions(made, rng)]
    return files, [one for i, one in enumerate(found) if one not in found[:i]]


def write_clip(index: int, assets: Path, out: Path) -> dict[str, Any]:
    """One clip's entry."""
    files, asked = drawn(index, assets, out, False)
    turns = conversation(asked, len(files))
    return {"id": f"clip-{index}", "image": files, "conversations": turns}


def held_out_clips(amount: int, assets: Path, out: Path) -> None:
    """Write `clips/` with the frames and a `questions.json`."""
    folder = out / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for index in range(amount):
        files, asked = drawn(index, assets, out, True)
        images = [Path(file).name for file in files]
        for one in asked:
            asking = {"image": images, "kind": one.kind, "question": one.text}
            listed.append(asking | {"answers": [one.answer]})
    (folder / "questions.json").write_text(json.dumps(listed, indent=1) + "\n")
    typer.echo(f"{amount} clips with {len(listed)} questions: {folder}")


def write(kind: str, amount: int, assets: Path, out: Path, processes: int) -> None:
    """Write `KINDs/` with the pictures and `KINDs.json` with the entries."""
    (out / f"{kind}s").mkdir(parents=True, exist_ok=True)
    one = partial({"scene": write_scene, "clip": write_clip}[kind], assets=assets, out=out)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        entries = pool.map(one, range(amount), chunksize=50)
    (out / f"{kind}s.json").write_text(json.dumps(entries, indent=1) + "\n")
    turns = sum(len(entry["conversations"]) // 2 for entry in entries)
    typer.echo(f"{amount} {kind}s with {turns} questions: {out / f'{kind}s.json'}")


def main(
    assets: Annotated[Path, typer.Option(help="folder of the emoji package, fetched if absent")],
    out: Annotated[Path, typer.Option(help="where pictures and the JSON files go")],
    scenes: Annotated[int, typer.Option(help="how many scenes")] = 0,
    clips: Annotated[int, typer.Option(help="how many clips")] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="clips to ask, not to train")
    ] = False,
    processes: int = 2,
) -> None:
    """Write scenes, clips or both."""
    Assets(assets)
    if held_out:
        held_out_clips(clips, assets, out)
        return
    for kind, amount in (("scene", scenes), ("clip", clips)):
        if amount:
            write(kind, amount, assets, out, processes)


if __name__ == "__main__":
    typer.run(main)
