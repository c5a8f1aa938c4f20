"""Retention rates by layer, their file, and P-Sigmoid's curve."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmprune import GSearch, PSigmoid, VlmpruneError, spec
from vlmprune.select import schedule


@given(
    st.integers(2, 80),
    st.floats(1e-3, 1, exclude_max=True),
    st.floats(0.01, 20),
)
def test_the_mean_is_the_budget(depth: int, mean: float, k: float) -> None:
    rates = schedule.sigmoid_rates(depth, mean, k)
    assert len(rates) == depth and rates[0] == 1
    assert abs(sum(rates[1:]) / (depth - 1) - mean) < 1e-6
    assert all(a >= b for a, b in itertools.pairwise(rates))
    # On a sigmoid the log odds fall by k from layer to layer.
    odds = [math.log(r / (1 - r)) for r in rates[1:] if 1e-6 < r < 1 - 1e-6]
    for a, b in itertools.pairwise(odds):
        assert a - b == pytest.approx(k, abs=1e-4)


def test_a_sigmoid_by_hand() -> None:
    """Around its middle a sigmoid is symmetric, so half the budget puts α in the middle."""
    rates = schedule.sigmoid_rates(6, 0.5, 2.0)
    assert rates[1:] == pytest.approx([1 / (1 + math.exp(2 * (i - 3))) for i in range(1, 6)])
    assert schedule.sigmoid_rates(6, 1.0, 2.0) == (1.0,) * 6
    # A budget too small for any layer still falls, and no rate is 0.
    few = schedule.sigmoid_rates(32, 1e-9, 5.0)
    assert few[1] > few[2] > 0 < few[-1]


WRONG: list[tuple[Any, str]] = [
    ([], "begin with nothing; layer 0 is whole"),
    ([0.5, 0.5], "begin with 0.5; layer 0 is whole"),
    ([1, 0.5, 0.6], "0.6 of layer 2 is above the 0.5"),
    ([1, 0], "0 of layer 1 is not a number above 0"),
    ([1, -0.1], "-0.1 of layer 1"),
    ([1.5], "1.5 of layer 0"),
    ([1, float("nan")], "nan of layer 1"),
    ([1, True], "True of layer 1"),
    ([1, "0.5"], "'0.5' of layer 1"),
]


@pytest.mark.parametrize(("rates", "words"), WRONG)
def test_wrong_rates_are_refused(rates: Any, words: str) -> None:
    with pytest.raises(VlmpruneError, match=words):
        schedule.check_rates(rates)
    with pytest.raises(VlmpruneError, match=words):
        GSearch(rates=rates)
    with pytest.raises(VlmpruneError, match=words):
        schedule.document(rates, "some model")


def test_rates_as_text_and_as_numbers() -> None:
    pruner = GSearch(rates=[1, 0.5, 0.25, 0.1])
    assert pruner == GSearch(rates="1;0.5;.25;1e-1") and hash(pruner)
    assert pruner.rates == (1, 0.5, 0.25, 0.1)
    assert spec.parse(spec.dump(pruner)) == pruner
    assert spec.parse("gsearch:rates=1;0.5;0.25;0.1") == pruner
    with pytest.raises(VlmpruneError, match="parted by semicolons"):
        GSearch(rates="1,0.5")
    with pytest.raises(VlmpruneError, match=r"begin with 0\.5"):
        GSearch(rates=0.5)


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    content = schedule.document((1, 0.6, 1 / 3), "tiny with 3 layers", {"task": "scenes"})
    assert content["format"] == "vlmprune schedule 1" and content["method"] == "gsearch"
    path.write_text(json.dumps(content))
    pruner = GSearch.from_file(path)
    assert pruner.rates == (1, 0.6, 1 / 3)
    assert pruner.calibrated_on == "tiny with 3 layers"
    assert GSearch.from_file(path, positions="compact").positions == "compact"
    assert spec.parse(f"gsearch:from={path},calibrated_on=none").calibrated_on is None
    # A sigmoid's rates are a schedule, too.
    rates = PSigmoid(keep=0.3).rates(8, 0.3)
    path.write_text(json.dumps(schedule.document(rates, "any", method="psigmoid")))
    assert GSearch.from_file(path).rates == rates
    with pytest.raises(VlmpruneError, match="no setting 'keep'; it has rates"):
        GSearch.from_file(path, keep=3)


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        "{}",
        '{"format": "vlmprune schedule 2", "rates": [1], "architecture": "any"}',
        '{"format": "vlmprune schedule 1", "rates": "1;0.5", "architecture": "any"}',
        '{"format": "vlmprune schedule 1", "rates": [1]}',
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(VlmpruneError, match=r"other\.json' is no schedule; make one with"):
        GSearch.from_file(path)
    with pytest.raises(VlmpruneError, match="cannot be read"):
        GSearch.from_file(tmp_path / "missing.json")


def test_another_depth_is_refused() -> None:
    with pytest.raises(VlmpruneError, match="for 3 decoder layers and this model has 5"):
        GSearch(rates=(1, 0.5, 0.5)).asks(5)
    asked = GSearch(rates=(1, 1, 0.5, 0.5, 0.2)).asks(5)
    assert {layer: ask.attention for layer, ask in asked.items()} == {2: "previous", 4: "previous"}
    # Layer 0 ranks nothing, so layer 1 is asked itself.
    asked = GSearch(rates=(1, 0.9, 0.9, 0.1)).asks(4)
    assert {layer: ask.attention for layer, ask in asked.items()} == {1: "own", 3: "previous"}
