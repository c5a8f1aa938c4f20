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
from vlmprune import VisPruner, VlmpruneError
from vlmprune.study import measure
from vlmprune.study.bench import run as bench
from vlmprune.study.bench import shapes


def commands(folder: Path, small: bool, **settings: str) -> tuple[list[list[str]], Any]:
    """What the script would have Python do, and how the script ended."""
    log, stub = folder / "log", folder / "python"
    stub.write_text(STUB.format(log=log))
    stub.chmod(0o755)
    names = {"PYTHON": str(stub), "RESULTS": str(folder), "DOCS": str(folder)}
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
    if not small:
        # On a GPU its tests come first.
        tests = found.pop(0)
        assert tests[:4] == ["-m", "pytest", "-m", "cuda"] and str(tmp_path / "gpu") in tests[-1]
    assert [one[0] for one in found] == [
        *["-m"] * 3,
        *(f"benchmarks/{name}.py" for name in ("selection", "decode", "compiled", "render")),
    ]
    # What is written is read there.
    assert all(str(tmp_path / "gpu") in one[-1] for one in found[:-1])
    assert found[-1][1:] == ["--results", str(tmp_path), "--docs", str(tmp_path)]
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


VERSIONS = {"torch": "2", "transformers": "5"}
SETTING = {"device_name": "a GPU", "threads": 1, "dtype": "bfloat16", "versions": VERSIONS}
SELECTION = {
    "setting": SETTING,
    "seconds_are": "measured on a GPU",
    "results": [
        {
            "crops": 5,
            "selection": [4.0, 0.1],
            "tower": [1.5, 0.02],
            "tap_share_of_tower": 0.002,
            "tap_share_by_whole_towers": 0.001,
            "same_choice_on_clear_inputs": True,
            "tokens_in_common_with_theirs": {
                **{"theirs": 64, "ours": 43},
                **{"ours, own tower": 42, "theirs, float64": 50},
            },
            "peak_bytes": {
                **{"selection, theirs": 60 * 2**20, "selection, ours": 20 * 2**20},
                **{"tower, theirs": 3 * 2**20, "tower, ours": 2**20},
            },
            "seconds": {"selection, ours": [0.001, 0.00125, 0.002], "tower, ours": [0.01]},
        }
    ],
}
DECODE = {
    "setting": SETTING | {"command": "decode.py", "backend": "auto"},
    "seconds_are": "measured on a GPU",
    "results": [
        {
            "shape": "llava-1.5-7b",
            "setting": {"batch": 16, "visual": 2880},
            "seconds": {"dense": [0.02, 0.04, 0.03], "floor": [0.01], "equal": [0.012]},
            "ratios": {"floor / dense": [0.5, 0.01], "equal / dense": [0.6, 0.01]},
            "held_bytes": {"dense": 2**30, "equal": 2**29, "adaptive": 2**29},
            "formula_bytes": {"equal": 2**28, "adaptive": 2**29},
        }
    ],
}


def test_the_section_is_made_of_the_files(content: dict[str, Any], tmp_path: Path) -> None:
    gpu = content | {"seconds_are": "measured on a GPU"}
    files = {"selection": SELECTION, "llava-1.5": gpu, "llava-next": gpu, "decode": DECODE}
    (tmp_path / "gpu").mkdir()
    for name, one in files.items():
        (tmp_path / "gpu" / f"{name}.json").write_text(json.dumps(one))
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- gpu -->\nold\n<!-- end gpu -->\nafter\n")
    render.main(tmp_path, tmp_path)
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
    assert "| 5 | 4.00 ± 0.40 (1.25 ms) | 1.50 ± 0.03 (10.00 ms) | 3.0 (60 → 20 MiB) |" in text
    assert "| 3.0 (3.0 → 1.0 MiB) | 0.20 % | 0.10 % |" in text
    assert "the same tokens on inputs" in text and "float64 50." in text
    assert "| llava-1.5-7b, 16 x 2880 | 30.00 | 10.00 | 12.00 |" in text
    assert "| llava-1.5-7b, 16 x 2880 | 0.50 ± 0.01 | 0.60 ± 0.01 |" in text
    assert "| llava-1.5-7b, 16 x 2880 | 1024 | 50.0% | 50.0% | 2.000 | 1.000 |" in text
    assert text.count("what choosing takes") == 1 and text.count("vlmprune bench …") == 2
    assert render.render(text, {"gpu": render.gpu(files)}) == text


def test_no_file_no_section(content: dict[str, Any], tmp_path: Path) -> None:
    dry = render.render("<!-- gpu -->\n<!-- end gpu -->\n", {"gpu": render.gpu({"dry": content})})
    assert "dry run" in dry and "On a GPU" not in dry and " ms" not in dry
    for name in ("benchmarks", "serving"):
        (tmp_path / f"{name}.md").write_text(dry.replace(" gpu", " serve") + dry)
    render.main(tmp_path / "none", tmp_path)
    for name in ("benchmarks", "serving"):
        text = (tmp_path / f"{name}.md").read_text()
        # What is measured elsewhere alone may stand there without its file.
        assert text.endswith("<!-- gpu -->\n<!-- end gpu -->\n") == (name == "benchmarks")
        assert "dry run" in text
    with pytest.raises(VlmpruneError, match="no lines <!-- gpu -->"):
        render.render("nothing", {"gpu": ""})
