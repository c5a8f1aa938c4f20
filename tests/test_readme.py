"""What the README shows is what the commands print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repository import ROOT
from tiny import model, request
from vlmprune import embedded
from vlmprune.io.pictures import open_image

sys.path.insert(0, str(ROOT / "scripts"))

import first_run

README = (ROOT / "README.md").read_text(encoding="utf-8")


def telling(text: str) -> list[str]:
    """Lines without what differs from run to run and from machine to machine: times and types."""
    lines = [
        re.sub(r"(sooner|faster) [ \d.x]+$", r"\1", line.rstrip()) for line in text.splitlines()
    ]
    measured = ("type: ", "medians of ", "quick, so", "choosing takes", first_run.BUSY)
    return [line for line in lines if line and not line.startswith(measured)]


def test_the_demo_prints_what_the_readme_shows(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one of the shape's decoder layers, which changes no line but those of times."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_run, "QUICK", (1, 2))
    shown = re.search(r"```\n\$ make demo\n(.*?)```", README, re.DOTALL)[1]
    first_run.main(["--quick"])
    printed = capsys.readouterr().out
    assert telling(shown) == telling(printed)
    assert len(telling(shown)) > 30
    assert "quick, so not the whole model: 1 of 24" in printed and "quick, so" not in shown
    # The README's picture is the one that is drawn.
    with Image.open(tmp_path / first_run.DRAWN) as drawn, Image.open(ROOT / "docs/kept.png") as old:
        assert drawn.size == old.size
        # Which of many alike is kept as a diverse one hangs on the processor's last digits.
        differ = (np.asarray(drawn) != np.asarray(old)).any(axis=2).mean()
        plain = open_image(embedded.scenes() / first_run.SCENE).resize(drawn.size)
        bare = (np.asarray(plain) != np.asarray(old)).any(axis=2).mean()
        assert differ < 64 / 256 < 192 / 256 <= bare


def test_make_runs_the_demo() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (runs,) = re.findall(r"^demo: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert runs.endswith("\t@$(VENV)/bin/python scripts/first_run.py $(if $(QUICK),--quick)\n")


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
