"""`vlmprune eval` as a user meets it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from commandline import COFFEE, QUESTION, call, sentence
from vlmprune import embedded
from vlmprune.cli import eval as evaluating_command
from vlmprune.io import models, sources
from vlmprune.study.evals import kept_answers
from vlmprune.study.evals import run as evaluating
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.evals.tables import Assessed
from vlmprune.study.tasks import Sample, Scenes, find_task
from vlmprune.study.tasks.answered import Answered

SPEC = ("--method", "vispruner:keep=64")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return embedded.load()


@pytest.fixture
def quick(loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model is there, and the work goes on in an empty folder."""
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def content(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_a_run_that_was_killed_goes_on(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", *SPEC, "--limit", 6, "--batch", 4, "--markdown", "table.md")
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    shown = result.stdout
    assert "embedded model on scenes, 6 questions" in shown and "vispruner:keep=64" in shown
    for row in ("accuracy", "agreement", "  position (2)", "visual KV", "LLM FLOPs"):
        assert f"\n{row}" in shown
    assert "too few pictures for intervals" in shown
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        table.startswith("<!-- vlmprune eval -->\n") and "| visual KV | 100 % | 25.0 % |" in table
    )
    assert "vlmprune eval --method vispruner:keep=64 --limit 6 --batch 4" in table

    stores = sorted(tmp_path.rglob("*.jsonl"))
    assert len(stores) == 2
    expected = [content(path) for path in stores]
    assert [len(one) for one in expected] == [7, 7]
    assert [line["id"] for line in expected[0][1:]] == [line["id"] for line in expected[1][1:]]

    # Killed within a line of each.
    for path in stores:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:4]) + lines[4][:30], encoding="utf-8")
    again = call(*words)
    assert again.exit_code == 0, again.output
    assert again.stdout == shown
    assert [content(path) for path in stores] == expected
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table

    # Now that all is known nothing runs, and the JSON says what the files hold.
    monkeypatch.setattr(evaluating._Runner, "answer", None)
    told = json.loads(call(*words[:-2], "--json").stdout)
    [pruned] = [path for path in stores if path.name.startswith("vispruner")]
    scores = [line["score"] for line in content(pruned)[1:]]
    assert told["accuracy"]["pruned"]["value"] == pytest.approx(sum(scores) / 6)
    assert told["accuracy"]["pruned"]["low"] is None
    assert told["samples"] == 6 and told["score"] == "accuracy"
    assert told["shares"]["kv_bytes"] == 0.25 and told["visual_tokens"] == 64
    assert told["files"] == {
        "answers": str(pruned.relative_to(tmp_path)),
        "unpruned": str(next(p for p in stores if p != pruned).relative_to(tmp_path)),
    }
    alone = json.loads(call(*words[:-2], "--json", "--no-baseline").stdout)
    assert alone["unpruned"] is None and alone["agreement"] is None
    assert alone["accuracy"]["pruned"] == told["accuracy"]["pruned"]
    assert alone["accuracy"]["full"] is None and "unpruned" not in alone["files"]


