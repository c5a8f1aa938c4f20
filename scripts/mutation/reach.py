"""Which tests reach a line of the package: measured once with coverage, a file of tests at a time.

A file's tests run in a process of their own, on the same kind of copy on which mutants run. What is
found is kept in a folder outside the tree, and measured anew where the file of tests has changed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutation.tree import Copy, Tree, forked, run_pytest

SECONDS = 900
"""Of CPU, that a file of tests may take while it is measured."""
_SETUP, _CALL = "setup", "call"


@dataclass
class FileReach:
    """What the tests of one file reach.

    Attributes:
        file: of tests.
        tests: the names of those that pass, with the seconds of CPU that each took.
        lines: by file of the package, by test, the lines that it reaches.
        shared: by file of the package, lines that run as something is set up, perhaps for several
            tests.
        sources: what told the text of each file of the package then.
    """

    file: str
    tests: dict[str, float]
    lines: dict[str, dict[str, set[int]]] = field(default_factory=dict)
    shared: dict[str, set[int]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def reaching(self, source: str, lines: Collection[int]) -> list[str]:
        """Its tests that reach one of the lines."""
        if not self.shared.get(source, set()).isdisjoint(lines):
            return list(self.tests)
        own = self.lines.get(source, {})
        return [test for test in self.tests if not own.get(test, set()).isdisjoint(lines)]

    def touching(self, source: str) -> list[str]:
        """Its tests that reach any line of a file."""
        own = self.lines.get(source, {})
        return list(self.tests) if source in self.shared else [t for t in self.tests if t in own]


class _Watch:
    """Pytest's plugin: tells coverage whose lines these are, and notes what passed."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.bad: set[str] = set()
        self._start = 0.0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._start = time.process_time()
        self.coverage.switch_context(f"{_SETUP}|{nodeid}")

    def pytest_pyfunc_call(self, pyfuncitem: Any) -> None:
        self.coverage.switch_context(f"{_CALL}|{pyfuncitem.nodeid}")

    def pytest_runtest_teardown(self, item: Any) -> None:
        self.coverage.switch_context(f"{_SETUP}|{item.nodeid}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = time.process_time() - self._start
        if not report.passed:
            self.bad.add(report.nodeid)


def _first(plugin: type) -> None:
    """A plugin's hooks run before those that do the work."""
    import pytest

    for name in [one for one in vars(plugin) if one.startswith("pytest_")]:
        setattr(plugin, name, pytest.hookimpl(tryfirst=True)(getattr(plugin, name)))


def _measure(tree: Tree, source: Path, file: str, out: Path) -> int:
    """Run a file's tests under coverage on a copy of the package, and write what they reach."""
    import coverage

    measured = coverage.Coverage(
        data_file=None, source=[str(source / tree.package)], config_file=False, messages=False
    )
    digest = told(tree.root / file)
    measured.start()
    watch = _Watch(measured)
    _first(_Watch)
    run_pytest(tree, source, [file], [watch])
    measured.stop()
    data = measured.get_data()
    lines: dict[str, Any] = {}
    shared: dict[str, list[int]] = {}
    for path in data.measured_files():
        name = Path(path).relative_to(source / tree.package).as_posix()
        by_test: dict[str, set[int]] = defaultdict(set)
        for line, contexts in data.contexts_by_lineno(path).items():
            for phase, _, test in (one.partition("|") for one in contexts):
                if phase == _SETUP:
                    shared.setdefault(name, []).append(line)
                elif phase == _CALL:
                    by_test[test].add(line)
        if by_test:
            lines[name] = _grouped(by_test)
    found = {
        "digest": digest,
        "tests": {name: spent for name, spent in watch.seconds.items() if name not in watch.bad},
        "failed": sorted(watch.bad),
        "lines": lines,
        "shared": {name: sorted(set(some)) for name, some in shared.items()},
        "sources": {name: told(tree.source / name) for name in {*lines, *shared}},
    }
    out.write_bytes(gzip.compress(json.dumps(found).encode()))
    return 0


def _grouped(by_test: dict[str, set[int]]) -> list[tuple[list[int], list[str]]]:
    """Tests that reach the same lines of a file share one list of them."""
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for test, lines in by_test.items():
        groups[tuple(sorted(lines))].append(test)
    return [(list(lines), tests) for lines, tests in groups.items()]


def told(path: Path) -> str:
    """What changes with the text of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _place(folder: Path, file: str) -> Path:
    return folder / (file.replace("/", ".") + ".json.gz")


def missing(tree: Tree, folder: Path, files: list[str]) -> list[str]:
    """Files of tests that were not measured as they are now."""
    return [one for one in files if _read(tree, folder, one) is None]


def measure(tree: Tree, copy: Copy, folder: Path, file: str) -> str:
    """Measure what a file of tests reaches; returns what is to be said of it."""
    out = _place(folder, file)
    log = out.with_suffix(".log")
    ended = forked(lambda: _measure(tree, copy.folder, file, out), SECONDS, log)
    if ended.code != 0:
        return f"not measured ({ended.why or 'an error'}, see {log})"
    log.unlink()
    return f"{ended.seconds:.0f} s of CPU"


def _read(tree: Tree, folder: Path, file: str) -> FileReach | None:
    path = _place(folder, file)
    if not path.exists():
        return None
    found = json.loads(gzip.decompress(path.read_bytes()))
    if found["digest"] != told(tree.root / file):
        return None
    lines = {
        source: {test: some for some, tests in zip(*_sets(groups), strict=True) for test in tests}
        for source, groups in found["lines"].items()
    }
    shared = {source: set(some) for source, some in found["shared"].items()}
    return FileReach(file, found["tests"], lines, shared, found["sources"])


def _sets(groups: Any) -> tuple[list[set[int]], list[list[str]]]:
    return [set(some) for some, _ in groups], [tests for _, tests in groups]


def read(tree: Tree, folder: Path) -> list[FileReach]:
    """All that was kept of the files of tests that there are."""
    found = (_read(tree, folder, file) for file in tree.test_files())
    return [one for one in found if one is not None]
