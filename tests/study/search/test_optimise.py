"""The cheapest setting within a loss, on trade-offs whose answer is known."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vlmprune import VlmpruneError, spec
from vlmprune.study.search import run
from vlmprune.study.search.optimise import Found, Measured, Search, Tried, builder, document
from vlmprune.study.search.plot import plot
from vlmprune.study.search.spaces import Choice, Range, share, space_of

FULL = 0.9
FIELDS = spec.read("vispruner")[0].names


def rated(pruner: Any) -> Measured:
    """Below keep=0.3 accuracy falls; the best ratio is 0.6. The answer is keep = 0.282."""
    if pruner is None:
        return Measured(FULL, 1.0)
    lost = 0.5 * max(0.0, 0.3 - pruner.keep) + 0.05 * (pruner.important_ratio - 0.6) ** 2
    return Measured(FULL - lost, pruner.keep)


def search(folder: Path, measure: Any = rated, **changes: Any) -> Search:
    settings = {"max_loss": 0.01, "trials": 30, "journal": folder / "journal", "about": {"m": 1}}
    return Search(measure, **(settings | changes))


def build() -> Any:
    return builder(spec.read("vispruner")[0])


def test_finds_the_cheapest_setting(tmp_path: Path) -> None:
    found = search(tmp_path).over(build(), space_of(FIELDS, [], []))
    assert len(found.tried) == 30
    assert found.best is not None
    assert found.best.loss <= 0.01
    assert 0.282 <= found.best.cost < 0.33
    # The control: no trial that loses more is called allowed, though cheaper ones were tried.
    assert any(one.cost < found.best.cost for one in found.tried)
    assert all(one.allowed == (one.loss <= 0.01) for one in found.tried)
    by_hand = min((o.cost for o in found.tried if o.accuracy >= 0.99 * FULL), default=None)
    assert found.best.cost == by_hand


def test_a_loss_is_a_share_of_what_the_model_can(tmp_path: Path) -> None:
    """Of a model that is right in 40 of 100, 20 points are half, which is all that may be lost."""

    def measure(pruner: Any) -> Measured:
        return Measured(0.4, 1.0) if pruner is None else Measured(0.4 * pruner.keep, pruner.keep)

    space = space_of(FIELDS, ["important_ratio"], ["keep=0.1,0.3,0.5,0.7"])
    found = search(tmp_path, measure, max_loss=0.5, trials=12).over(build(), space)
    assert {one.settings["keep"] for one in found.tried} == {0.1, 0.3, 0.5, 0.7}
    for one in found.tried:
        assert one.loss == pytest.approx(1 - one.settings["keep"])
        assert one.allowed == (one.settings["keep"] >= 0.5)
    assert found.best is not None and found.best.settings["keep"] == 0.5


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    space = space_of(FIELDS, [], [])
    (tmp_path / "whole").mkdir()
    whole = search(tmp_path / "whole", trials=16).over(build(), space)
    asked: list[Any] = []

    def killed(pruner: Any) -> Measured:
        asked.append(pruner)
        # The first kill is of a trial whose settings were given, not proposed.
        if len(asked) in (3, 8, 15):
            raise KeyboardInterrupt
        return rated(pruner)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path, killed, trials=16).over(build(), space)
    resumed = search(tmp_path, killed, trials=16).over(build(), space)
    assert [one.settings for one in resumed.tried] == [one.settings for one in whole.tried]
    # Nothing that was measured is measured again: 1 without pruning, 16 trials, 3 kills.
    assert len(asked) == 1 + 16 + 3
    before = len(asked)
    search(tmp_path, killed, trials=16).over(build(), space)
    assert len(asked) == before


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    search(tmp_path)
    with pytest.raises(VlmpruneError, match="another m"):
        search(tmp_path, about={"m": 2})


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    search(tmp_path, about={"m": 1, "version": "0.3.0"})
    with pytest.raises(VlmpruneError, match="another version"):
        search(tmp_path, about={"m": 1, "version": "0.4.0"})
    # Up to 0.2 journals did not say theirs.
    old = tmp_path / "old"
    search(old)
    with pytest.raises(VlmpruneError, match=r"vlmprune 0\.2 or earlier.*--restart\.$"):
        search(old, about={"m": 1, "version": "0.3.0"})
    with pytest.raises(VlmpruneError, match=r"--restart; plus=False was the default then\.$"):
        search(old, about={"m": 1, "version": "0.3.0"}, then="plus=False")


@pytest.mark.parametrize(
    ("method", "then"),
    [
        ("prumerge", "plus=False and heads='mean'"),
        ("prumerge:plus=false", "heads='mean'"),
        ("divprune", "budget='crop'"),
        ("divprune:budget=crop", ""),
        ("vispruner", ""),
    ],
)
def test_defaults_of_then_that_a_search_leaves_open(method: str, then: str, tmp_path: Path) -> None:
    asked = run.ask(method, [], None, 0.1, 3, 1, None, 32, tmp_path / "found.json")
    assert run.defaults_then(asked) == then


def test_another_file_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a letter\n")
    with pytest.raises(VlmpruneError, match="not of `vlmprune search`"):
        search(tmp_path)
    assert (tmp_path / "journal").read_text() == "a letter\n"
    # One that begins as a search's does, and goes on as none.
    torn = json.dumps({"op_code": 0, "worker_id": "w", "study_name": "unpruned"}) + "\n"
    (tmp_path / "journal").write_text(torn)
    with pytest.raises(VlmpruneError, match="cannot be read or written as the journal of a search"):
        search(tmp_path)


def test_a_model_that_knows_nothing_has_nothing_to_lose(tmp_path: Path) -> None:
    with pytest.raises(VlmpruneError, match="none of these questions"):
        search(tmp_path, lambda pruner: Measured(0.0, 1.0))


def test_refused_settings_count_as_tried(tmp_path: Path) -> None:
    """PLPHP refuses r < dr."""
    stage = spec.read("plphp:dr=0.3")[0]

    def measure(pruner: Any) -> Measured:
        return Measured(FULL, 1.0 if pruner is None else pruner.r)

    space = space_of(stage.names, ["dr"], [])
    assert set(space) == {"r", "coverage"}
    found = search(tmp_path, measure).over(builder(stage), space)
    assert 0 < len(found.tried) < 30
    assert all(one.settings["r"] >= 0.3 for one in found.tried)


class Schedule:
    def __init__(self, rates: list[float]) -> None:
        self.rates = rates


NEED = [0.0, 1.0, 0.6, 0.3, 0.1]


def scheduled(pruner: Any) -> Measured:
    """Layer i needs `NEED[i]` of the tokens; each share below costs accuracy."""
    if pruner is None:
        return Measured(FULL, 1.0)
    lost = sum(0.2 * max(0.0, n - r) for n, r in zip(NEED, pruner.rates, strict=True))
    return Measured(FULL - lost, sum(pruner.rates) / len(NEED))


def test_rates_fall_from_shallow_to_deep(tmp_path: Path) -> None:
    found = search(tmp_path, scheduled, max_loss=0.02, trials=40).rates(Schedule, 5)
    assert found.best is not None
    rates = found.best.settings["rates"]
    assert rates[0] == 1.0 and len(rates) == 5
    assert all(a >= b for a, b in pairwise(rates))
    # All that is needed costs 0.6 of the whole; loss 0.02 buys at most another 0.018 of rates.
    assert found.best.loss <= 0.02
    assert found.best.cost < 0.66
    assert all(one.settings["rates"][0] == 1.0 for one in found.tried)


def test_layers_may_share_a_rate(tmp_path: Path) -> None:
    found = search(tmp_path, scheduled, max_loss=0.1, trials=12).rates(Schedule, 5, group=2)
    assert all(
        one.settings["rates"][1] == one.settings["rates"][2]
        and one.settings["rates"][3] == one.settings["rates"][4]
        for one in found.tried
    )


def test_front_and_choice_by_hand() -> None:
    def tried(cost: float, accuracy: float) -> Tried:
        loss = 1 - accuracy / FULL
        return Tried({"keep": cost}, accuracy, loss, cost, loss <= 0.05)

    some = [tried(0.5, 0.88), tried(0.2, 0.6), tried(0.3, 0.87), tried(0.4, 0.86), tried(0.1, 0.6)]
    found = Found(FULL, 0.05, some)
    assert [one.cost for one in found.front] == [0.1, 0.3, 0.5]
    assert found.best is some[2]
    assert found.nearest is some[0]
    assert Found(FULL, 0.001, [tried(0.2, 0.6)]).best is None
    written = document(found, "vispruner:keep=0.3", {"task": "t"})
    assert json.loads(json.dumps(written))["best"]["settings"] == {"keep": 0.3}


@pytest.mark.parametrize("rates", [None, [1.0, 0.5, 0.2]])
def test_plot(rates: list[float] | None) -> None:
    settings = {"keep": 0.2} if rates is None else {"rates": rates}
    found = Found(FULL, 0.05, [Tried(settings, 0.89, 0.01, 0.5, True)])
    content = plot(found, "FLOPs", "title")
    assert content.startswith(b"\x89PNG") and content != plot(Found(FULL, 0.05, []), "FLOPs")


def test_space() -> None:
    assert set(space_of(FIELDS, [], [])) == {"keep", "important_ratio"}
    given = space_of(FIELDS, [], ["keep=16,32", "important_ratio=0.25..0.75"])
    assert given == {"keep": Choice((16, 32)), "important_ratio": Range(0.25, 0.75)}
    assert space_of(["window"], [], ["window=1..8"]) == {"window": Range(1, 8, whole=True)}


@pytest.mark.parametrize(
    ("fields", "fixed", "given", "says"),
    [
        (FIELDS, [], ["kept=1..2"], r"^--over kept=… names no setting of the method \(did"),
        (FIELDS, ["keep"], ["keep=0.1..0.2"], "^keep is both given and to be varied; leave one"),
        (FIELDS, [], ["keep"], r"^--over 'keep' is not of the form keep=0\.05"),
        (FIELDS, [], ["keep=a..b"], r"^--over 'keep=a\.\.b' has ends that are no numbers"),
        (FIELDS, [], ["keep=0.5..0.1"], r"^--over 'keep=0\.5\.\.0\.1' has its lower end above"),
        (FIELDS, ["keep", "important_ratio"], [], "nothing is left"),
    ],
)
def test_mistakes_in_a_space(
    fields: list[str], fixed: list[str], given: list[str], says: str
) -> None:
    with pytest.raises(VlmpruneError, match=says):
        space_of(fields, fixed, given)


def test_share() -> None:
    assert share("1%") == share("0.01") == pytest.approx(0.01)
    assert share(" 2.5 % ") == pytest.approx(0.025)
    for text in ("-1%", "100%", "much", "nan", "1"):
        with pytest.raises(VlmpruneError, match="no share"):
            share(text)
