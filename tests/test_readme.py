"""What the README shows is what the commands print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from repository import ROOT
from tiny import model, request
from vlmprune import embedded
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


def test_the_program_runs_as_it_stands(tmp_path: Path) -> None:
    """Word for word: its model is the embedded one, in the hub's cache under that name."""
    program = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    name = re.search(r'^name = "(.*)"$', program, re.M)[1]
    cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(embedded.path(), cached / "snapshots" / "0", copy_function=os.symlink)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    shutil.copy(embedded.scenes() / "coffee.jpg", tmp_path / "photo.jpg")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:vlmprune", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    answer, report = done.stdout.strip().splitlines()
    assert answer.endswith(".")
    assert report.startswith("VisPruner(keep=64,") and "256 → 64 visual tokens" in report


def test_the_snippets_run() -> None:
    built = model("llava_next")
    inputs = request(built, [1]).inputs
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    space: dict[str, Any] = {"model": built, "inputs": inputs}
    exec(blocks[1], space)
    # The tiny model's crops have 16 tokens.
    exec(blocks[2].replace("keep=64", "keep=6"), space)
    assert space["out"].shape[1] > inputs["input_ids"].shape[1]
    assert len(space["vision"]) == 1
    with torch.no_grad():
        assert built(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
