"""The tables of accuracies: marks, rows that are made anew, and that pages show the files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import accuracy
import accuracy_tables
import equal_compute
import learned
import render
from page_parts import DOCS, RESULTS
from vlmprune import METHODS

LISTED = [[f"{group}-{kind}", kind, group] for group in "abcd" for kind in accuracy_tables.KINDS]


@cache
def parts_of(page: str) -> dict[str, str]:
    """What a page's parts are by the committed files."""
    return render.PAGES[page](RESULTS)


def row(label: str, digit: str, repeats: int = 1, **changes: Any) -> dict[str, Any]:
    """A row that has the same score in every sample."""
    shares = {"visual_tokens": 0.5, "decoder_flops": 0.25, "flops": 1, "kv_bytes": 0.125}
    made = {"label": label, "budget": 0.33, "repeats": repeats, "shares": shares}
    return made | {"scores": digit * len(LISTED), "cells": [8 * repeats] * 4} | changes


def stored(*rows: dict[str, Any]) -> dict[str, Any]:
    about = {"model": "M", "torch": "1", "transformers": "2", "batch": 32}
    full = row("unpruned", "1", cells=[16] * 4)
    return {"about": about, "samples": LISTED, "unpruned": full, "rows": list(rows)}


def test_random_with_as_many_bytes() -> None:
    def at(share: float, digit: str, repeats: int = 1) -> dict[str, Any]:
        return row("random", digit, repeats, budget=share, shares={"kv_bytes": share})

    # Nothing at 0, a third at 0.2, all from 0.6 on.
    table = accuracy_tables.Table(stored(at(0.2, "1", 3), at(0.6, "1"), row("none", "0")))
    for share, expected in ((0.2, 1 / 3), (0.4, 2 / 3), (0.05, 1 / 12), (0.0, 0.0), (0.9, 1.0)):
        assert table.random_at(share).accuracy == pytest.approx(expected)
    # The row has 0.125 of the bytes.
    gain = table.gain("none", 0.33)
    assert gain is not None
    assert gain.value == pytest.approx(-0.125 / 0.2 / 3)
    assert table.gains().splitlines()[2] == "| none | -20.8 ± 0.0 |"


def test_marks() -> None:
    # One draw of three is right in every sample: 33 per cent.
    random = row("random", "1", 3)
    mixed = "".join("1" if group in "ab" else "0" for _, _, group in LISTED)
    table = accuracy_tables.Table(
        stored(
            random,
            row("better", "1"),
            row("worse", "0"),
            row("here and there", "1", scores=mixed),
            row("its own", "0", budget=None),
        )
    )
    assert [table.mark(label, 0.33) for label in table.labels] == ["", "", " ▼", " ≈"]
    lines = table.accuracy().splitlines()
    assert lines[0] == "| method | 33% |"
    assert lines[2:5] == [
        "| *random* | 33.3 ± 0.0 |",
        "| better | 100.0 ± 0.0 |",
        "| worse | 0.0 ± 0.0 ▼ |",
    ]
    assert table.cost().splitlines()[2] == "| *random* | 50 · 25 · 12 |"
    assert table.own().splitlines()[2] == (
        "| its own | 50 · 25 · 12 | 0.0 ± 0.0 | -100.0 ± 0.0 | -33.3 ± 0.0 |"
    )
    kinds = table.kinds().splitlines()
    assert kinds[0] == "**33%**"
    assert kinds[4].startswith("| unpruned | 100.0")
    assert kinds[5].endswith("| 33.3 ± 0.0 | 50.0 ± 0.0 |")


