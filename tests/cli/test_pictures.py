"""Every command opens pictures in one way, and tells of a broken one in one sentence."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from commandline import COFFEE, QUESTION, call, sentence
from repository import ROOT
from vlmprune import embedded
from vlmprune.io import models

PACKAGE = ROOT / "src" / "vlmprune"
# The one module that makes RGB of a picture.
OPENING = PACKAGE / "io" / "pictures.py"


@pytest.fixture(scope="module")
def loaded() -> Any:
    return embedded.load()


def broken(path: Path, kind: str) -> Path:
    target = io.BytesIO()
    with Image.open(COFFEE) as image:
        image.save(target, "PNG")
    content = {"empty": b"", "cut": target.getvalue()[:2000], "words": b"no picture"}[kind]
    path.write_bytes(content)
    return path


def words_of(command: str, path: Path, folder: Path) -> list[Any]:
    short = ["--device", "cpu", "--repeat", 1]
    if command == "eval":
        content = [{"image": path.name, "question": QUESTION, "answers": ["a"]}]
        (path.parent / "questions.json").write_text(json.dumps(content))
        asked = ["--task", f"folder:{path.parent}", "--method", "vispruner", "--keep", 64]
        return ["eval", *asked, "--out", folder / "answers.jsonl", "--device", "cpu"]
    return {
        "run": ["run", path, QUESTION, *short],
        "compare": ["compare", path, "--question", QUESTION, "--out", folder / "c", *short],
        "calibrate": ["calibrate", path, "--out", folder / "c.json", "--device", "cpu"],
        "bench": ["bench", "--images", path, *short],
    }[command]


@pytest.mark.parametrize("kind", ["empty", "cut", "words"])
@pytest.mark.parametrize("command", ["run", "compare", "calibrate", "bench", "eval"])
def test_a_broken_picture_is_one_sentence(
    command: str, kind: str, tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    path = broken(tmp_path / "a.png", kind)
    said = sentence(*words_of(command, path, tmp_path))
    assert f"image {str(path)!r}" in said and "cannot be opened as a picture" in said


def test_run_and_the_file_turned_and_16_bit(
    tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model gets of a file is what it gets of the picture that people see."""
    seen: list[Any] = []

    def prepare(some: Any, images: Any, question: str) -> Any:
        seen.extend(images)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    monkeypatch.setattr(models, "prepare", prepare)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    sixteen = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(sixteen).save(tmp_path / "a.png", exif=exif)
    call("run", tmp_path / "a.png", QUESTION, "--device", "cpu")
    (image,) = seen
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image)[..., 0], np.rot90(sixteen >> 8))


def makes_rgb(tree: ast.AST) -> list[int]:
    """Lines that open a picture, turn one or convert its mode."""
    names = ("convert", "exif_transpose")
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            node.func.attr in names
            or (ast.unparse(node.func) == "Image.open" or node.func.attr == "load_image")
        )
    ]


def test_pictures_are_opened_in_one_module() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    # Few files are parsed, for that takes a while.
    words = (".convert(", "Image.open(", "exif_transpose(", "load_image(")
    some = {path: text for path, text in texts.items() if any(word in text for word in words)}
    found = {path: makes_rgb(ast.parse(text)) for path, text in some.items()}
    # Of a picture that may be ours the mark is read, and no pixel.
    marks = found.pop(PACKAGE / "io" / "outputs.py")
    assert len(marks) == 1
    assert [path for path, lines in found.items() if lines] == [OPENING]
    assert makes_rgb(ast.parse("Image.open(a)\nb.convert('RGB')")) == [1, 2]
