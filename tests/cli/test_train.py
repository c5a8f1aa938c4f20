"""`vlmprune train` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vlmprune.learned import QueCC

from commandline import call, sentence
from training_data import SIDE, listed, written
from vlmprune.io import libraries
from vlmprune.training.trainer import files


def small(folder: Path, *more: Any) -> list[Any]:
    """A run that takes a moment."""
    data = written(folder)
    given = ["--data", data, "--out", folder / "run", "--side", SIDE, "--steps", 2, "--batch", 2]
    given += ["--turns", 2, "--held-out", 1, "--set", "hidden=16", "--warm-up", 0]
    return [*given, *more]


def test_weights_are_trained_and_used(tmp_path: Path) -> None:
    given = ["--window", 2, "--eval-every", 2, "--store", "float16", "--json"]
    given += ["--task", "scenes", "--limit", 2]
    out = call("train", "quecc", *small(tmp_path, *given))
    assert out.exit_code == 0, out.stderr
    content = json.loads(out.stdout)
    assert content["steps"] == 2 and content["entries"] == len(listed()) - 1
    assert 0 <= content["accuracy"] <= 1 and content["held_out_loss"] > 0
    folder = tmp_path / "run"
    assert Path(content["curve"]) == folder / "curve.png" and (folder / "curve.png").exists()
    assert not [one for one in files(folder) if one.foreign() or not one.path.exists()]
    pruner = QueCC.from_pretrained(folder)
    assert pruner.settings["window"] == 2 and pruner.settings["hidden"] == 16
    total = sum(one.numel() for one in pruner.module.parameters())
    assert content["parameters"] == total
    assert (folder / "model.safetensors").stat().st_size < 2.2 * total
    notes = pruner.trained.notes["training"]
    assert notes["steps"] == 2 and notes["command"].startswith("vlmprune train quecc --data")
    # So many as windows of 2 make of the pictures that it was trained on, for tables.
    assert pruner.keep == (SIDE // 14 // 2) ** 2
    scene = listed()[0]["image"]
    out = call("run", scene, "where is the cat?", "--method", content["weights"], "--json")
    assert out.exit_code == 0, out.stderr

    # Another window goes on with all that fits it: everything but the pooling.
    more = small(tmp_path)
    more[3] = tmp_path / "next"
    out = call("train", "quecc", *more, "--window", 4, "--from", folder, "--rate", 1e-9, "--json")
    assert out.exit_code == 0, out.stderr
    after = QueCC.from_pretrained(tmp_path / "next").module.state_dict()
    before = pruner.module.state_dict()
    same = [k for k, v in after.items() if v.shape == before[k].shape]
    assert {*after} - {*same} == {"pool.weight"}
    assert all((after[name] - before[name]).abs().max() < 1e-4 for name in same)


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("nonsense", [], "method 'nonsense' is unknown; methods that are trained: quecc"),
        ("vispruner", [], "method 'vispruner' needs no training"),
        ("quecc", ["--stage", "x"], "--stage 'x' is unknown; use align or tune"),
        ("quecc", ["--stage", "align", "--lora", 4], "--lora 4 trains the language model"),
        ("quecc", ["--lora", -1], "--lora -1 is no rank"),
        ("quecc", ["--steps", 0], "--steps 0 is too few"),
        ("quecc", ["--turns", -1], "--turns -1 is below 0"),
        ("quecc", ["--rate", 0], "--rate 0 trains nothing"),
        ("quecc", ["--precision", "int8"], "--precision 'int8' is unknown"),
        ("quecc", ["--weigh", "x"], "--weigh 'x' is unknown; use token or answer"),
        ("quecc", ["--store", "int8"], "--store 'int8' is unknown"),
        ("quecc", ["--set", "heads"], "--set 'heads' is not NAME=VALUE"),
        ("quecc", ["--set", "window=2", "--window", 2], "window is given twice"),
        ("quecc", ["--set", "depth=2"], "depth=2 is no setting of quecc"),
        ("quecc", ["--window", 0], "window=0 is not a whole number"),
        ("quecc", ["--tokens", 4], "tokens=4 is no setting of quecc"),
        ("quecc", ["--held-out", 4], "of which --held-out 4 leaves none to train on"),
        ("quecc", ["--from", "absent"], "weights='absent' of quecc is no folder"),
        ("quecc", ["--task", "absent"], "task 'absent' is unknown"),
        ("quecc", ["--images", "absent"], "which does not exist; give pictures relative"),
    ],
)
def test_mistakes(tmp_path: Path, method: str, given: list[Any], said: str) -> None:
    content = listed()
    data = written(tmp_path, [one | {"image": Path(one["image"]).name} for one in content])
    folder = Path(content[0]["image"]).parent
    common = ["--data", data, "--out", tmp_path / "run"]
    if "--images" not in given:
        common += ["--images", folder]
    assert said in sentence("train", method, *common, *given)
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there(tmp_path: Path) -> None:
    said = sentence("train", "quecc", "--data", tmp_path / "no.json", "--out", tmp_path / "run")
    assert "no.json' cannot be read (No such file or directory)" in said
    assert "Missing option '--data'" in sentence("train", "quecc", "--out", tmp_path / "run")


def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = libraries.find_spec
    monkeypatch.setattr(
        libraries, "find_spec", lambda name: None if name == "peft" else found(name)
    )
    said = sentence("train", "quecc", "--data", written(tmp_path), "--out", tmp_path / "run")
    assert 'this needs peft, which is not installed; run `pip install "vlmprune[train]"`' in said
