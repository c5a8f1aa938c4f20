"""Kept answers are another's as soon as anything differs that they depend on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tiny import model, text_config
from vlmprune import VisPruner
from vlmprune.io.models import Loaded
from vlmprune.io.sources import Source
from vlmprune.study.evals import kept_answers
from vlmprune.study.tasks import Sample, Task


class Asked(Task):
    """One question about one picture, of which a few things are open."""

    def __init__(self, label: str = "asked", longest: int = 16, **changes: Any) -> None:
        self.named, self.longest = label, longest
        picture = Image.new("RGB", (4, 4), (200, 0, 0))
        self.one = replace(Sample("1", (picture,), "what?", ("a",)), **changes)

    @property
    def label(self) -> str:
        return self.named

    def samples(self, limit: int | None = None) -> list[Sample]:
        return [self.one][:limit]

    def max_new_tokens(self, sample: Sample) -> int:
        return self.longest


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(model(), None)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return Source("model", folder, "llava", "a model")


def test_the_same_is_the_same(loaded: Loaded, source: Source) -> None:
    first, second = (kept_answers.digest(loaded, source, Asked()) for _ in range(2))
    assert first == second
    # What people call the model, and a folder in it, say nothing of its answers.
    assert source.folder is not None
    (source.folder / "notes").mkdir()
    assert kept_answers.digest(loaded, replace(source, label="other"), Asked()) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "other"},
        {"longest": 17},
        {"id": "2"},
        {"question": "who?"},
        {"answers": ("b",)},
        {"images": (Image.new("RGB", (4, 4), (0, 0, 200)),)},
        {"images": (Image.new("RGB", (2, 8), (200, 0, 0)),)},
        {"images": ()},
    ],
    ids=["label", "longest", "id", "question", "answers", "colours", "size", "images"],
)
def test_another_question(loaded: Loaded, source: Source, changes: dict[str, Any]) -> None:
    here, there = (kept_answers.digest(loaded, source, one) for one in (Asked(), Asked(**changes)))
    assert here != there


def change(file: Path) -> None:
    file.write_text("other weights")


def touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def add(file: Path) -> None:
    (file.parent / "generation_config.json").write_text("{}")


@pytest.mark.parametrize("act", [change, touch, add, Path.unlink])
def test_other_files_of_the_model(loaded: Loaded, source: Source, act: Any) -> None:
    before = kept_answers.digest(loaded, source, Asked())
    assert source.folder is not None
    act(source.folder / "model.safetensors")
    assert kept_answers.digest(loaded, source, Asked()) != before


def test_another_model_and_another_version(
    loaded: Loaded, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Loaded(model().to(torch.bfloat16), None)
    larger = Loaded(model(text_config=text_config(num_hidden_layers=4)), None)
    seen = {kept_answers.digest(one, source, Asked()) for one in (loaded, half, larger)}
    seen.add(kept_answers.digest(loaded, replace(source, name="elsewhere"), Asked()))
    seen.add(kept_answers.digest(loaded, replace(source, folder=None), Asked()))
    monkeypatch.setattr(kept_answers, "__version__", "0.0.1")
    seen.add(kept_answers.digest(loaded, source, Asked()))
    assert len(seen) == 6


def test_a_file_is_named_by_the_method_alone() -> None:
    """Names for people may be alike; what is measured is told by the settings."""
    names = [
        kept_answers.file_name("a method", one)
        for one in (VisPruner(keep=4), VisPruner(keep=5), None)
    ]
    assert len(set(names)) == 3
    assert all(name.startswith("a-method-") and name.endswith(".jsonl") for name in names)
    assert kept_answers.file_name("a method", VisPruner(keep=4)) == names[0]
