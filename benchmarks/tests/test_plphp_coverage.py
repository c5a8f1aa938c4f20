"""The tables of PLPHP with coverage: kinds by length, paired differences, and what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

import plphp_coverage as page

LISTED = [[f"{group}-{kind}", kind, group] for group in "abcd" for kind in ("listing", "one word")]
"""Of four scenes, a listing and an answer of one word."""


def row(label: str, r: float | None, scores: str, cells: list[int]) -> dict[str, Any]:
    made = {"label": label, "budget": r, "repeats": 1, "shares": {"kv_bytes": r or 1.0}}
    return made | {"scores": scores, "cells": cells}


def test_lengths_and_differences() -> None:
    alone, eight = page.COVERED
    rows = [
        row(label, r, "00" * 4 if label in page.RANDOM else "10" * 4, [4 * (label == eight)] * 4)
        for label in (*page.RANDOM, *page.PLAIN, *page.COVERED)
        for r in page.RATES
    ]
    about = {"model": "M", "torch": "1", "transformers": "2", "batch": 32}
    found = {"about": about, "samples": LISTED, "rows": rows}
    shown = page.Lengths(found | {"unpruned": row("unpruned", None, "11" * 4, [16] * 4)})
    for which, expected in (("cells", 0.25), ("long", 1.0), ("short", 0.0)):
        mean = shown.scores(eight, 0.4, which).mean
        assert mean is not None and mean.value == expected and mean.count == 4
    grid = shown.grid("long", [*page.RANDOM, eight]).splitlines()
    assert (
        grid[2]
        == f"| 0.4 | 40 % | {' | '.join(['0.0 (0.0 to 0.0)'] * 2)} | 100.0 (100.0 to 100.0) |"
    )
    gains = shown.gains().splitlines()
    assert gains[2].endswith(
        "| +25.0 (+25.0 to +25.0) | +100.0 (+100.0 to +100.0) | +0.0 (+0.0 to +0.0) |"
    )
    assert gains[-1].startswith(f"| 0.1 | {alone} | {next(iter(page.RANDOM))} | +0.0")
    assert "8 questions about 4 scenes, 4 listings and 0 other" in shown.asked()


def test_questions_by_the_length_of_their_answers(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    asked = [("describe", "cat, dog."), ("at", "a sign."), ("at", "nothing.")]
    entries = [
        {"image": "a.png", "kind": kind, "question": "what?", "answers": [answer]}
        for kind, answer in asked
    ]
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    task = page.ByLength(tmp_path)
    samples = task.samples()
    assert [one.kind for one in samples] == ["listing", "several words", "one word"]
    assert [task.max_new_tokens(one) for one in samples] == [40, 16, 16]
    assert {one.group for one in samples} == {"a.png"} and len(task.samples(2)) == 2


def test_all_rows_are_stored() -> None:
    found = json.loads(page.FILE.read_text())
    stored = {(row["label"], row["budget"]): row["settings"] for row in found["rows"]}
    assert stored == {row.key: list(row.settings) for row in page.planned()}


def test_ways_of_equal_thresholds_keep_as_many_bytes() -> None:
    """Random tokens, PLPHP and PLPHP with coverage differ in which tokens they keep alone."""
    rows = json.loads(page.FILE.read_text())["rows"]
    share = {(row["label"], row["budget"]): row["shares"]["kv_bytes"] for row in rows}
    last, eight = page.RANDOM
    for r in page.RATES:
        for control, plain, covered in zip(page.RANDOM, page.PLAIN, page.COVERED, strict=True):
            assert share[control, r] == share[plain, r] == share[covered, r]
        assert share[last, r] != share[eight, r]
