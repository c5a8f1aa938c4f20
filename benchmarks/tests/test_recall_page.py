"""The program that measures Recall's accuracy goes on where it was, and its tables tell true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import accuracy
import program
import recall_accuracy
import recall_page
from vlmprune import embedded
from vlmprune.study.evals.results import UNPRUNED

SCENES = [f"{number:03d}" for number in range(300)]
SAMPLES = [
    [f"{scene}-{kind}", kind, scene, 16 if kind == "describe" else 1, 33]
    for scene in SCENES
    for kind in recall_page.KINDS
]
KINDS = len(recall_page.KINDS)


def row(label: str, wrong: dict[str, int], scenes: int | None = None) -> dict[str, Any]:
    """A row that gets so many questions of some kinds wrong, in the first scenes."""
    seen = SAMPLES if scenes is None else SAMPLES[: KINDS * scenes]
    right = [i // KINDS >= wrong.get(sample[1], 0) for i, sample in enumerate(seen)]
    scores = "".join(str(int(one)) for one in right)
    cells = [16 if ok else 12 for ok, sample in zip(right, seen, strict=True) if sample[4] == 33]
    listed = cells[KINDS - 1 :: KINDS]
    return {"label": label, "scenes": scenes, "scores": scores, "same": scores} | {
        "cells": listed,
        "first": 1.0,
    }


def stored(*rows: dict[str, Any]) -> dict[str, Any]:
    about = {"model": "M", "torch": "1", "transformers": "2", "batch": 32}
    return {"about": about, "samples": SAMPLES, "rows": [row(UNPRUNED, {}), *rows]}


def test_tables_of_paired_differences() -> None:
    found = stored(row("good", {"read": 3}), row("bad", {"read": 30}), row("few", {}, 20))
    rows = recall_page.Rows(found)
    assert rows.close == ["good", "bad"]
    assert rows.mean("bad", recall_page.of_kind("read"), UNPRUNED).value == pytest.approx(-0.1)
    assert rows.mean("bad", recall_page.every, UNPRUNED).value == pytest.approx(-0.1 / KINDS)
    # Of fewer scenes the same are taken of the other row.
    few = rows.mean("few", recall_page.every, UNPRUNED)
    assert (few.value, few.count) == (0, 20 * KINDS)
    good, bad = recall_page.aims(found).splitlines()
    assert "(met)" in good and "by kind met, the lowest is read" in good
    assert "by kind not met, too low: read -1" in bad
    curve = recall_page.curve(found).splitlines()
    assert [line.split("|")[2].strip() for line in curve[2:]] == ["300", "300", "300", "20"]
    assert "| -1.2 (" in curve[4] and "| 100.0 (100.0 to 100.0) |" in curve[2]
    kinds = recall_page.kinds(found).splitlines()
    assert kinds[0] == "| kind | questions | unpruned | good | bad |"
    assert "-10.0 (" in kinds[2 + recall_page.KINDS.index("read")]
    told = recall_page.tokens(found)
    assert "| 12 % |" in told.splitlines()[3] and told.endswith("in 100 % of the answers.")


def folder(at: Path, scenes: int) -> Path:
    """The first of the scenes that come with the model, as the program takes them."""
    source, listed = embedded.held_out(), []
    at.mkdir()
    for scene in json.loads((source / "scenes.json").read_text())[:scenes]:
        shutil.copy(source / scene["file"], at)
        listed += [
            {"image": scene["file"], "kind": one["kind"], "question": one["question"]}
            | {"answers": [one["answer"]]}
            for one in scene["questions"]
        ]
    (at / "questions.json").write_text(json.dumps(listed))
    return at


def test_the_program_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes, file = folder(tmp_path / "scenes", 2), tmp_path / "recall.json"

    def run(*words: str) -> Any:
        given = [str(scenes), "--some", "1", "--results", str(file), *words]
        return CliRunner().invoke(program.command(recall_accuracy.main), given)

    assert run("--only", "no such row").exit_code != 0 and not file.exists()
    done = run("--only", "Recall, 12.5 %")
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    labels = [one["label"] for one in found["rows"]]
    assert labels == [UNPRUNED, "Recall, 12.5 %", 'Recall, 12.5 %, `rest="none"`']
    samples = recall_page.Rows(found).samples
    full, some, _ = found["rows"]
    assert len(full["scores"]) == len(samples) == len(found["answers"])
    assert len(some["scores"]) == sum(one[2] == samples[0][2] for one in samples)
    # Three tokens, and sixteen words with as many marks and the end.
    assert {tuple(one[3:]) for one in samples if one[1] in ("presence", "describe")} == {
        (1, 3),
        (16, 33),
    }
    # What is known is not made again, what was made with other settings is.
    assert run("--only", "Recall, 12.5 %").output == ""
    stale = json.loads(file.read_text())
    stale["rows"][1]["settings"]["sketch"] = "int8"
    recall_accuracy.write(file, stale)
    again = run("--only", "Recall, 12.5 %")
    assert again.output.startswith("Recall, 12.5 %: ") and again.output.count("right") == 1
    assert json.loads(file.read_text())["rows"][1]["settings"]["sketch"] == "int4"
    # Nothing is known of other pictures.
    monkeypatch.setattr(accuracy, "digest", lambda folder: "another")
    assert recall_accuracy.read(file, scenes)["rows"] == []


def test_rows_are_as_planned() -> None:
    rows = recall_accuracy.planned()
    assert len({one.label for one in rows}) == len(rows)
    for one in rows:
        pruner = one.pruner
        assert (pruner is None) == (one.label == UNPRUNED)
        for name, value in one.settings.items():
            assert getattr(pruner, name) == value
    known = json.loads(recall_accuracy.FILE.read_text())["rows"]
    by_label = {one["label"]: one for one in known}
    assert [one["label"] for one in known] == [one.label for one in rows]
    assert not any(recall_accuracy.stale(one, by_label[one.label]) for one in rows)
    assert recall_accuracy.stale(rows[1], by_label[rows[2].label])
