"""Build both distributions, install the wheels in an empty environment and use them there.

    python scripts/wheels.py         # in a temporary folder, outside the checkout
    python scripts/wheels.py FOLDER  # in a new folder, which is left there

In stages, each from a working folder outside the checkout: the library alone; with the embedded
model; and with the tests' extra, a copy of the tests, one file a room. Settings as of setup.sh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "packages" / "vlmprune-embedded"
# Bytes of the library's wheel.
MOST = 1_000_000
HOLDS = ("py.typed", "former/budget.py", "embedded.py")

# A file of tests for each room that has tests, and for what stands beside the rooms.
TESTED = (
    "cli/test_lists.py",
    "costs/test_plan.py",
    "draw/test_overlay.py",
    "hosts/test_parts.py",
    "integrations/test_arguments.py",
    "io/test_pictures.py",
    "methods/test_downsample.py",
    "pruner/test_base.py",
    "report/test_reading.py",
    "runtime/decoder/test_row_pass_report.py",
    "select/test_budget.py",
    "study/compare/test_plot.py",
    "training/test_data.py",
    "views/test_layout.py",
    "test_embedded.py",
    "test_spec.py",
)
# Rooms of tests that are run elsewhere.
ELSEWHERE = {"processors", "trainers", "vllm"}

# What an extra or a harness brings; a module may lack these, and nothing else.
OPTIONAL = ("optuna", "vllm", "lmms_eval", "vlmeval", "accelerate", "peft", "triton")
IMPORTS = f"""
import importlib, pkgutil, sys
import vlmprune
names = [one.name for one in pkgutil.walk_packages(vlmprune.__path__, "vlmprune.")]
lacking = {{}}
for name in names:
    if name == "vlmprune.__main__":
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in {OPTIONAL}:
            raise
        lacking[name] = missing
print(len(names), "modules,", len(lacking), "of them without", *sorted(set(lacking.values())))
"""
# Tests hold that every command that needs the embedded model says so.
MISTAKES = ("run {picture} what?", "compare", "eval --method quecc:weights=embedded-s4")


def build(tools: Path, project: Path, folder: Path) -> tuple[Path, Path]:
    """The sdist of a project, and the wheel that is built from it."""
    command = [str(tools), "-m", "build", "--no-isolation", "--outdir", str(folder), str(project)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def check(sdist: Path, wheel: Path) -> None:
    """What the library's distributions hold, and how large they are."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.2f} MB, {len(names)} files")
    if size >= MOST:
        sys.exit(f"the library's wheel has {size} bytes; less than {MOST} are allowed")
    templates = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "vlmprune").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".typed")
    }
    for name in (*(f"vlmprune/{one}" for one in HOLDS), *templates):
        if name not in names:
            sys.exit(f"the library's wheel lacks {name}")
    with tarfile.open(sdist) as archive:
        members = archive.getnames()
    for name in (*names, *members):
        if "vlmprune_embedded" in name or name.endswith((".jpg", "model.safetensors")):
            sys.exit(f"the library's distributions hold {name}")


