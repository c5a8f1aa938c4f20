"""`vlmprune search` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commandline import call, sentence
from vlmprune import Recall, VisPruner, embedded, spec
from vlmprune.io import models
from vlmprune.io.outputs import maker
from vlmprune.study import stats
from vlmprune.study.tasks import find_task
from vlmprune.study.tasks.part import Part


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.Loaded(*embedded.load())


@pytest.fixture(autouse=True)
def once(loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands have one model."""
    monkeypatch.setattr(models, "load", lambda *_: loaded)


SMALL = ("--limit", "4", "--trials", "3", "--json")


def found(out: Path, *words: Any, code: int = 0) -> dict[str, Any]:
    result = call("search", *words, *SMALL, "--out", out)
    assert result.exit_code == code, result.output
    printed = json.loads(result.stdout)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written == {k: v for k, v in printed.items() if k not in ("file", "plot")}
    assert maker(out) == maker(out.with_suffix(".png")) == "vlmprune search"
    return written


def test_a_setting_is_found_checked_and_used(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    content = found(out, "vispruner:budget=image", "--max-loss", "90%")
    pruner = spec.parse(content["method"])
    assert isinstance(pruner, VisPruner) and pruner.budget == "image"
    allowed = [one for one in content["tried"] if one["loss"] <= 0.9]
    assert content["best"] == min(allowed, key=lambda one: (one["cost"], one["loss"]))
    assert 0 < content["best"]["cost"] < 1 and len(content["tried"]) == 3
    assert content["checked"]["samples"] == 4
    # Four questions are about too few pictures for an interval.
    assert content["checked"]["difference"][1:] == [None, None]

    # Asked again it has nothing to do; with more trials it goes on.
    before = out.with_suffix(".journal").read_text()
    assert found(out, "vispruner:budget=image", "--max-loss", "90%") == content
    assert out.with_suffix(".journal").read_text().startswith(before)
    said = sentence("search", "vispruner", *SMALL, "--out", out)
    assert "holds a search with another" in said and "--restart" in said


def test_an_interval_is_told_of_enough_pictures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("search", "random", "--trials", 1, "--max-loss", "99%", "--over", "keep=0.5,0.6")
    for groups, told in ((stats.GROUPS, False), (1, True)):
        monkeypatch.setattr(stats, "GROUPS", groups)
        result = call(*asked, "--limit", 4, "--out", tmp_path / f"{groups}.json")
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        (said,) = [one for one in lines if "questions about other pictures" in one]
        assert said.endswith(")" if told else "; too few pictures for an interval")
        assert (" to " in said) == told


def test_what_steps_read_is_searched(tmp_path: Path) -> None:
    content = found(tmp_path / "r.json", "recall:floor=0", "--max-loss", "90%")
    pruner = spec.parse(content["method"])
    assert isinstance(pruner, Recall) and (pruner.floor, pruner.always) == (0, True)
    # Each token is read in full with its share, and the sketch of all: between 7 and 8 per cent.
    for one in content["tried"]:
        read = round(256 * one["settings"]["read"]) / 256
        assert 0.07 < one["cost"] - read < 0.08


def test_nothing_within_the_limit_is_said(tmp_path: Path) -> None:
    words = ("vispruner:important_ratio=0.5", "--over", "keep=1,2", "--max-loss", "1%")
    content = found(tmp_path / "none.json", *words, code=1)
    assert content["best"] is None and content["method"] == "" and content["checked"] is None
    assert content["tried"]
    result = call("search", *words, *SMALL[:-1], "--out", tmp_path / "none.json")
    assert result.exit_code == 1 and "no setting tried stays within" in result.stdout


def test_a_schedule_is_found_and_loaded(tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    content = found(out, "gsearch", "--group", "2", "--max-loss", "60%", "--trials", "6")
    rates = content["rates"]
    assert len(rates) == 5 and rates[0] == 1.0 and rates == sorted(rates, reverse=True)
    pruner: Any = spec.parse(f"gsearch:from={out}")
    assert list(pruner.rates) == rates


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "method 'nothing' is unknown"),
        (["vispruner|plphp"], "search one at a time"),
        (["vispruner", "--max-loss", "much"], "no share"),
        (["vispruner", "--over", "speed=1..2"], "no setting"),
        (["vispruner", "--over", "important_ratio=0..1"], "needs keep"),
        (["vispruner", "--cost", "money"], "use one of flops"),
        (["recall", "--cost", "flops"], "is the same for every setting of recall"),
        (["vispruner", "--trials", "0"], "trials=0"),
        (["gsearch", "--over", "keep=0..1"], "rates are what is searched"),
        (["vispruner", "--task", "nowhere"], "task 'nowhere' is unknown"),
        (["vispruner", "--out", f"{__file__}/found.json"], "cannot be a folder, for it is a file"),
    ],
)
def test_mistakes(words: list[str], says: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in sentence("search", *words)
    assert not list(tmp_path.iterdir())


def test_halves_share_no_picture() -> None:
    whole = find_task("scenes")
    first, second = (Part(whole, odd).samples() for odd in (False, True))
    assert not {one.group for one in first} & {one.group for one in second}
    assert sorted(one.id for one in (*first, *second)) == sorted(o.id for o in whole.samples())
    assert [one.id for one in Part(whole, True, 5).samples()] == [one.id for one in second[:5]]
