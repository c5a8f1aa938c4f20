"""What all commands have in common: help, mistyped names, paths, and what a terminal can show."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commandline import COFFEE, QUESTION, call, sentence
from vlmprune.cli import app
from vlmprune.cli.printing import encodable
from vlmprune.hosts import pretrained
from vlmprune.io import models, sources

COMMANDS = [one.name or one.callback.__name__ for one in app.registered_commands]


@pytest.fixture(autouse=True)
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", load)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_tells_types_of_what_takes_a_value(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = call(*[command] * bool(command), "--help").stdout
    assert "--help" in said and "<bool>" not in said and "BOOLEAN" not in said
    if command == "run":
        # Types of others stay.
        (line,) = [one for one in said.splitlines() if "--repeat" in one]
        assert "int" in line.lower()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("run", COFFEE, QUESTION, "--method", "vispuner"), "vispruner"),
        (("run", COFFEE, QUESTION, "--method", "vispruner:kep=4"), "keep"),
        (("run", COFFEE, QUESTION, "--method", "plphp:form=a.json"), "from"),
        (("run", COFFEE, QUESTION, "--dtype", "float23"), "float32"),
        (("run", COFFEE, QUESTION, "--budget", "corp"), "crop"),
        (("run", COFFEE, QUESTION, "--positions", "compct"), "compact"),
        (("run", COFFEE, QUESTION, "--newlines", "dorp"), "drop"),
        (("compare", "--methods", "random,vispuner"), "vispruner"),
        (("eval", "--task", "scnes"), "scenes"),
        (("eval", "--task", "poep:somewhere"), "pope"),
        (("search", "fatsv"), "fastv"),
        (("search", "vispruner", "--cost", "flop"), "flops"),
        (("search", "vispruner", "--over", "kep=0.1..0.5"), "keep"),
        (("train", "quec", "--data", "d.json", "--out", "r"), "quecc"),
        (("bench", "--shape", "smal"), "small"),
        (("plan", "llava-1.5-7"), "llava-1.5-7b"),
        (("plan", "--compute-budget", "vicuna-7@576"), "vicuna-7b"),
        (("methods", "recal"), "recall"),
        (("bnech",), "bench"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[-2:]),
)
def test_a_mistyped_name_is_told_what_was_meant(words: tuple[str, ...], name: str) -> None:
    said = sentence(*words)
    assert f"id you mean {name!r}?" in said
    # A name that is far from all of them gets no advice.
    mistyped = words[-1] if words[0] != "train" else "quec"
    far = [one.replace(mistyped, "qqqqq") for one in words]
    assert "you mean" not in sentence(*far)


@pytest.mark.parametrize(
    "words",
    [
        ("run", COFFEE, QUESTION, "--model", "~nouser/m"),
        ("run", COFFEE, QUESTION, "--save-overlay", "~nouser/o.png"),
        ("run", COFFEE, QUESTION, "--method", "plphp:from=~nouser/p.json"),
        ("run", COFFEE, QUESTION, "--method", "quecc:weights=~nouser/w"),
        ("bench", "--out", "~nouser/b.json"),
        ("compare", "--out", "~nouser/c"),
        ("compare", "--html", "~nouser/c.html"),
        ("eval", "--out", "~nouser/a.jsonl"),
        ("eval", "--markdown", "~nouser/a.md"),
        ("eval", "--task", "folder:~nouser/f"),
        ("eval", "--task", "pope:~nouser/f"),
        ("eval", "--task", "~nouser/f"),
        ("search", "vispruner", "--out", "~nouser/s.json"),
        ("calibrate", "--out", "~nouser/p.json"),
        ("calibrate", "--plot", "~nouser/p.png"),
        ("train", "quecc", "--data", "~nouser/d.json", "--out", "r"),
        ("plan", "~nouser/m"),
    ],
    ids=lambda words: " ".join(words[-2:]),
)
def test_a_user_who_is_not_known(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = sentence(*words)
    assert "~nouser/" in said and "write the path out" in said
    assert not list(tmp_path.iterdir())


LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("run", LONG, QUESTION),
        ("run", COFFEE, QUESTION, "--model", LONG),
        ("run", COFFEE, QUESTION, "--model", f"./{LONG}"),
        ("run", COFFEE, QUESTION, "--save-overlay", f"{LONG}.png"),
        ("run", COFFEE, QUESTION, "--save-overlay", f"{LONG}/o.png"),
        ("run", COFFEE, QUESTION, "--method", f"plphp:from={LONG}"),
        ("run", COFFEE, QUESTION, "--method", f"quecc:weights={LONG}"),
        ("bench", "--images", f"{LONG}.jpg"),
        ("bench", "--out", f"{LONG}.json"),
        ("compare", LONG, "--question", QUESTION),
        ("compare", "--out", LONG),
        ("eval", "--task", f"folder:{LONG}"),
        ("eval", "--task", f"pope:{LONG}"),
        ("eval", "--task", LONG),
        ("search", "vispruner", "--out", f"{LONG}.json"),
        ("calibrate", LONG),
        ("calibrate", "--out", f"{LONG}.json"),
        ("train", "quecc", "--data", LONG, "--out", "r"),
        ("plan", LONG),
    ],
    ids=lambda words: " ".join(words[-2:]).replace(LONG, "LONG"),
)
def test_a_name_that_is_too_long(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "xxx" in sentence(*words)
    assert not list(tmp_path.iterdir())


def test_what_the_system_refuses_of_a_path_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/a")

    monkeypatch.setattr(sources, "find_model", refuses)
    said = sentence("run", COFFEE, QUESTION)
    assert "'/somewhere/a' cannot be read (Permission denied)" in said


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loaders ask six times over, which takes a minute; nothing listens at this address."""
    from huggingface_hub import constants

    asked: list[bool] = []

    def config_of(name: str, local: bool) -> Any:
        asked.append(local)
        raise OSError("not there. Neither here")

    monkeypatch.setattr(pretrained, "config_of", config_of)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = sentence("run", COFFEE, QUESTION, "--model", "owner/name")
    assert "'owner/name'" in said and "the Hub does not answer" in said
    monkeypatch.setattr(pretrained, "reachable", lambda: True)
    said = sentence("run", COFFEE, QUESTION, "--model", "owner/name")
    assert "the Hub (not there)" in said
    assert asked == [True, False]


