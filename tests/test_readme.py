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
from vlmprune.study.bench import shapes

sys.path.insert(0, str(ROOT / "scripts"))

import first_run

README = (ROOT / "README.md").read_text(encoding="utf-8")


def telling(text: str) -> list[str]:
    """Lines without those that hold a time or a speed, which differ from run to run."""
    lines = [line.rstrip() for line in text.splitlines()]
    return [
        line for line in lines if line and not re.search(r"\d ms|\d tok/s|kept tokens drawn", line)
    ]


def shown() -> list[str]:
    """What the README shows of `make demo`: its three parts."""
    block = re.search(r"```\n\$ make demo\n(.*?)```", README, re.DOTALL)[1]
    first, middle, last = re.split(r"\n(?=llava-0.5b shape)|(?<=\n)(?=the same on LLaVA)", block)
    return [first, middle, last]


def test_the_demo_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, _, last = shown()
    kept = ["--save-overlay", str(tmp_path / "kept.png")]
    answered = CliRunner().invoke(app, [*first_run.question(), "--device", "cpu", *kept])
    planned = CliRunner().invoke(app, first_run.PLAN)
    assert answered.exit_code == planned.exit_code == 0
    assert telling(first) == telling(answered.stdout)
    assert telling(last) == [first_run.AFTER, *telling(planned.stdout)]
    assert len(telling(first)) > 8 and len(telling(last)) > 4


def test_the_ratios_of_the_demo_stand_in_the_readme_as_it_prints_them() -> None:
    """Times differ from run to run; the tokens and the words do not."""
    _, middle, _ = shown()
    found = [line for line in middle.splitlines() if line]
    weights = shapes.parameters(shapes.config_of(first_run.SHAPE))
    threads = int(re.search(r"(\d+) thread", found[0])[1])
    assert found[0] == first_run.heading(first_run.SHAPE, weights, torch.float32, "cpu", threads)
    assert found[-1] == first_run.FLOOR
    made: list[str] = []
    for images, keep, what in first_run.WORKS:
        part = found[1 + len(made) :][:4]
        ratios = [float(re.search(r"tokens +([0-9.]+)", line)[1]) for line in part[1:]]
        counts = (576 * images, keep * images, keep * images)
        names = ("all tokens", f"vispruner, keep={keep}", "floor")
        ways = [first_run.Way(*one) for one in zip(names, counts, ratios, strict=True)]
        made += first_run.lines(ways, images, what)
        # Rounded to two digits, a ratio's inverse may differ in its last.
        assert [line[:46] for line in part] == [line[:46] for line in made[-4:]]
    assert len(found) == len(made) + 2


def test_the_demo_measures_what_it_says() -> None:
    config = shapes.config_of("small", 1, 2)
    model = shapes.build(config, torch.device("cpu"), torch.float32)
    for images, keep, what in first_run.WORKS:
        full, pruned, floor = first_run.measured(model, images, keep, what, warm=False)
        assert full.tokens == 576 * images and pruned.tokens == floor.tokens == keep * images
        assert min(pruned.ms, floor.ms) > 0
        words = first_run.lines([full, pruned, floor], images, what)
        assert len(words) == 4 and "1.00" in words[1] and words[2].endswith("x")


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
