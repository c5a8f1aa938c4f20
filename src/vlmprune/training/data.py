"""Training data in LLaVA's format: a JSON list of conversations about pictures, read and checked.

    [{"id": "1", "image": "a.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                        {"from": "gpt", "value": "A cat."}]}]

"image" is a file or a list of files, in the order of the `<image>` marks; "images" is read too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.files import is_file, path_of
from vlmprune.io.listed import entries

IMAGE = "<image>"
FORM = (
    '[{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"}, '
    '{"from": "gpt", "value": "…"}]}, …]'
)
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass(frozen=True)
class Turn:
    """A question with its answer, both without marks of pictures."""

    question: str
    answer: str


@dataclass(frozen=True)
class Entry:
    """A conversation about pictures.

    Attributes:
        number: its place in the file, from 0.
        id: its name, which need not be unique.
        images: files in prompt order.
        turns: in their order.
    """

    number: int
    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


def read(path: str | Path, pictures: str | Path | None = None) -> list[Entry]:
    """The entries of a file.

    Args:
        path: the JSON file.
        pictures: the folder that files are named in; by default the JSON file's own.

    Returns:
        Entries in the file's order, those without pictures left out: there is nothing to prune in
        them.

    Raises:
        VlmpruneError: the file cannot be read, an entry of it is malformed, a picture is not
            there, or no entry has a picture.
    """
    path = path_of(path)
    folder = path.parent if pictures is None else path_of(pictures)
    listed = entries(path, "conversations", FORM)
    seen: set[Path] = set()
    found = [_entry(path, folder, number, one, seen) for number, one in enumerate(listed)]
    kept = [one for one in found if one.images]
    if not kept:
        raise VlmpruneError(f"no entry of {path} has a picture; write it as {FORM}.")
    return kept


def _entry(path: Path, folder: Path, number: int, one: Any, seen: set[Path]) -> Entry:
    """Entry `number` of a file; `seen` are pictures that are known to be there."""
    where = f"entry {number + 1} of {path}"
    if not isinstance(one, dict):
        raise VlmpruneError(f"{where} is no object; write it as {FORM}.")
    names = one.get("image", one.get("images", []))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise VlmpruneError(
            f"{where} has no usable 'image'; write a file's name or a list of them."
        )
    images = tuple(folder / name for name in names)
    for image in images:
        if image not in seen and not is_file(image):
            raise VlmpruneError(
                f"{where} names {str(image)!r}, which does not exist; give pictures relative to "
                "the file, or name their folder by --images."
            )
        seen.add(image)
    return Entry(number, str(one.get("id", number)), images, _turns(where, one, len(images)))


def _turns(where: str, one: dict[str, Any], images: int) -> tuple[Turn, ...]:
    """The turns of an entry, questions and answers in alternation."""
    said = one.get("conversations")
    usable = isinstance(said, list) and all(
        isinstance(part, dict)
        and part.get("from") in SPEAKERS
        and isinstance(part.get("value"), str)
        for part in said
    )
    if not usable or not said:
        raise VlmpruneError(
            f"{where} has no usable 'conversations'; write a list of objects with \"from\" (human "
            'or gpt) and "value".'
        )
    order = [SPEAKERS[part["from"]] for part in said]
    if order != ["human", "gpt"] * (len(said) // 2) or len(said) % 2:
        raise VlmpruneError(
            f"{where} does not alternate between human and gpt, the human first; mend it."
        )
    marks = [part["value"].count(IMAGE) for part in said]
    if sum(marks[0::2]) != images or sum(marks) != images:
        raise VlmpruneError(
            f"{where} has {images} picture(s) and {sum(marks)} {IMAGE} mark(s); put one mark for "
            "each picture into the human's words."
        )
    texts = [part["value"].replace(IMAGE, " ").strip() for part in said]
    for number, text in enumerate(texts):
        if not text:
            raise VlmpruneError(f"{where} has an empty text, number {number + 1}; fill it in.")
    return tuple(Turn(q, a) for q, a in zip(texts[0::2], texts[1::2], strict=True))
