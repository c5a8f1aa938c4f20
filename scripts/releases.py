"""Run the tests on releases of Transformers, each laid over an environment that has the rest.

    python scripts/releases.py tested          # tests marked "oracle", on each allowed minor
    python scripts/releases.py tested 5.20     # on some
    python scripts/releases.py between         # a third of them, on each between the outermost
    python scripts/releases.py whole [5.20 …]  # the whole suite there
    python scripts/releases.py newest          # the whole suite on what the index has beyond them
    python scripts/releases.py move            # the same, and allow each minor that passes

Run by the Python of an environment in which the package is installed with its extra "test". A
release's environment holds Transformers, and what it needs in another version than that one has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-releases"
# Of how many parts of the tests one runs on a minor between the outermost.
SHARES = 3
# Where it stands which minors are allowed; tests hold that the places agree.
PLACES = {
    "pyproject.toml": '"transformers>={major}.{lowest},<{major}.{beyond}"',
    "src/vlmprune/hosts/release.py": 'TESTED = ">={major}.{lowest},<{major}.{beyond}"',
    "README.md": "transformers {major}.{lowest} to {major}.{last}",
    "docs/stability.md": "| Transformers | {major}.{lowest} to {major}.{last} |",
}


def allowed() -> tuple[int, int, int]:
    """(major, lowest minor, first minor that is not allowed) of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for one in project["project"]["dependencies"]:
        found = re.fullmatch(r"transformers>=(\d+)\.(\d+),<\1\.(\d+)", one)
        if found:
            return int(found[1]), int(found[2]), int(found[3])
    sys.exit("pyproject.toml allows no range of one major release, as transformers>=5.16,<5.25")


def environment(name: str, requirement: str) -> Path:
    """The Python of an environment with a release of Transformers, over the present one."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        own = sysconfig.get_path("purelib", vars={"base": str(folder)})
        below = sysconfig.get_path("purelib")
        # Behind its own packages, and with the .pth files of those below.
        line = f"import site; site.addsitedir({below!r})\n"
        (Path(own) / "zz_below.pth").write_text(line, encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "--upgrade", requirement], check=True)
    return python


def version(python: Path) -> str:
    """The release that an environment has."""
    code = "import importlib.metadata as m; print(m.version('transformers'))"
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def run(python: Path, *more: str, **settings: str) -> bool:
    """Whether the tests pass there."""
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"} | settings
    command = [str(python), "-m", "pytest", "-n", "auto", *more]
    return subprocess.run(command, cwd=ROOT, env=surroundings, check=False).returncode == 0


def tested(some: list[str], *more: str) -> bool:
    """The tests on each minor that is allowed, or on some; `more` is for pytest."""
    major, lowest, beyond = allowed()
    every = [f"{major}.{minor}" for minor in range(lowest, beyond)]
    odd = [minor for minor in some if minor not in every]
    if odd:
        sys.exit(f"{' '.join(odd)}: allowed are {' '.join(every)}")
    said, passed = [], True
    for minor in some or every:
        start = time.monotonic()
        python = environment(minor, f"transformers=={minor}.*")
        here = version(python)
        print(f"\ntransformers {here}", flush=True)
        good = run(python, *more)
        passed &= good
        word = "passed" if good else "FAILED"
        said.append(f"transformers {here:8} {word} in {time.monotonic() - start:.0f} s")
    print("\n" + "\n".join(said))
    return passed


def between() -> bool:
    """A third of the tests on each minor between the lowest and the last, where all run anyway.

    Another third on each, so that every test runs on at least two of them; those of `hosts`, which
    look at names and signatures, run on all.
    """
    major, lowest, beyond = allowed()
    passed = True
    for minor in range(lowest + 1, beyond - 1):
        share = f"--share={minor % SHARES}/{SHARES}"
        passed &= tested([f"{major}.{minor}"], "-m", "oracle", share)
    return passed


def newest(move: bool) -> bool:
    """The whole suite on each minor beyond those that are allowed, up to the first that fails."""
    major, lowest, beyond = allowed()
    here = version(environment("newest", "transformers"))
    first, last = (int(part) for part in here.split(".")[:2])
    if (first, last) < (major, beyond):
        print(f"The index has nothing beyond transformers {here}, which is allowed.")
        return True
    if first != major:
        sys.exit(f"The index has transformers {here}; another major release is allowed by hand.")
    for minor in range(beyond, last + 1):
        python = environment(f"{major}.{minor}", f"transformers=={major}.{minor}.*")
        print(f"\ntransformers {version(python)}, which is not allowed yet", flush=True)
        if not run(python, VLMPRUNE_UNTESTED="1"):
            return False
        if move:
            allow(major, lowest, minor, minor + 1)
        else:
            print("It passes. `make move-bound` allows it.")
    return True


def allow(major: int, lowest: int, before: int, after: int) -> None:
    """Write another first minor that is not allowed, wherever it stands."""
    texts = {}
    for name, form in PLACES.items():
        old, new = (
            form.format(major=major, lowest=lowest, beyond=n, last=n - 1) for n in (before, after)
        )
        text = (ROOT / name).read_text(encoding="utf-8")
        if old not in text:
            sys.exit(f"{name} does not say {old}")
        texts[name] = text.replace(old, new)
    for name, text in texts.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    print(f"transformers {major}.{after - 1} is allowed in {', '.join(PLACES)}; commit them.")
    print("docs/models.md is of the release before: scripts/survey.py makes it anew.")


def main(arguments: list[str]) -> bool:
    """What the command line asks for; whether it passed."""
    match arguments:
        case ["tested", *some]:
            return tested(some, "-m", "oracle")
        case ["between"]:
            return between()
        case ["whole", *some]:
            return tested(some)
        case ["newest"]:
            return newest(move=False)
        case ["move"]:
            return newest(move=True)
    sys.exit(__doc__)


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
