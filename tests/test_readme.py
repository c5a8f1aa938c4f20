"""What the README shows is what the commands print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from repository import ROOT
from tiny import model, request
from vlmprune.cli import app

README = (ROOT / "README.md").read_text(encoding="utf-8")


def telling(text: str) -> list[str]:
    """Lines without those that hold a time or a speed, which differ from run to run."""
    lines = [line.rstrip() for line in text.splitlines()]
    return [
        line for line in lines if line and not re.search(r"\d ms|\d tok/s|kept tokens drawn", line)
    ]


def test_the_demo_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    makefile = (ROOT / "Makefile").read_text()
    scene, question, keep = (
        re.search(rf"^{n} = (.*)$", makefile, re.M)[1] for n in ("SCENE", "QUESTION", "KEEP")
    )
    shown = re.search(r"```\n\$ make demo\n(.*?)```", README, re.DOTALL)[1]
    options = ["--keep", keep, "--device", "cpu"]
    options += ["--save-overlay", str(tmp_path / "kept.png")]
    first = CliRunner().invoke(app, ["run", str(ROOT / scene), question, *options])
    second = CliRunner().invoke(app, ["plan", "llava-next-7b", "--keep", "29"])
    assert first.exit_code == second.exit_code == 0
    assert telling(shown) == telling(first.stdout + second.stdout)
    assert len(telling(shown)) > 8


def test_the_snippets_run() -> None:
    built = model("llava_next")
    inputs = request(built, [1]).inputs
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    space: dict[str, Any] = {"model": built, "inputs": inputs}
    # The tiny model's crops have 16 tokens.
    exec(blocks[0].replace("keep=64", "keep=6"), space)
    assert space["out"].shape[1] > inputs["input_ids"].shape[1]
    exec(blocks[1], space)
    exec(blocks[2].replace("keep=64", "keep=6"), space)
    assert len(space["vision"]) == 1
    with torch.no_grad():
        assert built(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
