"""Clips of moving symbols: the same for a seed, and their answers true."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import clips
import numpy as np
import pytest
from PIL import Image, ImageDraw
from questions import encode, vocabulary

from vlmprune import embedded


class Drawn:
    """Stands for the artwork: a disc of its own colour for each symbol, on grey."""

    def symbol(self, name: str) -> Image.Image:
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        colour = (*colour_of(name), 255)
        ImageDraw.Draw(picture).ellipse((0, 0, 63, 63), fill=colour)
        return picture

    def photo(self, name: str) -> Image.Image:
        return Image.new("RGB", (300, 200), (128, 128, 128))


def colour_of(name: str) -> tuple[int, int, int]:
    number = 1 + list(clips.SYMBOLS).index(name)
    return (255 if number & 1 else 0, 255 if number & 2 else 0, 8 * number)


def made(index: int, seed: int = 3) -> Any:
    return clips.clip(index, seed, ["any"], Drawn())


def test_a_seed_makes_the_same_clip_again() -> None:
    for index in range(5):
        first, again = made(index), made(index)
        assert first.things == again.things
        pairs = list(zip(first.frames, again.frames, strict=True))
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
        asked = [clips.clip_questions(first, np.random.default_rng(4)) for _ in range(2)]
        assert asked[0] == asked[1]
    assert len({made(index).things[0] for index in range(9)}) > 5
    assert made(0).things != made(0, seed=4).things


def test_things_are_where_they_are_said_to_be() -> None:
    """In every picture a cell shows its symbol's colour, or the background alone."""
    for index in range(20):
        clip = made(index)
        assert len(clip.frames) == 4 and 1 <= len(clip.things) <= 3
        assert len({thing.name for thing in clip.things}) == len(clip.things)
        for number, frame in enumerate(clip.frames):
            assert frame.size == (112, 112) and frame.mode == "RGB"
            pixels = np.asarray(frame).astype(int)
            there = [t.path[number] for t in clip.things if t.path[number] is not None]
            assert len(set(there)) == len(there)
            for cell in range(4):
                row, column = divmod(cell, 2)
                part = pixels[56 * row : 56 * row + 56, 56 * column : 56 * column + 56]
                grey = np.ptp(part, axis=2) == 0
                name = clip.at(number, cell)
                assert (name == "nothing") == bool(grey.all())
                if name != "nothing":
                    near = np.abs(part - np.array(colour_of(name))).max(axis=2) < 8
                    assert near.sum() > 500


def answer(clip: Any, text: str) -> set[str]:
    """The true answers to a question, worked out from its words and the things' paths."""
    words = text.rstrip("?.").split()
    numbers = {"one": 0, "two": 1, "three": 2, "four": 3}
    frames = [numbers[b] for a, b in pairwise(words) if a == "picture"]
    paths = {thing.name: thing.path for thing in clip.things}
    named = [word for word in words if word in clips.SYMBOLS]
    if text in ("describe the picture.", "list all the cells."):
        rows = []
        for frame in range(4):
            inside = {path[frame]: name for name, path in paths.items()}
            rows.append(", ".join(inside.get(cell, "nothing") for cell in range(4)) + ".")
        return {" ".join(rows)}
    if words[0] == "where" or text.startswith("in which cell"):
        cell = paths[named[0]][frames[0]]
        return {f"row {['one', 'two'][cell // 2]} column {['one', 'two'][cell % 2]}."}
    if "left" in words or "above" in words or "over" in words:
        start, stop = paths[named[0]][0], paths[named[0]][3]
        value = (lambda c: c % 2) if "left" in words else (lambda c: c // 2)
        return {"yes." if value(stop) < value(start) else "no."}
    if words[:2] in (["is", "there"], ["can", "you"]):
        return {"yes." if paths.get(named[0], [None] * 4)[frames[0]] is not None else "no."}
    if text.startswith(("how many", "count")):
        count = len(set(paths[named[0]]) - {None})
        return {f"{list(numbers)[count - 1]}."}
    if "column" in words:
        cell = (
            2 * numbers[words[words.index("row") + 1]] + numbers[words[words.index("column") + 1]]
        )
        found = [name for name, path in paths.items() if path[frames[0]] == cell]
    else:
        wanted = 1 + numbers[words[-2]]
        found = [name for name, path in paths.items() if len(set(path) - {None}) == wanted]
        assert len(found) == 1
    return {f"a {found[0]}.", f"an {found[0]}."} if found else {"nothing."}


def test_answers_are_true_and_of_known_words() -> None:
    """Every question, by other code; and the model's words suffice."""
    rng, words = np.random.default_rng(1), {w: i for i, w in enumerate(vocabulary())}
    seen: dict[str, set[str]] = {kind: set() for kind in clips.KINDS}
    for index in range(80):
        clip = made(index)
        for kind in clips.KINDS:
            question = clips.ask(kind, clip, rng)
            if question is None:
                continue
            assert question.kind == kind and question.answer in answer(clip, question.text)
            encode(f"{question.text} {question.answer}", words)
            seen[kind].add(question.answer)
    for kind in ("presence", "left", "above"):
        assert seen[kind] == {"yes.", "no."}
    assert "nothing." in seen["at"] and len(seen["moves"]) >= 3
    assert len(seen["where"]) == len(seen["end"]) == 4
    with pytest.raises(ValueError, match="unknown kind 'colour': one of describe"):
        clips.ask("colour", made(0), rng)


def test_the_embedded_model_takes_a_clip() -> None:
    """Four pictures, 64 visual tokens each, and no word that the tokenizer lacks."""
    _, processor = embedded.load()
    clip = made(0)
    side = {"height": clips.SIDE, "width": clips.SIDE}
    for question in clips.clip_questions(clip, np.random.default_rng(2)):
        text = clips.prompt(question.text) + " " + question.answer
        inputs = processor(text=text, images=clip.frames, size=side, return_tensors="pt")
        ids = inputs["input_ids"][0]
        assert int((ids == processor.image_token_id).sum()) == 256
        assert processor.tokenizer.unk_token_id not in ids.tolist()
    assert inputs["pixel_values"].shape == (4, 3, 112, 112)
