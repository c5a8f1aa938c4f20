"""The tree whose package is mutated, a copy of it, and pytest in a forked process."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Libraries that every process of tests would import anew: what the tests and the package import of
# these is imported before, and nothing of the package itself.
PRELOADED = (
    *("pytest", "hypothesis", "torch", "numpy", "transformers", "tokenizers", "safetensors", "PIL"),
    *("typer", "rich", "matplotlib", "jinja2", "jaxtyping", "beartype", "peft", "accelerate"),
)


@dataclass(frozen=True)
class Tree:
    """Where a repository is, and what in it is mutated.

    Attributes:
        root: of the repository.
        package: the import package under `src`.
        tests: folders of tests, as pytest is given them.
    """

    root: Path
    package: str
    tests: tuple[str, ...] = ("tests",)

    @property
    def source(self) -> Path:
        """The folder of the package."""
        return self.root / "src" / self.package

    def read(self, file: str) -> str:
        """A file of the package, named from `source`."""
        return (self.source / file).read_text(encoding="utf-8")

    def test_files(self) -> list[str]:
        """All files of tests, named from `root`; those that need vLLM are left out."""
        found = (path for folder in self.tests for path in (self.root / folder).rglob("test_*.py"))
        names = sorted(path.relative_to(self.root).as_posix() for path in found)
        return [name for name in names if not name.startswith("tests/vllm/")]


class Copy:
    """A copy of a package, in which one file at a time is another than in the tree."""

    def __init__(self, tree: Tree, folder: Path) -> None:
        self.tree, self.folder = tree, folder
        shutil.copytree(
            tree.source, folder / tree.package, ignore=shutil.ignore_patterns("__pycache__")
        )
        # Python tells compiled files by the second and the size of their source.
        self._second = int(time.time()) - 10_000_000

    @contextlib.contextmanager
    def holding(self, file: str, text: str) -> Iterator[None]:
        """For a block, `file` of the copy holds `text`."""
        path = self.folder / self.tree.package / file
        before = path.read_text(encoding="utf-8")
        self._write(path, text)
        try:
            yield
        finally:
            self._write(path, before)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        self._second += 1
        os.utime(path, (self._second, self._second))


def preload(tree: Tree, roots: Sequence[str] = PRELOADED) -> None:
    """Import what the tests and the package import of some libraries.

    What is not installed, or does not exist in a release, is left to the tests.
    """
    for name in roots:
        with contextlib.suppress(ImportError):
            __import__(name)
    folders = [tree.source, *(tree.root / name for name in tree.tests)]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for module, names in _imported(path):
            if module.partition(".")[0] in roots:
                # A release may lack it, or fail in its own way.
                with contextlib.suppress(Exception):
                    found = importlib.import_module(module)
                    for name in names:
                        getattr(found, name)


def _imported(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The modules that a file imports, and what of each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((one.name, []) for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, [one.name for one in node.names]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone behind the block."""
    folder = Path(tempfile.mkdtemp(prefix="mutate-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Ended:
    """How a forked process ended.

    Attributes:
        code: what its work returned; None where it was ended.
        why: "" or in a word why it was ended: "time", or "signal N".
        seconds: of CPU, what it started included.
    """

    code: int | None
    why: str
    seconds: float


def forked(work: Callable[[], int], seconds: float, log: Path) -> Ended:
    """Do some work in a process of its own, its output going to `log`.

    Args:
        work: returns an exit code of 0 to 255.
        seconds: of CPU that it may take; six times as many may pass.
        log: is written anew.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    child = os.fork()
    if not child:
        _child(work, seconds, log)
    why = ""
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - start > 6 * seconds:
            why = "time"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    # What it started may still run.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    spent = used.ru_utime + used.ru_stime
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Ended(None, "time" if number == signal.SIGXCPU else why or f"signal {number}", spent)
    return Ended(os.WEXITSTATUS(status), why, spent)


def _child(work: Callable[[], int], seconds: float, log: Path) -> None:
    code = 250
    try:
        os.setpgid(0, 0)
        limit = max(1, int(seconds))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = work()
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # Without what the parent would do at its own end.
        os._exit(code)


def run_pytest(tree: Tree, source: Path, words: Sequence[str], plugins: Sequence[Any]) -> int:
    """Pytest in this process on the package in `source`; to be called in a forked one.

    Nothing is written into the tree: compiled files and examples go elsewhere.
    """
    import pytest

    _imported_from(tree, source)
    # Examples are then the same each time.
    os.environ["CI"] = "1"
    # The tree stays as it is, and what was compiled before is found again.
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(source.parent / "compiled")
    paths = [str(source), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if sys.path[0] != str(source):
        sys.path.insert(0, str(source))
    os.chdir(tree.root)
    own = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={tree.root}"]
    code = int(pytest.main([*own, *words], plugins=list(plugins)))
    _imported_from(tree, source)
    return code


def _imported_from(tree: Tree, source: Path) -> None:
    """Stop where another copy of the package than that in `source` was imported."""
    module = sys.modules.get(tree.package)
    found = source if module is None else Path(module.__file__ or "").parents[1]
    if found != source:
        raise RuntimeError(f"{tree.package} was imported from {found}")