def test_a_model_of_the_cache_is_loaded_from_it_where_the_hub_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import LlavaConfig

    monkeypatch.setattr(pretrained, "config_of", lambda name, local: LlavaConfig())
    for answers in (False, True):
        monkeypatch.setattr(pretrained, "reachable", lambda answers=answers: answers)
        source = sources.find_model("owner/name")
        assert (source.local, source.model_type) == (not answers, "llava")


def printed(encoding: str, text: str) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    encodable(stream)
    stream.write(text)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_a_terminal_that_lacks_characters() -> None:
    text = "2928 → 193 … – × é 日 \udcff"  # noqa: RUF001 - as tables have them
    with pytest.raises(UnicodeEncodeError):
        text.encode("latin-1")
    assert printed("latin-1", text) == r"2928 > 193 ~ - × é \u65e5 \udcff"  # noqa: RUF001
    assert printed("ascii", text) == r"2928 > 193 ~ - x e\u0301 \u65e5 \udcff"
    assert printed("utf-8", text) == text.replace("\udcff", r"\udcff")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_commands_print_there(encoding: str) -> None:
    """Columns stay where they are, and JSON says the same."""
    env = os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": encoding}

    def out(words: tuple[str, ...], **more: str) -> str:
        command = [sys.executable, "-m", "vlmprune", *words]
        ran = subprocess.run(command, capture_output=True, env=env | more, timeout=300)
        assert (ran.returncode, ran.stderr) == (0, b"")
        return ran.stdout.decode(more.get("PYTHONIOENCODING", encoding))

    words = ("plan", "llava-next-7b", "--keep", "29")
    plain, usual = out(words), out(words, PYTHONIOENCODING="utf-8")
    assert "2928 > 193" in plain and "2928 → 193" in usual
    assert list(map(len, plain.splitlines())) == list(map(len, usual.splitlines()))
    assert json.loads(out((*words, "--json"))) == json.loads(call(*words, "--json").stdout)


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors as shells do")
@pytest.mark.parametrize("closed", [1, 2])
def test_a_stream_that_the_shell_closed(closed: int) -> None:
    command = [sys.executable, "-m", "vlmprune", "plan", "llava-1.5-7b"]
    ran = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], capture_output=True, timeout=300
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert (b"8.02" in ran.stdout) == (closed == 2)
