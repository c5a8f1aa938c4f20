"""A `keep` above what there is keeps all in every command, which says so or shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from commandline import COFFEE, QUESTION, call


def test_run_says_so() -> None:
    brief = ("--max-new-tokens", 2, "--device", "cpu", "--decode-tokens", 0, "--repeat", 1)
    result = call("run", COFFEE, QUESTION, "--keep", 257, *brief)
    assert result.exit_code == 0, result.output
    assert "1 crop(s) with fewer than keep, which keep all" in result.stdout
    made = json.loads(call("run", COFFEE, QUESTION, "--keep", 257, *brief, "--json").stdout)
    assert made["report"]["below_keep"] == {"crop": 1}
    assert made["full"]["answer"] == made["pruned"]["answer"]
    # Control: as many as there are is no more than there are.
    exact = call("run", COFFEE, QUESTION, "--keep", 256, *brief)
    assert exact.exit_code == 0 and "which keep all" not in exact.stdout


def test_plan_says_so() -> None:
    for keep, said in ((577, True), (576, False)):
        result = call("plan", "llava-1.5-7b", "--keep", keep)
        assert result.exit_code == 0, result.output
        told = " ".join(result.stdout.split())
        assert (f"have fewer tokens than --keep {keep}, and keep all" in told) is said
        found = json.loads(call("plan", "llava-1.5-7b", "--keep", keep, "--json").stdout)
        assert found["crops_below_keep"] == int(said) and found["visual_tokens_after"] == 576
    image = ("--budget", "image", "--json")
    found = json.loads(call("plan", "llava-next-7b", "--keep", 2881, *image).stdout)
    assert found["crops_below_keep"] == 5 and found["flops_saving"] == 0


def test_eval_compare_and_bench_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ("eval", "--keep", 257, "--limit", 1, "--no-baseline"),
        ("bench", "--method", "vispruner:keep=257", "--repeat", 1, "--new-tokens", 2),
        ("compare", "--methods", "random", "--keep", "257", "--limit", 1),
    ):
        result = call(*words, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert "more than the 256" not in result.output
