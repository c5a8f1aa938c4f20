"""`vlmprune compare` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commandline import COFFEE, QUESTION, call, sentence
from vlmprune import embedded, spec
from vlmprune.io import models
from vlmprune.io.outputs import maker
from vlmprune.study.compare import results
from vlmprune.study.compare import run as compare

GRASS = str(embedded.scenes() / "grass.jpg")


def html_of(folder: Path) -> str:
    return (folder / "compare.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return embedded.load()


@pytest.fixture
def quick(loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model is there, one question is timed, and the work goes on in an empty folder."""
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    monkeypatch.setattr(compare, "TIMED", 1)
    monkeypatch.chdir(tmp_path)


def test_pictures_and_a_question(quick: None, tmp_path: Path) -> None:
    words = ("compare", COFFEE, GRASS, "--question", "where is the <b>cat</b>?", "--keep", "0.25")
    settings = ("--methods", "random,vispruner", "--repeat", 1, "--max-new-tokens", 8)
    result = call(*words, *settings)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    shown = result.stdout
    assert "embedded model on 2 pictures, 2 questions" in shown and "agreement" in shown
    assert shown.index("keep 25 %") < shown.index("\n  random") < shown.index("\n  vispruner")
    assert shown.count("where is the <b>cat</b>?") == 2
    asked = [line.split()[0] for line in shown.splitlines() if "<b>cat</b>?" in line]
    assert asked == ["coffee.jpg", "grass.jpg"]
    assert max(map(len, shown.partition("agreement: ")[0].splitlines())) <= 80

    folder = tmp_path / "compare"
    content = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    assert {maker(file) for file in folder.glob("compare.*")} == {"vlmprune compare"}
    assert content["made_by"] == results.MARK and content["score"] == "agreement"
    assert content["command"].startswith(f"vlmprune compare {COFFEE} {GRASS} ")
    assert "--methods random,vispruner --keep 0.25 --question" in content["command"]
    assert [(row["name"], row["keep"]) for row in content["rows"]] == [
        *(("all tokens", None), ("random", 0.25), ("vispruner", 0.25)),
    ]
    assert spec.parse(content["rows"][2]["spec"]).keep == 0.25  # type: ignore[attr-defined]
    full, _, pruned = content["rows"]
    assert (full["visual_tokens"], pruned["visual_tokens"]) == (256, 64)
    assert full["first_token_ms"] is None and pruned["first_token_ratio"] > 0
    # Every picture is shown, and its answers agree as often as the table says.
    texts = [[one["text"] for one in shown["answers"]] for shown in content["shown"]]
    assert len(texts) == 2
    assert pruned["agreement"] == sum(a[2] == a[0] for a in texts) / 2
    html = html_of(folder)
    assert html.count("where is the &lt;b&gt;cat&lt;/b&gt;?") == 3 and "<b>cat" not in html
    assert html.count("data:image/jpeg") == 2 * (1 + 2)
    with Image.open(folder / "compare.png") as plot:
        assert plot.width > 1000
    assert len(list((folder / "answers").rglob("*.jsonl"))) == 3

    # Asked again, as JSON: the files are its own, so they are replaced.
    again = call(*words, *settings, "--json", "--show", 0, "--html", tmp_path / "other.html")
    assert again.exit_code == 0, again.output
    told = json.loads(again.stdout)
    assert told["files"]["page"] == str(tmp_path / "other.html")
    assert told["files"]["plot"] == "compare/compare.png"
    assert [row["score"] for row in told["rows"]] == [row["score"] for row in content["rows"]]


def test_a_task_of_the_package(quick: None, tmp_path: Path) -> None:
    result = call(
        *("compare", "--methods", "plphp:r=0.5,dr=0,evs", "--limit", 1, "--show", 1),
        *("--repeat", 1, "--device", "cpu", "--out", tmp_path / "a" / "b"),
    )
    assert result.exit_code == 0, result.output
    assert "embedded model on scenes, 1 question" in result.stdout
    assert "accuracy" in result.stdout and "own budget" in result.stdout
    assert "left out: evs:keep=0.5: it needs videos, and scenes has pictures" in result.stdout
    content = json.loads((tmp_path / "a" / "b" / "compare.json").read_text(encoding="utf-8"))
    cut = content["rows"][1]
    assert (cut["name"], cut["visual_tokens"]) == ("plphp:r=0.5,dr=0", 256)
    assert 2 * cut["kv_bytes"] == content["rows"][0]["kv_bytes"]
    (shown,) = content["shown"]
    full, cut = shown["answers"]
    assert cut["kv_share"] == 0.5 and cut["heads"] == [[0.5] * 3] * 5
    assert full["heads"] == full["reached"] == cut["reached"] == []
    assert html_of(tmp_path / "a" / "b").count("kept by each of 3 KV heads") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--methods", "magic"), "method 'magic' is unknown"),
        (("--methods", "random,,vispruner"), "the method is empty"),
        (("--methods", "vispruner", "--methods", "vispruner"), "vispruner:keep=0.5 twice"),
        (("--methods", "vispruner:kept=4"), "no setting 'kept'"),
        (("--methods", "plphp", "--keep", "0.5"), "--keep is no setting of plphp"),
        (("--keep", "0.5,many"), "--keep 0.5,many holds 'many', which is no number"),
        (("--keep", "0.5,0.5"), "--keep 0.5,0.5 holds 0.5 twice"),
        (("--keep", "0.5,0"), "keep=0 leaves no visual tokens"),
        (("--keep", "1.5"), "outside (0, 1]"),
        ((COFFEE,), "a question about the pictures is missing"),
        ((COFFEE, "--question", " "), "a question about the pictures is missing"),
        ((COFFEE, "--question", QUESTION, "--task", "scenes"), "pictures and --task exclude"),
        ((COFFEE, "--question", QUESTION, "--limit", "2"), "--limit is for a --task"),
        ((COFFEE, "--question", QUESTION, "--max-new-tokens", "0"), "--max-new-tokens 0 is too"),
        (("nowhere.jpg", "--question", QUESTION), "image 'nowhere.jpg' does not exist"),
        (("--question", QUESTION), "--question is for pictures of one's own"),
        (("--max-new-tokens", "4"), "--max-new-tokens is for pictures of one's own"),
        (("--task", "magic"), "task 'magic' is unknown"),
        (("--limit", "0"), "--limit 0 is too few"),
        (("--batch", "0"), "--batch 0 is too few"),
        (("--repeat", "0"), "--repeat 0 is too few"),
        (("--show", "-1"), "--show -1 is below 0"),
        (("--show", "13"), "--show 13 is above the 12 questions that a page holds"),
        (("--model", "./none"), "model path './none' does not exist"),
        (("--html", "page.txt"), "does not end in .html"),
        (("--out", COFFEE), "for it is a file; give another path"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value).replace(COFFEE, "IMAGE"),
)
def test_mistakes_are_one_sentence_before_any_work(
    words: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.chdir(tmp_path)
    assert expected in sentence("compare", *words)
    assert not list(tmp_path.iterdir())


def test_a_file_of_somebody_elses_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "thesis.html"
    mine.write_text("<html></html>")
    assert "is there already and not of `vlmprune compare`" in sentence("compare", "--html", mine)
    assert mine.read_text() == "<html></html>"
