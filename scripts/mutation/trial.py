"""One fault against the tests that can reach it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mutation.mutants import Mutant
from mutation.reach import FileReach, told
from mutation.tree import Copy, Tree, forked, run_pytest

AT_ONCE = 4
"""Files of tests that are collected at once; those that come first are then soon done."""
SURVIVED, NOTICED, NOT_RUN = "survived", "noticed", "not run"
COLLECTING = "collecting "


@dataclass(frozen=True)
class Chosen:
    """Tests against which a fault is run.

    Attributes:
        files: in their order; of each, tests in their order.
        seconds: of CPU, that they took when nothing was wrong.
        of: how many tests can reach it.
        line: whether the fault's own line was seen to be reached, not its file alone.
    """

    files: list[tuple[str, list[str]]]
    seconds: float
    of: int
    line: bool

    @property
    def tests(self) -> int:
        """How many are run."""
        return sum(len(tests) for _, tests in self.files)


def choose(tree: Tree, reaches: Sequence[FileReach], fault: Mutant, most: float) -> Chosen:
    """The tests that can reach a fault: those of the mirrored files first, the fastest first.

    The other tests of the mirrored files come behind those, for they may reach it in a process of
    their own. What runs as a file is imported, or was never seen to run, is left to the tests that
    reach anything else of the file, too.

    Args:
        tree: what the fault is in.
        reaches: what tests reach.
        fault: the fault.
        most: seconds of CPU that they may take together; infinity for all.
    """
    by_file: dict[str, list[str]] = {}
    kernels = "import triton" in tree.read(fault.file)
    now = told(tree.source / fault.file)
    seconds = {test: spent for one in reaches for test, spent in one.tests.items()}
    if fault.runs:
        for one in reaches:
            if one.sources.get(fault.file) == now:
                by_file[one.file] = one.reaching(fault.file, fault.lines)
            else:
                by_file[one.file] = one.touching(fault.file)
    line = any(by_file.values())
    if not line:
        by_file = {one.file: one.touching(fault.file) for one in reaches}
    seen = {test for tests in by_file.values() for test in tests}
    for one in reaches:
        if _mirrors(one.file, fault.file, kernels):
            by_file[one.file] = list(one.tests)
    found = {
        file: sorted(tests, key=lambda test: (test not in seen, seconds[test]))
        for file, tests in by_file.items()
        if tests
    }

    def order(file: str) -> tuple[bool, float]:
        fastest = [seconds[test] for test in found[file][:5]]
        return not _mirrors(file, fault.file, kernels), sum(fastest) / len(fastest)

    chosen: list[tuple[str, list[str]]] = []
    spent = 0.0
    for file in sorted(found, key=order):
        tests = []
        # A file beside the mirrored ones has a part of the time, so that several get any.
        own = most if _mirrors(file, fault.file, kernels) else most / 4
        stop = min(most, spent + own)
        for test in found[file]:
            if spent >= stop:
                break
            tests.append(test)
            spent += seconds[test]
        if tests:
            chosen.append((file, tests))
    return Chosen(chosen, spent, sum(map(len, found.values())), line)


def _mirrors(test_file: str, file: str, kernels: bool) -> bool:
    """Whether a file of tests stands where a file of the package does.

    Kernels are tried where what launches them is, in processes of their own: those of a folder that
    begin with the same word.
    """
    test, source = PurePosixPath(test_file), PurePosixPath(file)
    if test.parent.parts[1:] != source.parent.parts:
        return False
    stem = source.stem.strip("_")
    if kernels:
        stem = stem.partition("_")[0]
    return test.stem == f"test_{stem}" or test.stem.startswith(f"test_{stem}_")


class _Order:
    """Pytest's plugin: of what was collected the chosen tests alone, in their order."""

    def __init__(self, tests: Sequence[str], out: Path) -> None:
        self.rank = {test: number for number, test in enumerate(tests)}
        self.out = out

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        left = [item for item in items if item.nodeid not in self.rank]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.nodeid in self.rank]
        items.sort(key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.out.write_text(json.dumps(report.nodeid), encoding="utf-8")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.out.write_text(json.dumps(COLLECTING + report.nodeid), encoding="utf-8")


@dataclass(frozen=True)
class Result:
    """What came of a fault.

    Attributes:
        outcome: `NOTICED`, `SURVIVED` or `NOT_RUN`.
        by: the test that noticed it, or what happened instead.
        tests: how many were to run.
        of: how many can reach it.
        line: as in `Chosen`.
        seconds: of CPU.
    """

    outcome: str
    by: str
    tests: int
    of: int
    line: bool
    seconds: float


def run(
    tree: Tree, copy: Copy, fault: Mutant, chosen: Chosen, scratch: Path, grace: float
) -> Result:
    """Run tests with a fault in the package, until one fails.

    Args:
        tree: what the fault is in.
        copy: of its package.
        fault: the fault.
        chosen: the tests.
        scratch: a folder for what is said on the way.
        grace: seconds of CPU for importing and collecting, beside five times those of the tests.
    """
    out, log = scratch / "failed.json", scratch / "log"
    out.unlink(missing_ok=True)
    about = chosen.tests, chosen.of, chosen.line
    if not chosen.files:
        return Result(NOT_RUN, "no test reaches it", *about, 0.0)

    def work() -> int:
        for start in range(0, len(chosen.files), AT_ONCE):
            some = chosen.files[start : start + AT_ONCE]
            order = _Order([test for _, tests in some for test in tests], out)
            code = run_pytest(tree, copy.folder, ["-x", *(file for file, _ in some)], [order])
            # Tests whose names the fault changes are not there any more.
            if code not in (0, 5):
                return code
        return 0

    start = time.monotonic()
    with copy.holding(fault.file, fault.text):
        ended = forked(work, grace + 5 * chosen.seconds, log)
    spent = ended.seconds or time.monotonic() - start
    if ended.why:
        return Result(NOTICED, f"ended by {ended.why}", *about, spent)
    if ended.code == 0:
        return Result(SURVIVED, "", *about, spent)
    if ended.code in (1, 2) and out.exists():
        by = json.loads(out.read_text(encoding="utf-8"))
        file = by.removeprefix(COLLECTING)
        if file != by and not _collects(tree, copy, file, grace, log):
            return Result(NOT_RUN, f"{file} is not collected without it either", *about, spent)
        return Result(NOTICED, by, *about, spent)
    # The exit codes of pytest's own trouble, and of ours.
    tail = log.read_text(encoding="utf-8", errors="replace")[-400:] if log.exists() else ""
    return Result(NOT_RUN, f"pytest ended with {ended.code}: {tail}", *about, spent)


def _collects(tree: Tree, copy: Copy, file: str, grace: float, log: Path) -> bool:
    """Whether a file of tests can be collected as long as nothing is wrong."""

    def work() -> int:
        return run_pytest(tree, copy.folder, ["--collect-only", file], [])

    return forked(work, grace, log).code == 0
