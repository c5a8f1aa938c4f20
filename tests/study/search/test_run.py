"""A search chooses on one half of the pictures, and is checked on the other."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny import model, text_config
from vlmprune import VlmpruneError
from vlmprune.io.models import Loaded
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.search import run
from vlmprune.study.tasks import Sample, Task
from vlmprune.study.tasks.answered import Answered


class Questions(Task):
    """Two questions about each of so many pictures."""

    name = "questions"

    def __init__(self, pictures: int) -> None:
        self.pictures = pictures

    def samples(self, limit: int | None = None) -> list[Sample]:
        return [
            Sample(f"{i}-{j}", (Image.new("RGB", (4, 4)),), "what?", ("a",), group=str(i))
            for i in range(self.pictures)
            for j in range(2)
        ][:limit]


class Measured:
    """Stands for `evaluate`: on even pictures a pruner loses nothing, on odd ones all."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, set[int]]] = []

    def __call__(self, loaded: Loaded, pruner: Any, task: Task, **_: Any) -> Evaluation:
        samples = task.samples()
        self.asked.append((pruner is not None, {int(one.group) % 2 for one in samples}))
        cost = 1.0 if pruner is None else pruner.keep
        results = tuple(
            Answered(
                *(one.id, one.group, "", "a", float(pruner is None or int(one.group) % 2 == 0)),
                *(16 * cost, 16.0, 10 * cost, 10.0, 20 * cost, 20.0, 30 * cost, 30.0, 0.1),
            )
            for one in samples
        )
        return Evaluation(task.label, "method", "model", results)


def test_the_choice_is_checked_on_pictures_that_did_not_choose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured()
    monkeypatch.setattr(run, "evaluate", measured)
    words = ("vispruner:important_ratio=0.5", [], "tokens", 0.1, 3, 1, None, 4)
    asked = run.ask(*words, tmp_path / "found.json")
    outcome = run.run(Loaded(model(), None), asked, Questions(24))
    # Without a pruner and three times with one; then both once more.
    assert measured.asked == [
        (False, {0}),
        *[(True, {0})] * 3,
        (False, {1}),
        (True, {1}),
    ]
    assert outcome.found.best is not None and outcome.found.best.loss == 0
    checked = outcome.content["checked"]
    assert checked["task"] == "questions, second half" and checked["samples"] == 24
    assert (checked["accuracy without pruning"], checked["accuracy"]) == (1.0, 0.0)
    assert checked["difference"][0] == -1.0
    assert outcome.content["about"]["task"] == "questions, first half"


def test_one_picture_cannot_be_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: pytest.fail("something was asked"))
    asked = run.ask("vispruner", [], None, 0.1, 3, 1, None, 4, tmp_path / "found.json")
    with pytest.raises(VlmpruneError, match="too few questions with known answers"):
        run.run(Loaded(model(), None), asked, Questions(1))


def test_a_cost_that_nobody_knows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured()

    def unknown(*given: Any, **more: Any) -> Evaluation:
        made = measured(*given, **more)
        return replace(made, results=tuple(replace(one, kv_bytes=nan) for one in made.results))

    monkeypatch.setattr(run, "evaluate", unknown)
    asked = run.ask("vispruner", [], "kv", 0.1, 3, 1, None, 4, tmp_path / "found.json")
    with pytest.raises(VlmpruneError, match="cost 'kv', is unknown of this model; choose another"):
        run.run(Loaded(model(), None), asked, Questions(24))


def test_a_schedule_needs_layers_to_share_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "evaluate", Measured())
    asked = run.ask("gsearch", [], None, 0.1, 3, 1, None, 4, tmp_path / "found.json")
    one = model(text_config=text_config(num_hidden_layers=1))
    with pytest.raises(VlmpruneError, match="two decoder layers or more; this model has one"):
        run.run(Loaded(one, None), asked, Questions(24))
