"""All commands that write files, by one table: nobody else's file is overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from commandline import COFFEE, QUESTION, sentence
from training_data import SIDE, listed
from vlmprune.cli import app
from vlmprune.errors import VlmpruneError
from vlmprune.io import models
from vlmprune.io.outputs import Output
from vlmprune.study.bench import workload

LEARNED, EVALUATION = "vlmprune learned 1", "vlmprune evaluation 1"


@dataclass(frozen=True)
class Row:
    """A command with all files that it writes.

    Attributes:
        words: of the command line.
        files: each with the mark that it bears.
        placed: the folder is the user's to make; else the command makes it.
    """

    words: tuple[Any, ...]
    files: dict[str, str]
    placed: bool = True


def _of(command: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"vlmprune {command}")


DATA = "data.json"
ROWS = [
    Row(("run", COFFEE, QUESTION, "--save-overlay", "o.png"), _of("run", "o.png")),
    Row(
        ("run", COFFEE, COFFEE, QUESTION, "--save-overlay", "o.jpg"),
        _of("run", "o-1.jpg", "o-2.jpg"),
    ),
    Row(
        ("run", COFFEE, COFFEE, QUESTION, "--method", "recall", "--save-recall", "o.gif"),
        _of("run", "o-1.gif", "o-2.gif"),
    ),
    Row(
        ("bench", "--out", "b.json", "--markdown", "b.md", "--plot", "b.png"),
        _of("bench", "b.json", "b.md", "b.png"),
    ),
    Row(
        ("compare", "--out", "c"),
        _of("compare", "c/compare.html", "c/compare.png", "c/compare.json"),
        placed=False,
    ),
    Row(("compare", "--html", "page.html"), _of("compare", "page.html")),
    Row(
        ("eval", "--out", "a.jsonl", "--markdown", "a.md"),
        {"a.jsonl": EVALUATION, "a.unpruned.jsonl": EVALUATION, "a.md": "vlmprune eval"},
    ),
    Row(
        ("search", "vispruner", "--out", "s.json"),
        _of("search", "s.json", "s.png", "s.journal"),
    ),
    Row(
        ("calibrate", COFFEE, "--question", QUESTION, "--out", "p.json"),
        _of("calibrate", "p.json", "p.png"),
    ),
    Row(
        ("calibrate", COFFEE, "--out", "p.json", "--plot", "q.png"),
        _of("calibrate", "p.json", "q.png"),
    ),
    Row(
        ("train", "quecc", "--data", DATA, "--side", SIDE, "--out", "r", "--cache", "t"),
        _of("train", "r/run.json", "r/curve.json", "r/curve.png", "t/states.json")
        | {"r/config.json": LEARNED, "r/model.safetensors": LEARNED},
        placed=False,
    ),
]
REACHED = "the model was reached"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, and no model: to get as far as loading one is to be let through."""

    def load(*_: Any) -> None:
        raise VlmpruneError(REACHED)

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(workload, "load", load)
    monkeypatch.chdir(tmp_path)
    Path(DATA).write_text(json.dumps(listed()))
    yield tmp_path


def _ours(name: str, mark: str) -> None:
    """Write a file as the command would, with nothing in it but the mark."""
    path, ending = Path(name), name.rpartition(".")[2]
    path.parent.mkdir(exist_ok=True)
    if ending in ("png", "jpg", "gif"):
        Output(path, mark).write_picture(Image.new("RGB", (9, 9)))
    elif ending == "safetensors":
        save_file({"x": torch.zeros(1)}, path, {"format": mark})
    else:
        path.write_text(
            {
                "json": json.dumps({"format" if mark == LEARNED else "made_by": mark}),
                "jsonl": json.dumps({"format": mark, "task": "t"}) + "\n",
                "journal": json.dumps({"op_code": 0, "study_name": "unpruned"}) + "\n",
                "md": f"<!-- {mark} -->\n",
                "html": f'<!DOCTYPE html>\n<meta name="generator" content="{mark}">\n',
            }[ending]
        )


