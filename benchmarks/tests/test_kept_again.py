"""What is kept again under noise: choices are made twice, and the model goes on with the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import accuracy
import kept_again
from vlmprune import METHODS, embedded
from vlmprune.io.models import Loaded
from vlmprune.method import Method
from vlmprune.study.evals.run import evaluate
from vlmprune.views import EncoderView


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(*embedded.load())


def test_noise_is_relative_and_leaves_flags_and_places() -> None:
    values = torch.tensor([[1e-6, 1.0, -1e6, 0.0]])
    seen = EncoderView(
        values, values[..., None], torch.ones(1, 4, dtype=torch.bool), (0,), layers={1: values}
    )
    made = kept_again.noised(seen, torch.Generator().manual_seed(0))
    for one, plain in (
        (made.attention, values),
        (made.features[..., 0], values),
        (made.layers[1], values),
    ):
        ratio = one / plain
        assert 0 < (ratio - 1).abs()[:, :3].max() < 5 * kept_again.NOISE and one[0, 3] == 0
    assert not torch.equal(made.attention, made.layers[1])
    assert made.candidates is seen.candidates and made.images == (0,)


@pytest.mark.parametrize(
    ("name", "settings", "sure"),
    [
        ("uniform", {"keep": 0.2}, True),
        ("fastervlm", {"keep": 0.2}, False),
        ("vispruner", {"keep": 0.2}, False),
        ("tome", {"keep": 0.2}, False),
        ("evit", {"keep": 0.2}, False),
        ("fastv", {"keep": 0.2}, False),
        ("plphp", {"r": 0.4}, False),
    ],
)
def test_more_noise_keeps_less(
    name: str, settings: dict[str, Any], sure: bool, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = METHODS[name](**settings)
    before = {one: getattr(type(pruner), one) for one in kept_again.CHOICES}

    def share(noise: float) -> float:
        monkeypatch.setattr(kept_again, "NOISE", noise)
        counts = kept_again.counted(loaded, pruner, 2, 2, 0)
        assert counts.kept > 0
        return counts.again / counts.kept

    assert share(0.0) == 1
    assert share(10.0) == 1 if sure else share(10.0) < 0.9
    assert {one: getattr(type(pruner), one) for one in kept_again.CHOICES} == before


def test_the_model_goes_on_with_the_first_choice(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_again, "NOISE", 10.0)
    cls, task = METHODS["fastv"], accuracy.Scenes()
    plain = evaluate(loaded, cls(keep=0.2), task, limit=4)
    counts = kept_again.Counts()
    with kept_again.asked_twice(cls, counts, torch.Generator().manual_seed(0)):
        made = evaluate(loaded, cls(keep=0.2), task, limit=4)
    assert [one.answer for one in made.results] == [one.answer for one in plain.results]
    assert counts.again < counts.kept


def test_all_rows_are_stored_as_planned() -> None:
    found = json.loads(Path(kept_again.FILE).read_text())
    rows = {(row["label"], row["budget"]): row for row in found["rows"]}
    planned = kept_again.planned()
    assert {row.key for row in planned} == set(rows) == set(kept_again.shares(found))
    assert not any(accuracy.stale(row, rows[row.key]) for row in planned)
    assert found["noise"] == kept_again.NOISE and found["budget"] == kept_again.BUDGET
    # Every method of the table by budget has one, and each chooses where there is a choice.
    accuracies = json.loads(accuracy.FILE.read_text())["rows"]
    labels = {row["label"] for row in accuracies if row["budget"] == kept_again.BUDGET}
    assert labels <= {label for label, _ in rows}
    assert all(
        METHODS[row["method"]].select is not Method.select
        or METHODS[row["method"]].drop is not Method.drop
        or METHODS[row["method"]].retain is not Method.retain
        for row in rows.values()
    )


def test_prefills_ask_one_question_about_each_scene() -> None:
    asked = kept_again.Prefills().samples()
    assert len(asked) == len({one.group for one in asked}) == 120
    assert len({one.kind for one in asked}) == 6
    assert {kept_again.Prefills().max_new_tokens(one) for one in asked} == {1}
