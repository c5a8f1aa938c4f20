"""Tasks: what they ask, how they score, what they refuse."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmprune import VlmpruneError, embedded
from vlmprune.study.tasks import Folder, Sample, Scenes, find_task
from vlmprune.study.tasks.scorers import same_parts, same_words


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("a cat.", ["a cat."], 1),
        ("A  Cat", ["a cat."], 1),
        ("cat", ["a cat."], 0),
        ("a cat. a cat.", ["a cat."], 0),
        ("cat a", ["a cat"], 0),
        ("", ["a cat."], 0),
        ("nothing", ["a cat.", "Nothing!"], 1),
        ("forty-two", ["forty two"], 1),
    ],
)
def test_same_words(text: str, answers: list[str], score: float) -> None:
    assert same_words(text, answers) == score


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("cat, nothing. nothing, dog.", 1),
        ("cat, dog. nothing, dog.", 0.75),
        # What is left out moves all that follows.
        ("cat. nothing, dog.", 0.5),
        ("cat, nothing", 0.5),
        ("cat, nothing. nothing, dog, dog, dog.", 1),
        ("", 0),
    ],
)
def test_same_parts(text: str, share: float) -> None:
    assert same_parts(text, "cat, nothing. nothing, dog.") == share


def test_the_shipped_scenes() -> None:
    samples = Scenes().samples()
    assert len({one.id for one in samples}) == len(samples) == 773
    assert len({one.group for one in samples}) == 120
    counts = Counter(one.kind for one in samples)
    assert set(counts) == {"presence", "count", "position", "relation", "reading", "listing"}
    assert counts["presence"] == counts["listing"] == 120
    # Those about one picture stand together, and the true answer is the one that scores.
    groups = [one.group for one in samples]
    assert groups == sorted(groups)
    assert all(Scenes().score(one, one.answers[0]) == 1 for one in samples)
    assert not any(Scenes().score(one, "something else") for one in samples)
    assert samples[:9] == Scenes().samples(9)
    [picture] = samples[0].opened()
    assert picture.size == (224, 224)
    assert picture.mode == "RGB"


def test_the_scenes_are_small_and_name_their_sources() -> None:
    files = list(embedded.held_out().iterdir())
    assert sum(file.stat().st_size for file in files) < 2.5e6
    listed = json.loads((embedded.held_out() / "scenes.json").read_text())
    assert {one["file"] for one in listed} | {"scenes.json"} == {file.name for file in files}
    demo = json.loads((embedded.scenes() / "scenes.json").read_text())
    known = {(one["photo"], one["licence"], one["symbols"]) for one in demo}
    assert {(one["photo"], one["licence"], one["symbols"]) for one in listed} == known


def test_the_prompt_is_the_one_that_the_model_was_trained_on() -> None:
    _, processor = embedded.load()
    sample = Sample("0", (Image.new("RGB", (8, 8)),), "where is the cat?")
    assert Scenes().prompt(sample, processor) == "USER: <image>\nwhere is the cat? ASSISTANT:"


def test_a_folder(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    asked = [
        {"image": "a.png", "question": "one?", "answers": "yes", "kind": "presence"},
        {"image": ["a.png", "b.png"], "question": "two?", "answers": ["a cat", "cat"]},
        {"image": "a.png", "question": "three?"},
    ]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    task = find_task(f"folder:{tmp_path}")
    assert isinstance(task, Folder)
    assert find_task(str(tmp_path)) == task
    samples = task.samples()
    assert [one.question for one in samples] == ["one?", "three?", "two?"]
    assert [one.group for one in samples] == ["a.png", "a.png", "a.png|b.png"]
    assert [one.answers for one in samples] == [("yes",), (), ("a cat", "cat")]
    assert [one.kind for one in samples] == ["presence", "", ""]
    assert [len(one.opened()) for one in samples] == [1, 1, 2]
    assert task.score(samples[2], "Cat.") == 1
    assert task.samples(1) == samples[:1]


GOOD = {"image": "a.png", "question": "one?"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file"),
        ("[", "is no JSON"),
        ("{}", "no list of questions"),
        ([], "no list of questions"),
        ([1], "entry 1 .* no usable 'image'"),
        ([{"question": "one?"}], "entry 1 .* no usable 'image'"),
        ([GOOD | {"image": []}], "entry 1 .* no usable 'image'"),
        ([GOOD, GOOD | {"answers": [1]}], "entry 2 .* no usable 'answers'"),
        ([GOOD | {"question": " "}], "entry 1 .* no usable 'question'"),
        ([GOOD | {"kind": 1}], "entry 1 .* no usable 'kind'"),
        ([GOOD | {"image": "none.png"}], "entry 1 .*none.png.* does not exist"),
    ],
)
def test_a_folder_that_cannot_be_read(tmp_path: Path, content: Any, sentence: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "questions.json").write_text(text)
    with pytest.raises(VlmpruneError, match=sentence):
        Folder(tmp_path).samples()


@pytest.mark.parametrize("text", ["pope", "folder:", "folder", "", "scenes:3"])
def test_an_unknown_task(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VlmpruneError, match="unknown; use scenes"):
        find_task(text)


def test_a_sample_opens_files_late(tmp_path: Path) -> None:
    sample = Sample("7", (tmp_path / "none.png",), "one?")
    assert sample.group == str(tmp_path / "none.png")
    assert Sample("7", (), "one?").group == "7"
    with pytest.raises(VlmpruneError, match="does not exist"):
        sample.opened()


def test_pictures_of_a_sample_are_opened_as_files_are(tmp_path: Path) -> None:
    """A sample may hold pictures, of any mode, or files."""
    made = Image.fromarray(np.full((2, 3), 40000, np.uint16))
    made.save(tmp_path / "a.png")
    sample = Sample("1", (made, tmp_path / "a.png", Image.new("LA", (3, 2))), "what?")
    memory, file, clear = sample.opened()
    assert {one.mode for one in (memory, file, clear)} == {"RGB"}
    assert memory.getpixel((0, 0)) == file.getpixel((0, 0)) == (156, 156, 156)
    assert clear.getpixel((0, 0)) == (255, 255, 255)
