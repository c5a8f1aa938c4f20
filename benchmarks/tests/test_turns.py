"""How the programs time and refuse, and that each measures with as little as it may be given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import contract
import decode
import host_cost
import program
import selection
import skipping
import turns
from page_parts import ROOT
from vlmprune import METHODS
from vlmprune.methods.bases.learned import Learned

CPU = torch.device("cpu")


def test_all_take_turns_and_ratios_are_within_a_turn() -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = turns.in_turns(("a", "b", "c"), turn, 2)
    assert order == ["c", "b", "a", "a", "b", "c"]
    assert found == {"a": [3, 4], "b": [2, 5], "c": [1, 6]}
    # 2, 3 and 4: the quartiles are 2.5 and 3.5.
    assert turns.ratio([2, 6, 12], [1, 2, 3]) == (3, pytest.approx(0.5 / 3))
    middle, spread = turns.ratio([2], [4])
    assert middle == 0.5 and math.isnan(spread)


def test_one_thread_is_timed_by_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns.time, "thread_time", lambda: 1.0)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: 2.0)
    for threads, expected in ((1, 1.0), (2, 2.0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert turns.clock(CPU) == expected


def run(main: Callable[..., None], *words: str) -> Any:
    return CliRunner().invoke(program.command(main), words, env={"COLUMNS": "300", "TERM": "dumb"})


def test_skipping_in_one_turn_has_no_spread(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ["--layers", "2", "--images", "1", "--turns", "1", "--steps", "1", "--json", str(file)]
    done = run(skipping.main, *words)
    assert done.exit_code == 0, done.output
    row = json.loads(file.read_text())["rows"][0]
    # Every other layer works on a fifth, rounded, of the pictures' tokens.
    assert row["tokens_by_layer"]["dense"][0] - 576 + 115 == row["tokens_by_layer"]["mod"][1]
    line = done.output.splitlines()[-1]
    assert line.startswith("| 1 | 576 |") and "±" not in line and "nan" not in line


def test_decode_checks_and_measures_peaks() -> None:
    tiny = ["--shape", "small-gqa", "--batch", "1", "--tokens", "32", "--text", "8"]
    done = run(decode.main, *tiny, "--repeat", "1", "--steps", "1", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "Time, floor, in place = 1:" in done.output and "equal / formula" in done.output
    done = run(decode.main, *tiny, "--memory", "--steps", "2", "--device", "cpu")
    assert done.exit_code == 0, done.output
    *_, filling = (line for line in done.output.splitlines() if line.startswith("| small-gqa"))
    dense, masked, floor, *cuts = (float(cell) for cell in filling.split("|")[2:-1])
    assert floor < dense <= masked and max(cuts) <= dense


def test_host_cost_compares_two_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    once = cache(host_cost.turn)

    def turn(folder: Path, *sizes: int) -> Any:
        """Both are this checkout, of which one process serves."""
        asked.append(folder)
        return once(folder, *sizes)

    monkeypatch.setattr(host_cost, "turn", turn)
    words = ["--times", "1", "--tokens", "1", "--rounds", "1", "--layers", "3"]
    out = tmp_path / "out.json"
    done = run(host_cost.main, *words, "--before", str(ROOT), "--json", str(out))
    assert done.exit_code == 0, done.output
    assert asked == [ROOT, ROOT] and once.cache_info().misses == 1
    found = json.loads(out.read_text())["found"]
    assert found["now"].keys() == found["before"].keys() >= {"MHA", "GQA", "64 pictures, all kept"}
    counted = found["now"]["GQA, operations"]
    assert counted["PLPHP"]["first token"][0] > counted["FastV"]["step"][0]
    # A single pair of calls may differ by anything, on a machine that does other things too.
    steps = [ratio for one in found["now"]["MHA"].values() for ratio in one["step"]]
    assert len(steps) == len(counted) > 3 and all(map(math.isfinite, steps)) and all(steps)
    heads = [cell.strip() for cell in done.output.splitlines()[2].split("|")]
    assert heads[4:7] == ["time", "before", "now / before"]


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (host_cost.main, ["--rounds", "0"], "greater than or equal to 1"),
        (host_cost.main, ["--before", "nowhere"], "is no checkout of vlmprune"),
        (skipping.main, ["--turns", "0"], "greater than or equal to 1"),
        (skipping.main, ["--steps", "0"], "greater than or equal to 1"),
        (skipping.main, ["--shape", "huge"], "shape 'huge' is unknown"),
        (skipping.main, ["--dtype", "int8"], "dtype 'int8' is unknown"),
        (selection.main, ["--repeat", "0"], "greater than or equal to 1"),
        (selection.main, ["--keep", "66"], "lists of odd length"),
        (contract.main, ["--rounds", "0"], "greater than or equal to 1"),
        (contract.main, ["--tokens", "0"], "greater than or equal to 1"),
        (decode.main, ["--repeat", "0"], "greater than or equal to 1"),
        (decode.main, ["--shape", "huge"], "--shape must be one of"),
        (decode.main, ["--memory", "--attention-only"], "choose one"),
        (decode.main, ["--r", "0.9"], "must lie within 0 and 1"),
    ],
)
def test_mistakes_are_told(main: Any, words: list[str], message: str) -> None:
    done = run(main, *words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_peaks_of_every_choice_by_a_rule_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "peaks.json"
    done = run(selection.main, "--memory", "--tokens", "256", "--json", str(file))
    assert done.exit_code == 0, done.output
    measured = {row["method"]: row["choosing"] for row in json.loads(file.read_text())}
    learned = {name for name, cls in METHODS.items() if issubclass(cls, Learned)}
    assert set(METHODS) - set(measured) == {*learned, "recall"}
    assert measured["fastervlm"] < measured["vispruner"]
