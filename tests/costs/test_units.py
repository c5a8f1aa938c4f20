"""Figures as text, written in one way wherever they are shown."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vlmprune
from vlmprune import costs
from vlmprune.costs import units

PACKAGE = Path(vlmprune.__file__).parent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.2, "0.200"),
        (9.996, "10.0"),
        (72.5, "72.5"),
        (99.96, "100"),
        (1440.4, "1440"),
    ],
)
def test_a_figure_has_three_digits(value: float, text: str) -> None:
    assert units.digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00 "),
        (999, "999 "),
        (12345, "12.3 k"),
        (4.25e8, "425 M"),
        (9.997e11, "1000 G"),
        (1e12, "1.00 T"),
        (4.356e13, "43.6 T"),
    ],
)
def test_flops_have_a_prefix(value: float, text: str) -> None:
    assert units.flops(value) == text


def test_bytes_shares_and_what_is_saved() -> None:
    assert units.mib(2 * units.MIB) == "2.00" and units.mib(1440 * 2**20) == "1440"
    assert units.percent(0.914) == "91 %" and units.percent(0.0094, ".1f") == "0.9 %"
    assert units.percent(0.025, "+.1f") == "+2.5 %"
    assert units.change(256, 96) == "-62 %" and units.change(2, 3) == "+50 %"
    # What rounds to nothing is none, and of nothing nothing is saved.
    assert units.change(1000, 999) == units.change(0, 1) == ""


def test_what_is_unknown_is_so_in_words_and_null_in_json() -> None:
    unknown = costs.UNKNOWN
    assert units.digits(unknown) == units.mib(unknown) == units.percent(unknown) == "unknown"
    assert f"{units.flops(unknown)}FLOPs" == "unknown FLOPs"
    assert units.change(unknown, 1) == units.change(1, unknown) == ""
    content = {"a": unknown, "b": [1, unknown, {"c": (unknown, "nan", 2.5)}], "d": None}
    told = {"a": None, "b": [1, None, {"c": [None, "nan", 2.5]}], "d": None}
    assert units.ready(content) == told
    assert json.loads(json.dumps(units.ready(content), allow_nan=False)) == told
    assert math.isnan(units.known(None)) and units.known(0.0) == 0


@given(st.floats(1e-3, 1e18))
def test_no_figure_loses_more_than_its_third_digit(value: float) -> None:
    text, prefix = units.flops(value).split(" ")
    assert "e" not in text and not text.endswith(".")
    size = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}[prefix]
    assert float(text) * size == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("64", 64),
        ("0.25", 0.25),
        ("1.0", 1.0),
        ("many", None),
        ("", None),
        ("1%", 0.01),
        ("%", None),
    ],
)
def test_numbers_that_options_give(text: str, number: int | float | None) -> None:
    found = units.number(text)
    assert found == number and type(found) is type(number)


# Where each of these stands, and stands alone.
ONCE = {
    "1e12": "costs/units.py",
    "2**20": "costs/units.py",
    "SIMPLE_HEAD": "cli/printing.py",
    "matplotlib.figure": "draw/style.py",
    "'#0072B2'": "draw/style.py",
    "'---:'": "study/markdown.py",
}


def test_units_tables_and_the_style_of_plots_stand_once() -> None:
    found: dict[str, set[str]] = {one: set() for one in ONCE}
    for file in sorted(PACKAGE.rglob("*.py")):
        # As Python has it again: without comments, in one spelling; docstrings are left out.
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant("")
        text = ast.unparse(tree).replace("1000000000000.0", "1e12").replace("2 ** 20", "2**20")
        for one in ONCE:
            if one in text:
                found[one].add(file.relative_to(PACKAGE).as_posix())
    assert found == {one: {place} for one, place in ONCE.items()}
