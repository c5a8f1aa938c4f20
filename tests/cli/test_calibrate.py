"""`vlmprune calibrate` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from commandline import call, sentence
from vlmprune import PLPHP, embedded
from vlmprune.io.outputs import maker

SCENES = sorted(embedded.scenes().glob("*.jpg"))


def test_a_calibration_is_written_drawn_and_used(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    asked = ["--question", "where is the cat?", "--question", "is there a cake?"]
    out = call("calibrate", str(SCENES[0].parent), *asked, "--out", str(target))
    assert out.exit_code == 0, out.stderr
    content = json.loads(target.read_text(encoding="utf-8"))
    assert content["samples"] == 2 * len(SCENES) and len(content["layers"]) == 5
    assert maker(target) == maker(target.with_suffix(".png")) == "vlmprune calibrate"
    with Image.open(target.with_suffix(".png")) as picture:
        assert min(picture.size) > 200
    found = PLPHP.from_file(target)
    assert found.alpha > found.beta
    assert f"alpha {found.alpha:g}, beta {found.beta:g}" in out.stdout
    assert f"plphp:from={target}" in out.stdout

    spec = f"plphp:from={target},r=0.5"
    out = call(
        "run", str(SCENES[0]), "where is the cat?", "--method", spec, "--repeat", "1", "--json"
    )
    assert out.exit_code == 0, out.stderr
    used = json.loads(out.stdout)
    assert f"alpha={found.alpha}" in used["report"]["method"]
    assert used["first_token_same"] is True
    assert 0 < used["pruned"]["kv_bytes"] < used["full"]["kv_bytes"]


def test_json_and_a_place_for_the_plot(tmp_path: Path) -> None:
    target, plot = tmp_path / "a.json", tmp_path / "b.png"
    out = call(
        *("calibrate", str(SCENES[0]), "--question", "is there a cake?", "--window", "4"),
        *("--out", str(target), "--plot", str(plot), "--json"),
    )
    assert out.exit_code == 0, out.stderr
    content = json.loads(out.stdout)
    assert content["file"] == str(target) and content["plot"] == str(plot) and plot.exists()
    assert content["plphp"]["window"] == 4 and content["samples"] == 1
    assert json.loads(target.read_text(encoding="utf-8"))["plphp"] == content["plphp"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["absent.jpg"],
            "image 'absent.jpg' does not exist; give the path of a picture or of a folder",
        ),
        (["--model", "."], "path '.' has no config.json"),
        (["--model", str(embedded.path())], "no pictures are given; name some that are like"),
        (["--beta-quantile", "0.8"], "not in rising order"),
        (["--window", "0"], "window=0 is not a whole number of 1 or more"),
        (["--out", f"{__file__}/where.json"], "cannot be a folder, for it is a file"),
        (["--batch", "0"], "--batch 0"),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in sentence("calibrate", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none", encoding="utf-8")
    assert "holds no pictures" in sentence("calibrate", tmp_path, "--out", tmp_path / "out.json")
