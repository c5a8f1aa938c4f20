"""Without the embedded model: what needs it names one line, which installs it; the rest works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commandline import COFFEE, QUESTION, call, sentence
from repository import ROOT
from training_data import written
from vlmprune import QueCC, embedded
from vlmprune.io import models

# Before a test hides the package.
FOLDER = embedded.path()
# One answer of each, and no more: that there is one is what is asked.
BRIEF = ("--repeat", "1", "--decode-tokens", "0")


@pytest.fixture
def own() -> Path:
    """A folder with a model, for `--model`."""
    return FOLDER


def forbidden(*_: object) -> None:
    raise AssertionError("a model was loaded")


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package cannot be imported, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "vlmprune_embedded", None)
    monkeypatch.setenv("COLUMNS", "200")


def test_the_sentence() -> None:
    (line,) = re.findall("`(.*?)`", embedded.MISSING)
    assert line == "pip install ./packages/vlmprune-embedded"
    assert (ROOT / "packages" / "vlmprune-embedded" / "pyproject.toml").is_file()
    assert embedded.MISSING.count(".\n") == 0 and embedded.MISSING.endswith(" repository.")


@pytest.mark.parametrize(
    "words",
    [
        ("run", COFFEE, QUESTION),
        ("run", COFFEE, QUESTION, "--method", "quecc:weights=embedded-s4"),
        ("compare",),
        ("compare", COFFEE, "--question", QUESTION),
        ("eval",),
        ("eval", "--task", "scenes", "--model", "MODEL"),
        ("eval", "--task", "clips", "--model", "MODEL"),
        ("eval", "--method", "mod:weights=embedded-mod", "--model", "MODEL"),
        ("bench",),
        ("bench", "--model", "MODEL"),
        ("search", "vispruner", "--model", "MODEL"),
        ("search", "vispruner", "--task", "folder:tasks"),
        ("calibrate",),
        ("calibrate", COFFEE),
        ("train", "quecc", "--data", "DATA", "--out", "RUN"),
        ("train", "quecc", "--data", "DATA", "--out", "RUN", "--from", "embedded-s4"),
    ],
    ids=lambda words: " ".join(words).replace(COFFEE, "IMAGE"),
)
@pytest.mark.usefixtures("missing")
def test_a_command_that_needs_it_says_so_before_any_work(
    words: tuple[str, ...], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictured = {"image": COFFEE, "conversations": []}
    pictured["conversations"] = [
        {"from": "human", "value": f"<image>\n{QUESTION}"},
        {"from": "gpt", "value": "nowhere."},
    ]
    data = written(tmp_path, [pictured])
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "tasks").mkdir()
    task = [{"image": COFFEE, "question": QUESTION, "answers": ["nowhere."]}]
    (work / "tasks" / "questions.json").write_text(json.dumps(task))
    monkeypatch.setattr(models, "load", forbidden)
    named = {"MODEL": own, "DATA": data}
    done = call(*(named.get(word, word) for word in words))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"vlmprune: {embedded.MISSING}\n"
    assert [one.name for one in work.rglob("*") if one.is_file()] == ["questions.json"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--help",), "calibrate"),
        (("plan", "llava-next-7b", "--keep", "29"), "2928 → 193"),
        (("methods",), None),
        (("methods", "quecc"), None),
        (("models",), None),
        (
            ("run", COFFEE, QUESTION, "--model", "MODEL", "--max-new-tokens", "4", *BRIEF),
            "visual tokens",
        ),
        (("bench", "--shape", "small", "--layers", "1", "--repeat", "1"), "small shape"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("missing")
def test_a_command_that_does_not_need_it_works(
    words: tuple[str, ...], expected: str | None, own: Path
) -> None:
    done = call(*(own if word == "MODEL" else word for word in words))
    assert done.exit_code == 0, done.output
    # Lists name the line where they would name what comes with the model.
    assert (expected or "`pip install ./packages/vlmprune-embedded`") in " ".join(
        done.stdout.split()
    )


@pytest.mark.usefixtures("missing")
def test_lists_name_nothing_that_is_not_there() -> None:
    assert "embedded-" not in call("methods").stdout.replace("vlmprune-embedded", "")
    assert json.loads(call("models", "--json").stdout)["embedded"] is None
    (one,) = json.loads(call("methods", "quecc", "--json").stdout)["methods"]
    assert one["weights"] == []


@pytest.mark.usefixtures("missing")
def test_weights_that_are_not_those_of_the_embedded_model(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another name is told as what it is, and a folder of one's own works, whatever its name."""
    told = sentence("run", COFFEE, QUESTION, "--method", "quecc:weights=mine")
    assert "weights='mine' of quecc is no folder" in told
    assert "no named ones are installed" in told
    (tmp_path / "embedded-s4").symlink_to(own.parent / "learned" / "embedded-s4")
    monkeypatch.chdir(tmp_path)
    assert QueCC("embedded-s4").settings["window"] == 4


def test_an_interpreter_without_it(tmp_path: Path) -> None:
    """Nothing that is imported on the way to a command imports it."""
    blocked = "import sys; sys.modules['vlmprune_embedded'] = None; "
    code = f"{blocked}from vlmprune.cli import main; sys.argv[0] = 'vlmprune'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", COFFEE, QUESTION],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"vlmprune: {embedded.MISSING}\n"


def test_another_module_that_is_missing_is_not_taken_for_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "vlmprune_embedded.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vlmprune_embedded", raising=False)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        embedded.path()


def test_the_line_installs_it(tmp_path: Path) -> None:
    """The line itself, in a clone, into an empty environment; the library then finds it there."""
    home = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    line = re.findall("`(.*?)`", embedded.MISSING)[0]
    paths = {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
    surroundings = os.environ | paths | {"VIRTUAL_ENV": str(home)}
    done = subprocess.run(
        line, shell=True, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (site,) = home.glob("lib/python*/site-packages")

    # The library of the tests, which comes first where it is no installed one, and that site.
    library = Path(embedded.__file__).parents[1]
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, library)))}
    code = "from vlmprune import embedded; print(embedded.path(), embedded.learned())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=surroundings,
        capture_output=True,
        text=True,
        check=True,
    )
    model, learned = map(Path, told.stdout.split())
    assert model == site / "vlmprune_embedded" / "model"
    assert len(list(learned.glob("*/config.json"))) == 7
    files = {one.relative_to(site) for one in (site / "vlmprune_embedded").rglob("*.*")}
    own = embedded.path().parents[1]
    assert {one.relative_to(own) for one in own.glob("vlmprune_embedded/**/*.jpg")} <= files

    asked = ["run", str(model.parent / "scenes" / "coffee.jpg"), QUESTION, "--json", *BRIEF]
    ran = subprocess.run(
        [sys.executable, "-m", "vlmprune", *asked],
        cwd=tmp_path,
        env=surroundings | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["model"] == str(model)
