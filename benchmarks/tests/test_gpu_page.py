"""`benchmarks/gpu.sh` and the page made from what it writes. The script itself takes a minute.

`SMALL=1 sh benchmarks/gpu.sh` runs all of it on a CPU. Here its commands are recorded, and each is
given to the command line as far as the first piece of work.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import render
from commandline import call
from repository import ROOT
from shell import STUB, needs_shell
from tiny import model, request
from vlmprune import VisPruner
from vlmprune.study import measure
from vlmprune.study.bench import run as bench
from vlmprune.study.bench import shapes


def commands(folder: Path, small: bool, **settings: str) -> tuple[list[list[str]], Any]:
    """What the script would have Python do, and how the script ended."""
    log, stub = folder / "log", folder / "python"
    stub.write_text(STUB.format(log=log))
    stub.chmod(0o755)
    page = folder / "page.md"
    page.write_text("<!-- gpu -->\n<!-- end gpu -->\n")
    names = {"PYTHON": str(stub), "RESULTS": str(folder / "gpu"), "PAGE": str(page)}
    names |= {"SMALL": "1" if small else "", **settings}
    done = subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu.sh")],
        env={**os.environ, **names},
        capture_output=True,
        text=True,
    )
    parts = log.read_text().split("END\n")[:-1]
    return [part.splitlines() for part in parts], done


@needs_shell
@pytest.mark.parametrize("small", [True, False])
def test_the_scripts_commands_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    found, done = commands(tmp_path, small)
    assert done.returncode == 0, done.stderr
    assert [one[0] for one in found] == [
        *["-m"] * 3,
        *(f"benchmarks/{name}.py" for name in ("selection", "decode", "render")),
    ]
    made: list[str] = []

    class MadeError(Exception):
        pass

    def build(config: Any, *_: Any) -> Any:
        made.append(config.model_type)
        raise MadeError

    monkeypatch.setattr(shapes, "build", build)
    monkeypatch.setattr(shapes, "check_memory", lambda *_: None)
    for words in found[:3]:
        assert words[1] == "vlmprune"
        # No GPU is needed to read the options.
        given = ["cpu" if word == "cuda" else word for word in words[2:]]
        assert ("--layers" in given) == small
        assert isinstance(call(*given).exception, MadeError)
    assert made == ["llava_next", "qwen2_5_vl", "llava"]
    for word in ("--method", "vispruner:keep=128", "plphp:r=0.4,dr=0", "fastv:keep=0.11"):
        assert word in found[0]


@needs_shell
def test_what_did_not_fit_into_the_time_is_named(tmp_path: Path) -> None:
    found, done = commands(tmp_path, True, LIMIT="10")
    assert [one[0] for one in found] == ["benchmarks/render.py"]
    assert done.returncode == 1
    assert "not finished: llava-next.json (no time left) qwen2.5-vl.json" in done.stderr


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A tiny comparison as the command writes it."""
    built = model("llava")
    work = bench.Work(built, request(built, [1]).inputs, "tiny", 1)
    result = bench.compare(work, {"few": VisPruner(4)}, 2, 1, floor=True)
    about = {"command": "vlmprune bench …", "seconds_are": "of a CPU: use the ratios only"}
    made = {**about, **measure.facts(built.device), "attention": "sdpa", "runs": [result.as_dict()]}
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


SELECTION = {
    "setting": "a GPU",
    "seconds_are": "measured on a GPU",
    "results": [
        {
            "crops": 5,
            "selection_speedup": 4.0,
            "tower_speedup": 1.5,
            "tap_share_of_tower": 0.002,
            "peak_bytes": {"selection, theirs": 300, "selection, ours": 100},
            "seconds": {"selection, ours": 0.00125},
        }
    ],
}
DECODE = {
    "setting": {
        **{"device": "a GPU", "dtype": "bfloat16", "torch": "2", "transformers": "5"},
        "command": "decode.py",
    },
    "seconds_are": "measured on a GPU",
    "results": [
        {
            "shape": "llava-1.5-7b",
            "setting": {"batch": 16, "visual": 2880},
            "on_gpu": True,
            "seconds": {"dense": [0.02, 0.04, 0.03]},
            "ratios": {"floor / dense": [0.5, 0.01], "equal / dense": [0.6, 0.01]},
        }
    ],
}


def test_the_section_is_made_of_the_files(content: dict[str, Any], tmp_path: Path) -> None:
    gpu = content | {"seconds_are": "measured on a GPU"}
    files = {"selection": SELECTION, "llava-1.5": gpu, "llava-next": gpu, "decode": DECODE}
    (tmp_path / "gpu").mkdir()
    for name, one in files.items():
        (tmp_path / "gpu" / f"{name}.json").write_text(json.dumps(one))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu -->\nold\n<!-- end gpu -->\nafter\n")
    render.main(tmp_path / "gpu", page)
    text = page.read_text()
    assert text.startswith("before\n<!-- gpu -->\n## On a GPU\n")
    assert text.endswith("\n<!-- end gpu -->\nafter\n") and "\nold\n" not in text
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert heads == [
        "### LLaVA-NeXT-7B",
        "### LLaVA-1.5-7B",
        "### Selection and the tap",
        "### Decoding over a cut cache",
    ]
    assert "| 5 | 4.00x (1.25 ms) | 1.50x | 3.00x | 0.20 % |" in text
    assert "| llava-1.5-7b, 16 x 2880 | 30.00 | 0.50 | 0.60 |" in text
    assert text.count("what choosing takes") == 1 and text.count("vlmprune bench …") == 2
    again = render.render(text, files)
    assert again == text


def test_no_file_no_section(content: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(render.render("<!-- gpu -->\n<!-- end gpu -->\n", {"llava-1.5": content}))
    assert "dry run" in page.read_text() and "On a GPU" not in page.read_text()
    assert " ms" not in page.read_text()
    render.main(tmp_path / "none", page)
    assert page.read_text() == "<!-- gpu -->\n<!-- end gpu -->\n"


def test_the_committed_page_shows_the_committed_files() -> None:
    found = sorted(render.RESULTS.glob("*.json"))
    files = {one.stem: json.loads(one.read_text()) for one in found}
    text = render.PAGE.read_text()
    assert render.render(text, files) == text
