"""Results of evaluations: means, intervals, differences."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from vlmprune import VlmpruneError
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.stats import DRAWS
from vlmprune.study.tasks.answered import Answered


def made(*scores: tuple[str, float | None], method: str = "m", kind: str = "k") -> Evaluation:
    """Results of groups with scores, in order."""
    results = tuple(
        Answered(str(i), group, kind, f"answer {score}", score, 2, 4, 3, 9, 1, 2, 5, 10, 0.5)
        for i, (group, score) in enumerate(scores)
    )
    return Evaluation("t", method, "model", results)


FIRST = made(("a", 1), ("a", 0), ("b", 1), ("c", 0.5), ("c", 0), ("c", 1), ("d", None))


SECOND = made(("a", 0), ("a", 0), ("b", 1), ("c", 0.5), ("c", 1), ("c", 0), ("d", None))


def percentile(values: list[float], share: float) -> float:
    """By linear interpolation between the two nearest of the sorted values."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def bootstrap(groups: list[list[float]]) -> tuple[float, float]:
    """Percentiles of the mean over resampled groups, number by number."""
    draws = np.random.default_rng(0).integers(len(groups), size=(DRAWS, len(groups))).tolist()
    means = []
    for draw in draws:
        scores = [score for number in draw for score in groups[number]]
        means.append(sum(scores) / len(scores))
    return percentile(means, 0.025), percentile(means, 0.975)


def test_means_and_intervals() -> None:
    assert FIRST.mean is not None
    assert FIRST.accuracy == pytest.approx(3.5 / 6)
    assert FIRST.mean.count == 6
    # The group whose answer nobody knows does not count.
    expected = bootstrap([[1, 0], [1], [0.5, 0, 1]])
    assert FIRST.interval == pytest.approx(expected)
    assert expected[0] < 3.5 / 6 < expected[1]
    difference = FIRST.minus(SECOND)
    assert difference is not None
    assert difference.value == pytest.approx(1 / 6)
    assert (difference.low, difference.high) == pytest.approx(bootstrap([[1, 0], [0], [0, -1, 1]]))
    assert FIRST.minus(FIRST).high == 0  # type: ignore[union-attr]


def test_kinds() -> None:
    mixed = replace(
        FIRST,
        results=tuple(
            replace(one, kind="even" if i % 2 == 0 else "odd")
            for i, one in enumerate(FIRST.results)
        ),
    )
    assert {kind: (one.value, one.count) for kind, one in mixed.by_kind.items()} == {
        "even": (2 / 3, 3),
        "odd": (0.5, 3),
    }
    assert mixed.by_kind["odd"].low == pytest.approx(bootstrap([[0], [0.5, 1]])[0])


def test_agreement_where_nothing_is_known() -> None:
    nothing = made(("a", None), ("b", None))
    assert nothing.mean is nothing.accuracy is nothing.interval is None
    assert nothing.by_kind == {}
    other = replace(
        nothing, results=(nothing.results[0], replace(nothing.results[1], answer="else"))
    )
    assert other.agreeing(nothing).accuracy == 0.5
    assert nothing.agreeing(nothing).accuracy == 1
    assert nothing.agreeing(nothing).by_kind["k"].count == 2


def test_as_dict_and_back() -> None:
    found = json.loads(json.dumps(FIRST.as_dict()))
    assert Evaluation.from_dict(found) == FIRST
    assert found["shares"] == {
        "visual_tokens": 0.5,
        "decoder_flops": pytest.approx(1 / 3),
        "flops": 0.5,
        "kv_bytes": 0.5,
        "kv_read": 0.5,
    }
    # Stores of before any cache was read in part.
    for one in found["results"]:
        one.pop("kv_read")
    assert Evaluation.from_dict(found) == FIRST
    assert found["accuracy"] == asdict(FIRST.mean)  # type: ignore[call-overload]
    assert found["seconds"] == 3.5
    with pytest.raises(VlmpruneError, match=r"^format None is not .*; evaluate anew"):
        Evaluation.from_dict({})
    with pytest.raises(VlmpruneError, match=r"^a stored result lacks kind; evaluate anew"):
        Evaluation.from_dict(
            found | {"results": [{k: v for k, v in found["results"][0].items() if k != "kind"}]}
        )
