"""What `compare.json` says of a configuration."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vlmprune.study.compare.results import Comparison, Row
from vlmprune.study.stats import Interval

PLAIN = Row(
    name="vispruner",
    keep=64,
    spec="vispruner:keep=64",
    control=False,
    score=Interval(0.5, 0.4, 0.6),
    agreement=0.75,
    against=None,
    visual_tokens=64.0,
    decoder_flops=1.0,
    flops=2.0,
    kv_bytes=3.0,
    first_token_ratio=0.5,
)


@pytest.mark.parametrize(
    ("against", "verdict"),
    [
        (None, ""),
        (Interval(0.1), ""),
        (Interval(0.1, 0.05, 0.2), "wins"),
        (Interval(-0.1, -0.2, -0.05), "loses"),
        (Interval(0.1, -0.05, 0.2), ""),
        (Interval(-0.1, -0.2, 0.05), ""),
        # An end at nothing tells nothing.
        (Interval(0.1, 0.0, 0.2), ""),
        (Interval(-0.1, -0.2, 0.0), ""),
    ],
)
def test_each_row_has_its_verdict(against: Interval | None, verdict: str) -> None:
    rows = [PLAIN, replace(PLAIN, against=against)]
    made = Comparison("m", "t", True, 20, rows, [], [], "cpu", "float32", 5, 4)
    first, second = json.loads(json.dumps(made.as_dict()))["rows"]
    assert first["verdict"] == ""
    assert second["verdict"] == rows[1].verdict == verdict
    ends = None if against is None else {"value": against.value, "low": against.low}
    assert second["against"] == (ends and ends | {"high": against.high})  # type: ignore[union-attr]