def test_a_copy_of_a_standard_set(quick: None, tmp_path: Path) -> None:
    asked = [
        {"question_id": i, "image": "a.png", "text": text, "label": label}
        for i, (text, label) in enumerate((("is there a cat?", "yes"), ("is there a cup?", "no")))
    ]
    text = "".join(json.dumps(one) + "\n" for one in asked)
    (tmp_path / "coco_pope_random.json").write_text(text)
    Image.open(COFFEE).save(tmp_path / "a.png")
    (tmp_path / "a").mkdir()
    result = call("eval", *SPEC, "--task", "pope:.", "--out", "a/found.jsonl", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    names = {"accuracy %", "precision %", "recall %", "F1 %", "yes ratio %"}
    assert set(told["figures"]) == set(told["unpruned"]["figures"]) == names
    assert told["figures"]["accuracy %"] == 100 * told["accuracy"]["pruned"]["value"]
    assert list(told["by_kind"]) == ["random"]
    assert told["files"] == {"answers": "a/found.jsonl", "unpruned": "a/found.unpruned.jsonl"}
    assert [line["id"] for line in content(tmp_path / "a" / "found.jsonl")[1:]] == [
        "random-0",
        "random-1",
    ]
    # Another method's answers are no use.
    words = ("--method", "vispruner:keep=32", "--task", "pope:.", "--out", "a/found.jsonl")
    assert "is of another method" in sentence("eval", *words)


def test_without_labels_agreement_is_told(quick: None, tmp_path: Path) -> None:
    Image.open(COFFEE).save(tmp_path / "a.png")
    asked = [{"image": "a.png", "question": QUESTION, "kind": "place"}]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    said = sentence("eval", *SPEC, "--task", "folder:.", "--no-baseline")
    assert "has no true answers" in said
    result = call("eval", "--method", "vispruner", "--keep", "1.0", "--task", "folder:.")
    assert result.exit_code == 0, result.output
    assert "\nagreement" in result.stdout and "\naccuracy" not in result.stdout
    assert "no true answer is known" in result.stdout
    # All tokens kept: the answer is the same.
    assert result.stdout.count("100.0 %") >= 2 and "place (1)" in result.stdout


def evaluation(scores: list[float | None], method: str) -> Evaluation:
    results = tuple(
        Answered(str(i), f"g{i // 2}", "ab"[i % 2], f"{score}", score, 1, 4, 2, 4, 3, 4, 1, 4, 0.5)
        for i, score in enumerate(scores)
    )
    return Evaluation("t", method, "m", results)


def test_figures_of_two_evaluations() -> None:
    full = evaluation([1, 1] * 12, "unpruned")
    some = evaluation([0, 1, *[1, 1] * 11], "p")
    one = Assessed("model", "p:keep=1|q", some, full, {"F1 %": 90.0}, {"F1 %": 95.5})
    assert one.accuracy is not None and one.agreement is not None
    assert one.accuracy.pruned.value == one.agreement.pruned.value == pytest.approx(23 / 24)
    assert one.accuracy.full is not None and one.accuracy.full.low == 1
    difference = one.accuracy.difference
    assert difference is not None and difference.value == pytest.approx(-1 / 24)
    assert difference.low is not None and difference.high is not None
    assert difference.low < difference.value < difference.high == 0
    kinds = {score.name: score for score in one.by_kind}
    assert kinds["a"].pruned.value == pytest.approx(11 / 12) and kinds["b"].pruned.value == 1
    assert kinds["b"].difference is not None and kinds["b"].difference.value == 0
    lines = {line[0]: line[1:] for line in one.lines()}
    assert lines["F1 %"] == ("95.5", "90.0", "-5.5")
    assert lines["visual KV"] == ("100 %", "25.0 %", "-75.0 %")
    assert lines["with encoder"] == ("100 %", "75.0 %", "-25.0 %")
    assert lines["accuracy"][0] == "100.0 % (100.0 to 100.0)"
    assert "| p:keep=1\\|q |" in one.markdown("command")
    # Nine pictures tell no interval.
    few = replace(
        one,
        answers=replace(some, results=some.results[:18]),
        full=replace(full, results=full.results[:18]),
    )
    assert few.too_few and few.accuracy is not None and few.accuracy.pruned.low is None


@pytest.mark.parametrize("columns", [110, 80])
def test_a_narrow_terminal_breaks_before_the_intervals(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    full, some = evaluation([1, 1] * 12, "unpruned"), evaluation([0, 1] * 12, "p")
    evaluating_command._print(Assessed("model", "method:keep=64", some, full, {}, {}), {})
    printed = capsys.readouterr().out.splitlines()
    [row] = [i for i, line in enumerate(printed) if line.startswith("accuracy  ")]
    assert ("100.0 % (100.0 to 100.0)" in printed[row]) == (columns > 100)
    assert "(100.0 to 100.0)" in printed[row + (columns < 100)]


def test_answers_are_kept_apart_by_what_they_depend_on(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, both = sources.find_model(None), models.Loaded(*loaded)
    (tmp_path / "coco_pope_random.json").write_text("{}\n")
    copy = find_task(f"pope:{tmp_path}")
    seen = {
        kept_answers.digest(both, source, Scenes()),
        kept_answers.digest(both, source, copy),
        kept_answers.digest(both, replace(source, name="other"), copy),
    }
    (tmp_path / "coco_pope_random.json").write_text("{}\n{}\n")
    seen.add(kept_answers.digest(both, source, copy))
    assert len(seen) == 4
    assert kept_answers.digest(both, source, copy) in seen


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--method", "magic"), "method 'magic' is unknown"),
        (("--method", "vispruner:kept=4"), "no setting 'kept'"),
        (("--method", "evs:keep=0.5"), "evs needs videos"),
        (("--method", "vispruner:keep=4", "--keep", "4"), "keep is given twice"),
        (("--method", "plphp", "--keep", "4"), "no setting of plphp"),
        (("--keep", "many"), "--keep many is not a number"),
        (("--task", "magic"), "task 'magic' is unknown; use scenes"),
        (("--task", "pope:none"), "'none' does not exist; pope:PATH takes a folder with coco_pope"),
        (("--task", "gqa:."), "'.' holds no copy of gqa; gqa:PATH takes a folder with testdev"),
        (("--task", "folder:none"), "cannot be read"),
        (("--limit", "0"), "--limit 0 is too few"),
        (("--batch", "0"), "--batch 0 is too few"),
        (("--out", "answers.json"), "--out 'answers.json' does not end in .jsonl"),
        (("--markdown", "a.txt"), "--markdown 'a.txt' does not end in .md"),
        (("--model", "./none"), "model path './none' does not exist"),
        (("--device", "abacus"), "device 'abacus' is not available"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_one_sentence_before_any_work(
    words: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    assert expected in sentence("eval", *words)
    assert not list(tmp_path.iterdir())


def test_a_table_of_somebody_elses_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "mine.md").write_text("# mine")
    said = sentence("eval", "--markdown", tmp_path / "mine.md")
    assert "is there already and not of `vlmprune eval`" in said


def test_pictures_of_other_colours_are_other_questions(loaded: Any) -> None:
    """A palette's numbers alone say nothing of what the model sees."""

    class Shown(Scenes):
        def __init__(self, colour: tuple[int, int, int]) -> None:
            self.picture = Image.new("P", (4, 4))
            self.picture.putpalette(colour)

        def samples(self, limit: int | None = None) -> list[Sample]:
            return [Sample("1", (self.picture,), "what?", ("a",))]

        def read_from(self) -> None:
            return None

    source, both = sources.find_model(None), models.Loaded(*loaded)
    red, blue, again = (
        kept_answers.digest(both, source, Shown(colour))
        for colour in ((200, 0, 0), (0, 0, 200), (200, 0, 0))
    )
    assert red == again != blue
