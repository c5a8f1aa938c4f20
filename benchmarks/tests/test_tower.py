"""The program that times a shorter encoder: its ways, what it stores, and its table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tower
from program import command
from vlmprune import EViT, ToMe, VisPruner


def test_ways_are_chains_with_vispruner_behind() -> None:
    found = tower.ways()
    assert found.pop("unpruned") is None
    assert found["VisPruner(64)"] == VisPruner(64)
    assert found["EViT(0.25) \\| VisPruner(32)"] == EViT(0.25) | VisPruner(32)
    assert found["ToMe(0.5) \\| VisPruner(64)"] == ToMe(0.5) | VisPruner(64)
    assert len(found) == 2 * (1 + 4)


def test_pictures_are_of_other_scenes_and_kinds() -> None:
    asked = tower.pictures(6)
    assert len({one.group for one in asked}) == 6 and len({one.kind for one in asked}) > 3


def test_the_table_by_hand() -> None:
    def way(seconds: list[float], scores: str, flops: float, tokens: float) -> dict[str, Any]:
        return {"seconds": seconds, "scores": scores, "flops": flops, "tokens": tokens}

    found = {
        "setting": {
            "device_name": "A CPU",
            "threads": 1,
            "versions": {"torch": "2"},
            "pictures": 3,
            "tokens": 4,
        },
        # One question about each of a dozen scenes.
        "samples": [[f"{n}", "count", f"scene {n}"] for n in range(12)],
        "ways": {
            "unpruned": way([2.0, 4.0, 8.0], "1" * 12, 1.0, 256),
            "VisPruner(64)": way([1.0, 2.0, 4.0], "1" * 12, 0.9, 64),
            "EViT(0.5) \\| VisPruner(64)": way([0.5, 1.0, 2.0], "0" * 12, 0.4567, 63.6),
        },
    }
    lines = tower.markdown(found).splitlines()
    assert lines[2:5] == [
        "| unpruned | 1 |  | 100 % | 256 | 100.0 ± 0.0 |  |",
        "| VisPruner(64) | 0.50 ± 0.00 |  | 90 % | 64 | 100.0 ± 0.0 |  |",
        "| EViT(0.5) \\| VisPruner(64) | 0.25 ± 0.00 | 0.50 ± 0.00 | 46 % | 64 | 0.0 ± 0.0 "
        "| -100.0 ± 0.0 |",
    ]
    assert "times of 3 pictures" in lines[-1] and "12 questions about 12 scenes" in lines[-1]


def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "AFTER", (64,))
    monkeypatch.setattr(tower, "FRACTIONS", (0.25,))
    file = tmp_path / "tower.json"
    words = ["--count", "2", "--questions", "70", "--json", str(file)]
    done = CliRunner().invoke(command(tower.main), words)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert len(found["samples"]) == 70 and len(found["ways"]) == 4
    plain, *others = found["ways"].values()
    assert plain["tokens"] == 256 and plain["flops"] == 1
    for one in found["ways"].values():
        assert len(one["scores"]) == 70 and len(one["seconds"]) == 2
        assert all(second > 0 and math.isfinite(second) for second in one["seconds"])
    alone, tome, evit = others
    assert [one["tokens"] for one in others] == [64, 64, 64]
    # Nine tenths are the encoder's, of which VisPruner leaves all.
    assert alone["flops"] > 0.9 and evit["flops"] < tome["flops"] < 0.65
    assert tower.markdown(found) in done.output