def _theirs(name: str) -> bytes:
    """Write what somebody else might have there, and which speaks of the command."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    content = b'{"op_code": 0, "study_name": "mine"}'
    if name.endswith((".png", ".jpg", ".gif")):
        Image.new("RGB", (9, 9), "blue").save(path)
        return path.read_bytes()
    if not name.endswith("journal"):
        content = b"my notes on `vlmprune bench`, `vlmprune eval` and `vlmprune compare`"
    path.write_bytes(content)
    return content


by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.files))


@by_row
def test_a_file_of_somebody_elses_is_overwritten_by_force_alone(row: Row) -> None:
    contents = {}
    for name in row.files:
        contents[name] = _theirs(name)
        before = sorted(Path().rglob("*"))
        said = sentence(*row.words)
        assert repr(name) in said and "by --force" in said
        assert Path(name).read_bytes() == contents[name] and sorted(Path().rglob("*")) == before
        Path(name).rename(name + ".kept")
    for name in row.files:
        Path(name + ".kept").rename(name)
    assert REACHED in sentence(*row.words, "--force")
    assert {name: Path(name).read_bytes() for name in row.files} == contents


@by_row
def test_a_command_goes_over_its_own_files(row: Row) -> None:
    assert REACHED in sentence(*row.words)
    assert [one.name for one in Path().iterdir()] == [DATA]
    for name, mark in row.files.items():
        _ours(name, mark)
    assert REACHED in sentence(*row.words)


@by_row
def test_a_place_that_will_not_do_is_one_sentence_before_any_work(row: Row) -> None:
    for name in row.files:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).mkdir()
        assert f"{name!r} is a folder" in sentence(*row.words, "--force")
        Path(name).rmdir()
    os.mkfifo(name)
    assert f"{name!r} is no ordinary file" in sentence(*row.words, "--force")
    Path(name).unlink()
    if not row.placed:
        Path(name).parent.rmdir()
        Path(name).parent.touch()
        assert "for it is a file" in sentence(*row.words, "--force")
        return
    Path("absent").touch()
    said = sentence(*row.words[:-1], f"absent/{row.words[-1]}")
    assert "'absent' cannot be a folder, for it is a file" in said


def test_every_command_that_writes_has_the_option() -> None:
    commands: Any = typer.main.get_command(app)
    forcing = {
        name
        for name, command in commands.commands.items()
        if any("--force" in one.opts for one in command.params)
    }
    assert forcing == {row.words[0] for row in ROWS}
    assert {*commands.commands} - forcing == {"plan", "methods", "models"}


def test_names_that_clash_are_found_before_any_work() -> None:
    said = sentence("calibrate", COFFEE, "--out", "p.png", "--force")
    assert "'p.png' and 'p.png' are to be written and are one file" in said
    said = sentence("search", "vispruner", "--out", "s.journal")
    assert "are one file" in said
    said = sentence("train", "quecc", "--data", DATA, "--out", Path(DATA).parent, "--force")
    assert REACHED in said
    Path(DATA).rename("run.json")
    said = sentence("train", "quecc", "--data", "run.json", "--out", ".", "--force")
    assert "'run.json' is one of the files to be read" in said


def test_states_without_their_index_are_somebody_elses() -> None:
    (row,) = [row for row in ROWS if row.words[0] == "train"]
    Path("t").mkdir()
    Path("t/layer-3.npy").write_bytes(b"mine")
    assert "'t/layer-3.npy' is there already, and no states.json" in sentence(*row.words)
    assert REACHED in sentence(*row.words, "--force")
    assert Path("t/layer-3.npy").read_bytes() == b"mine"


def _started(*words: str, **given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlmprune", *words],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **given,
    )


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "llava-1.5-7b"),
        ("plan", "llava-1.5-7b", "--json"),
        (),
        ("--help",),
        ("plan", "--help"),
    ],
    ids=" ".join,
)
def test_a_closed_pipe_ends_a_command_without_a_word(words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = _started(*words, stdout=writing)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_the_first_line_of_a_command() -> None:
    line = f"{sys.executable} -m vlmprune plan llava-1.5-7b | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert ended.stdout.count("\n") == 1 and ended.stderr == ""
    assert ended.returncode in (0, 141)


@pytest.mark.parametrize("words", [("plan", "llava-1.5-7b"), ("plan", "llava-1.5-7b", "--json")])
def test_what_cannot_be_printed_is_one_sentence(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = _started(*words, stdout=full)
    assert ended.returncode == 2
    said = "'standard output' cannot be written (No space left on device); make room there, or"
    assert ended.stderr == f"vlmprune: {said} give another path.\n"