class Place:
    """An environment with a working folder, both outside the checkout."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "env" / "bin" / "python"
        self.work = folder / "work"
        self.work.mkdir()
        leave = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.surroundings = {k: v for k, v in os.environ.items() if k not in leave}
        self.surroundings |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    def install(self, *requirements: str) -> None:
        """By pip."""
        command = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*command, *requirements], check=True, cwd=self.work)

    def run(self, *words: str | Path, code: int = 0, quiet: bool = True) -> str:
        """What a command of the environment prints; it must exit with a code."""
        program = self.python.with_name(str(words[0]))
        said = subprocess.PIPE if quiet else None
        done = subprocess.run(
            [program, *words[1:]],
            cwd=self.work,
            env=self.surroundings,
            stdout=said,
            stderr=said,
            text=True,
            check=False,
        )
        output = f"{done.stdout or ''}{done.stderr or ''}"
        if done.returncode != code:
            sys.exit(f"{' '.join(map(str, words))} exits with {done.returncode}:\n{output}")
        return output

    def check_home(self, module: str) -> None:
        """That a module is the installed one."""
        found = Path(self.run("python", "-c", f"import {module}; print({module}.__file__)").strip())
        if not found.is_relative_to(self.python.parents[1]):
            sys.exit(f"{module} is imported from {found}, which is outside the environment")


def alone(place: Place) -> None:
    """The library without extras and without the embedded model."""
    place.check_home("vlmprune")
    for command in ("--help", "plan llava-next-7b --keep 29", "methods", "models"):
        place.run("vlmprune", *command.split())
    print(place.run("python", "-c", IMPORTS).strip())
    picture = place.work / "picture.png"
    place.run(
        "python", "-c", f"from PIL import Image; Image.new('RGB', (9, 9)).save({picture.name!r})"
    )
    sentence = place.run("python", "-c", "from vlmprune import embedded as e; print(e.MISSING)")
    for words in MISTAKES:
        said = place.run("vlmprune", *words.format(picture=picture).split(), code=2)
        if said != f"vlmprune: {sentence}":
            sys.exit(f"vlmprune {words} does not say what is missing, but:\n{said}")


def together(place: Place) -> None:
    """With the embedded model: the README's run, on less of its shape, and a small comparison."""
    place.check_home("vlmprune_embedded")
    print(place.run("python", ROOT / "scripts" / "first_run.py", "--quick"))
    scenes = place.run("python", "-c", "from vlmprune import embedded; print(embedded.scenes())")
    picture, question = Path(scenes.strip()) / "coffee.jpg", "where is the cat?"
    print(place.run("vlmprune", "run", picture, question, "--save-overlay", "kept.png"))
    asked = "compare --methods random,vispruner --keep 0.25 --limit 8 --repeat 1 --out compared"
    print(place.run("vlmprune", *asked.split()))
    for name in (
        "demo-output/kept.png",
        "kept.png",
        "compared/compare.html",
        "compared/compare.png",
    ):
        if not (place.work / name).is_file():
            sys.exit(f"{name} was not written")


def tested(place: Place) -> None:
    """A copy of the tests, one file a room, on what is installed."""
    tests, copy = ROOT / "tests", place.work / "tests"
    rooms = {path.relative_to(tests).parts[0] for path in tests.glob("*/**/test_*.py")}
    lacking = sorted(rooms - ELSEWHERE - {name.partition("/")[0] for name in TESTED})
    if lacking:
        sys.exit(f"name a file of tests for {', '.join(lacking)} in TESTED of {__file__}")
    shutil.copytree(tests, copy, ignore=shutil.ignore_patterns("__pycache__"))
    # Pytest's settings, and what all tests share.
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, place.work)
    files = [copy / name for name in TESTED]
    place.check_home("vlmprune")
    options = ("-n", "auto", "-p", "no:cacheprovider")
    place.run("python", "-m", "pytest", *options, *files, quiet=False)


def main(folder: Path) -> None:
    """All stages, with their seconds."""
    start = time.monotonic()

    def step(what: str) -> None:
        print(f"\n{time.monotonic() - start:4.0f} s  {what}", flush=True)

    step("building")
    # Torch alone, in the way of all environments; the script also sees to it that venv is there.
    setup = ["sh", str(ROOT / "scripts" / "setup.sh"), str(folder / "env"), ""]
    subprocess.run(setup, check=True, cwd=ROOT, env=os.environ | {"BARE": "1"})
    place = Place(folder)
    tools = folder / "tools" / "bin" / "python"
    subprocess.run([place.python, "-m", "venv", folder / "tools"], check=True)
    subprocess.run([tools, "-m", "pip", "install", "-q", "build", "hatchling"], check=True)
    sdist, wheel = build(tools, ROOT, folder / "library")
    check(sdist, wheel)
    _, model = build(tools, EMBEDDED, folder / "embedded")
    print(f"{model.name}: {model.stat().st_size / 1e6:.1f} MB")
    step("the library alone")
    place.install(str(wheel))
    alone(place)
    step("with the embedded model")
    place.install(str(model))
    together(place)
    step("tests, one file a room")
    place.install(f"{wheel}[test]")
    tested(place)
    step("done")


def run(arguments: Iterable[str]) -> None:
    """In the folder that is named, or in a temporary one."""
    match list(arguments):
        case []:
            with tempfile.TemporaryDirectory(prefix="vlmprune-wheels-") as name:
                main(Path(name))
        case [name]:
            folder = Path(name).resolve()
            folder.mkdir(parents=True)
            main(folder)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    run(sys.argv[1:])
