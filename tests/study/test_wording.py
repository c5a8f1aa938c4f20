"""Scores, budgets and counts in words, and tables of them."""

from __future__ import annotations

import pytest

from vlmprune.study import markdown, wording
from vlmprune.study.stats import Interval, Mean


def test_a_score_with_and_without_its_interval() -> None:
    one = Interval(0.9, 0.855, 0.93)
    assert wording.interval(one) == "90.0 (86-93)"
    assert wording.in_percent(one) == "90.0 % (85.5 to 93.0)"
    assert wording.in_points(Interval(-0.01, -0.03, 0.02)) == "-1.0 (-3.0 to +2.0)"
    for words in (wording.interval, wording.in_percent, wording.in_points):
        assert "(" not in words(Interval(0.9))


def test_a_mean_is_an_interval_of_so_many_samples() -> None:
    mean = Mean(0.5, 0.4, 0.6, 20)
    assert mean.ends == (0.4, 0.6) and wording.interval(mean) == "50.0 (40-60)"
    assert Interval(0.5).ends is None and Interval(0.5, 0.4).ends is None


@pytest.mark.parametrize(("keep", "text"), [(64, "64"), (0.25, "25 %"), (0.055, "5.5 %")])
def test_budgets(keep: int | float, text: str) -> None:
    assert wording.budget(keep) == text


def test_counts() -> None:
    said = [wording.counted(n, "question") for n in (0, 1, 2)]
    assert said == ["0 questions", "1 question", "2 questions"]


def test_a_table_as_markdown() -> None:
    heads, rows = ("", "a|b", "c"), [("x|y", "1", "2")]
    lines = markdown.table(heads, rows).splitlines()
    assert lines == ["|  | a\\|b | c |", "|---|---:|---:|", "| x\\|y | 1 | 2 |"]
    assert markdown.table(heads, rows, left=None).splitlines()[1] == "|---|---|---|"
    assert markdown.table(heads, [], left=2).splitlines()[1:] == ["|---|---|---:|"]
