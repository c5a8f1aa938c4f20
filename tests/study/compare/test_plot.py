"""The front of what no other beats, and the plot of it."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmprune.errors import VlmpruneError
from vlmprune.study.compare import plot as pareto
from vlmprune.study.compare.results import MARK
from vlmprune.study.stats import front


def test_the_front_by_hand() -> None:
    points = [(1.0, 0.2), (2.0, 0.5), (2.0, 0.4), (3.0, 0.5), (4.0, 0.9), (5.0, 0.8), (2.0, 0.5)]
    assert front(points) == [0, 1, 6, 4]
    assert front([]) == []


numbers = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_the_front_is_all_that_is_not_beaten(points: list[tuple[float, float]]) -> None:
    def beaten(a: tuple[float, float]) -> bool:
        return any(b != a and b[0] <= a[0] and b[1] >= a[1] for b in points)

    expected = [i for i, a in enumerate(points) if not beaten(a)]
    assert sorted(front(points)) == expected


def test_the_plot_has_a_panel_a_cost_and_says_who_made_it() -> None:
    dots = [
        pareto.Dot("all tokens", "", 0.9, (4.0, 8.0, 1.0), 0.85, 0.95, full=True),
        pareto.Dot("random", "25 %", 0.5, (1.0, 2.0, 0.5), 0.4, 0.6, control=True),
        pareto.Dot("a $method$", "25 %", 0.6, (1.0, 2.0, 0.6)),
    ]
    sizes = []
    for count in (1, 3):
        cut = [pareto.Dot(**{**vars(dot), "costs": dot.costs[:count]}) for dot in dots]
        content = pareto.plot(cut, ["cost"] * count, "accuracy", "title")
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG" and picture.info["Software"] == MARK
            sizes.append(picture.size)
            # The unpruned model's line is dotted, controls are grey, the method has a colour.
            colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
            assert {(0x5F, 0x66, 0x70), (0x00, 0x72, 0xB2)} <= colours
    assert sizes[1][0] > 2 * sizes[0][0]
    with pytest.raises(VlmpruneError, match="nothing to draw"):
        pareto.plot([], ["cost"], "accuracy")
