"""`scripts/first_run.py` compares two answers, and tells what `bench` measures."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commandline import call
from repository import ROOT
from vlmprune import embedded
from vlmprune.errors import VlmpruneError
from vlmprune.study.bench.results import BenchResult, Quartiles

sys.path.insert(0, str(ROOT / "scripts"))

import first_run


def silent(what: str) -> None:
    """No progress."""


def test_two_answers_are_compared(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = json.loads((embedded.scenes() / "scenes.json").read_text())
    (truth,) = [
        asked["answer"]
        for scene in listed
        for asked in scene["questions"]
        if (scene["file"], asked["question"]) == (first_run.SCENE, first_run.QUESTION)
    ]
    both = first_run.answered(silent)
    assert both.full.answer == both.pruned.answer == truth
    assert (both.full.visual_tokens, both.pruned.visual_tokens) == (256, 64)
    first_run.print_answer(both)
    said = capsys.readouterr().out
    assert said.count("the same") == 2 and "another" not in said
    with Image.open(first_run.DRAWN) as picture:
        assert picture.format == "PNG"
    # Of one token nothing can be answered; what is printed follows from the answers.
    few = first_run.answered(silent, keep=1)
    assert few.full.answer == truth != few.pruned.answer
    first_run.print_answer(few)
    said = capsys.readouterr().out
    assert said.count("another") == 2 and "the same" not in said
    assert few.pruned.answer.split()[0] in said


def test_the_times_are_those_of_bench(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """On one layer, and on two pictures in place of five."""
    monkeypatch.setattr(first_run, "VISUAL_TOKENS", (576, 1152))
    monkeypatch.setattr(first_run, "TURNS", (1, 1))
    results = first_run.timed(torch.float32, 1, 2, silent)
    words = "bench --shape llava-0.5b --layers 1 --tower-layers 2 --text-tokens 64 --new-tokens 1"
    words += " --visual-tokens 576 --method vispruner:keep=0.25 --repeat 1"
    done = call(*words.split(), "--dtype", "float32", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    (run,) = json.loads(done.stdout)["runs"]
    found = json.loads(json.dumps(results[0].as_dict()))
    same = ("visual_tokens", "visual_kv_bytes", "cache_bytes", "flops", "first_tokens")
    for mine, its in zip(
        [found["all_tokens"], *found["methods"], *found["floors"]],
        [run["all_tokens"], *run["methods"], *run["floors"]],
        strict=True,
    ):
        assert {name: mine[name] for name in same} == {name: its[name] for name in same}
    for result, tokens in zip(results, (576, 1152), strict=True):
        assert (result.model, result.prompt_tokens) == (run["model"], tokens + 64)
        counts = [way.visual_tokens for way in first_run.ways(result)]
        assert counts == [tokens, tokens // 4, tokens // 4]

    first_run.print_times(results, 0.5, 0.45)
    said = capsys.readouterr().out
    printed = re.findall(r"^  \S.*?((?:\d+\.\d+x *){3})$", said, re.MULTILINE)
    one, two = ([way.against(run.full) for way in first_run.ways(run)] for run in results)
    rows = [
        [against[f"{name}_speedup"] for against in ways]
        for name, ways in (("first_token", one), ("prefill", one), ("prefill", two))
    ]
    rows.append([first_run.fewer(results[1], way) for way in first_run.ways(results[1])])
    assert [line.split() for line in printed] == [[f"{n:.2f}x" for n in row] for row in rows]
    assert "1 of 24 decoder and 2 of 12 vision layers" in said
    # A CPU's seconds say nothing.
    assert not re.search(r"\d m?s\b|tok/s", said)

    # What differs though it is the same work is told, as is much other work, and nothing else.
    monkeypatch.setattr(first_run.os, "cpu_count", lambda: 2)
    for factor, load in ((1.0, 2.4), (1.1, 0.0), (1.5, 0.0), (0.5, 0.0), (1.0, 2.6)):
        monkeypatch.setattr(first_run.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        steady = [with_prefill(one, 100 * n) for one, n in zip(results, (1.0, factor), strict=True)]
        first_run.print_times(steady, 0.5, 0.45)
        assert (first_run.BUSY in capsys.readouterr().out) == (factor in (1.5, 0.5) or load > 2.5)


def with_prefill(result: BenchResult, pruned: float) -> BenchResult:
    """A result in which the floor's prefill takes 100 ms and the pruned one so many."""
    few, floor = (
        replace(way, prefill_ms=Quartiles.of([ms]))
        for way, ms in zip((*result.methods, *result.floors), (pruned, 100.0), strict=True)
    )
    return replace(result, methods=(few,), floors=(floor,))


def test_the_type_is_the_faster_one(monkeypatch: Any) -> None:
    for times, kind in (((8.0, 2.0), torch.bfloat16), ((2.0, 8.0), torch.float32)):
        left = iter([float("inf"), *[times[0]] * 5, float("inf"), *[times[1]] * 5])
        monkeypatch.setattr(first_run.measure.Stopwatch, "between", lambda *_, n=left: next(n))
        assert first_run.fastest() == (kind, times[1] / times[0])


def test_the_formula_is_that_of_the_shape() -> None:
    """Layers 896 wide with 2 of 14 heads for keys, and three products 4,864 wide."""

    def layer(n: int) -> int:
        return 4 * n * 896**2 + 4 * n * 896 * 128 + 4 * n * n * 896 + 6 * n * 896 * 4864

    class Way:
        def __init__(self, tokens: int) -> None:
            self.visual_tokens = tokens

    result: Any = type("Result", (), {"full": Way(2880)})
    few: Any = Way(720)
    assert first_run.fewer(result, few) == pytest.approx(layer(2880) / layer(720), rel=1e-9)


def test_a_file_of_another_is_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """Told before any work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_run, "answered", None)
    (tmp_path / "mine.json").write_text("{}")
    for words in (["--json", "mine.json"], ["--json", "mine.txt"]):
        with pytest.raises(VlmpruneError, match="mine"):
            first_run.main(words)
    assert (tmp_path / "mine.json").read_text() == "{}"
