"""Means, the interval that is told of them, and the points that no other beats."""

from __future__ import annotations

import pytest

from vlmprune.study.stats import Interval, Mean, front, interval_of, mean_of


def test_an_interval_is_told_from_ten_pictures_on() -> None:
    """Of several questions about a picture each counts, and the picture once."""
    for pictures, told in ((9, False), (10, True)):
        groups = [str(number) for number in range(pictures) for _ in range(3)]
        scores = [float(number % 2) for number in range(len(groups))]
        mean = mean_of(scores, groups)
        assert mean is not None and mean.count == 3 * pictures and mean.ends is not None
        found = interval_of(mean, groups)
        assert found.value == mean.value
        assert found.ends == (mean.ends if told else None)


def test_resamples_have_as_many_pictures_as_there_are() -> None:
    """Of n pictures, half right, a mean's deviation is 0.5 / sqrt(n); fewer drawn make it wider."""
    for pictures in (16, 64, 256):
        scores = [float(number % 2) for number in range(pictures)]
        mean = mean_of(scores, [str(number) for number in range(pictures)])
        assert mean is not None and mean.low is not None and mean.high is not None
        wanted = 2 * 1.96 * 0.5 / pictures**0.5
        assert mean.high - mean.low == pytest.approx(wanted, rel=0.08)
        assert mean.low < mean.value == 0.5 < mean.high


def test_the_upper_end_by_hand() -> None:
    """One of four is right: three or four of four drawn are it in 13 of 256 resamples, four in 1.

    Of three drawn, two would be the upper end, for all are it in 1 of 64.
    """
    mean = mean_of([1.0, 0.0, 0.0, 0.0], ["a", "b", "c", "d"])
    assert mean is not None and (mean.low, mean.value, mean.high) == (0.0, 0.25, 0.75)


def test_pictures_weigh_by_their_questions() -> None:
    mean = mean_of([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert mean is not None and (mean.value, mean.low, mean.high) == (0.75, 0.0, 1.0)
    assert mean_of([], []) is None
    alone = mean_of([0.25], ["a"])
    assert alone == Mean(0.25, 0.25, 0.25, 1)


def test_an_interval_has_both_ends_or_none() -> None:
    assert Interval(0.5, 0.25, 0.75).ends == (0.25, 0.75)
    assert Interval(0.0, 0.0, 0.0).ends == (0.0, 0.0)
    for half in (Interval(0.5), Interval(0.5, low=0.25), Interval(0.5, high=0.75)):
        assert half.ends is None


def test_the_front() -> None:
    """By rising cost; of equal points all, of equal costs the better, of equal scores the first."""
    points = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.5), (1.0, 0.1), (2.0, 0.5), (4.0, 0.4), (5.0, 0.6)]
    assert front(points) == [1, 2, 4, 6]
    assert front([]) == []