def test_what_is_kept_again_is_a_last_column() -> None:
    rows = (row("random", "1", 3), row("near", "1"), row("its own", "0", budget=None))
    again = {("random", 0.33): 1.0, ("near", 0.33): 0.99996, ("its own", None): 0.5}
    table = accuracy_tables.Table(stored(*rows, row("new", "1")), again)
    lines = table.accuracy().splitlines()
    assert lines[0] == "| method | 33% | kept again |"
    ends = [line.split(" | ")[-1] for line in lines[2:]]
    # What is not all is not rounded to it, and what was not measured stays empty.
    assert ends == ["100 |", "99.9 |", " |"]
    assert table.own().splitlines()[2].endswith(" | 50.0 |")
    without = accuracy_tables.Table(stored(*rows))
    assert without.accuracy().splitlines()[0] == "| method | 33% |"
    assert "again" not in without.own() + table.gains() + table.cost()


def test_rows_of_several_releases_are_told() -> None:
    newer = row("newer", "1", versions={"torch": "1", "transformers": "3"})
    setup = accuracy_tables.Table(stored(row("random", "1", 3), newer)).setup()
    assert "torch 1, transformers 2 and 3," in setup


@pytest.mark.parametrize("page", render.PAGES)
def test_the_committed_pages_show_the_committed_files(page: str) -> None:
    text, parts = (DOCS / page).read_text(encoding="utf-8"), parts_of(page)
    assert render.render(text, parts) == text
    for name, part in parts.items():
        if part:
            # Control: a part that is not the files' is made anew.
            other = text.replace(f"<!-- {name} -->\n{part}", f"<!-- {name} -->\nold")
            assert other != text and render.render(other, parts) == text


def test_every_part_of_the_results_is_rendered() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    marked = {line[5:-4] for line in text.splitlines() if line.startswith("<!-- ")}
    parts = parts_of("results.md")
    assert marked == {*parts, *(f"end {name}" for name in parts)} and all(parts.values())


def test_every_method_is_planned_or_left_out_by_name() -> None:
    assert {one.method for one in accuracy.planned([])} | set(accuracy.NOT_HERE) == set(METHODS)
    for one in accuracy.planned([]):
        assert len(one.pruners) == len(one.settings)


def test_rows_are_stale_by_their_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = accuracy.planned(["fastv"])[:2]
    kept = {"label": one.label, "budget": one.budget, **accuracy.facts(one)}
    assert not accuracy.stale(one, kept)
    assert accuracy.stale(one, None) and accuracy.stale(other, kept)
    assert accuracy.stale(one, kept | {"settings": [{"keep": 0.4}]})
    trained = learned.planned()[-1]
    kept = accuracy.facts(trained)
    assert "weights" in kept and accuracy.stale(trained, kept | {"weights": ["other"]})
    # Of other pictures nothing is known.
    file = tmp_path / "results.json"
    accuracy.write(file, accuracy.read(file) | {"rows": [kept]})
    assert accuracy.read(file)["rows"] == [kept]
    monkeypatch.setattr(accuracy, "digest", lambda folder: "another")
    assert accuracy.read(file)["rows"] == []


def test_the_study_counts_what_a_budget_buys() -> None:
    found = json.loads((RESULTS / "equal_compute.json").read_text())
    # What a budget buys is within it, and the next larger grid is not.
    for row in found["rows"]:
        for layers in (2, 3, 5):
            bought = equal_compute.affordable(found, layers, row["mflops"])
            others = [one for one in found["rows"] if one["layers"] == layers]
            fitting = [one["tokens"] for one in others if one["mflops"] <= row["mflops"]]
            assert (bought or {"tokens": None})["tokens"] == max(fitting, default=None)
    full = {row["layers"]: row["mflops"] for row in found["rows"] if row["tokens"] == 256}
    n, d, m = 256 + found["text"], 192, 512
    layer = 2 * (2 * n * d * d + 2 * n * d * 96 + 2 * n * n * d + 3 * n * d * m) / 1e6
    assert full == pytest.approx({layers: layers * layer for layers in (2, 3, 5)})


def test_learned_methods_are_stored_as_planned() -> None:
    found = json.loads(learned.FILE.read_text())
    rows = {(row["label"], row["budget"]): row for row in found["rows"]}
    assert {row.key for row in learned.planned()} == set(rows)
    assert not any(accuracy.stale(row, rows[row.key]) for row in learned.planned())
