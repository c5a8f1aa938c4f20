"""Put small faults into the package, one at a time, each of which a test must notice.

    python scripts/mutate.py --named                  # the named ones, scripts/mutation/named.toml
    python scripts/mutate.py --seed 0 --count 200 --json report.json     # these, and 200 are drawn
    python scripts/mutate.py … --json report.json --resume               # those that it lacks
    python scripts/mutate.py … --jobs 2                                  # two at a time

It needs the extra `mutation` of the package. Drawn are changes that Cosmic Ray's operators make of
`runtime/`, `hosts/`, `select/`, `costs/`, `report/`, the scorers and the bootstrap, in an order
that the seed gives. Each fault is put into a copy of the package, and run in a process of its own,
forked from one that has imported torch and transformers, against the tests that can reach its
lines: first those of the mirrored files, then the fastest, up to `--most` seconds of CPU that they
took without it; what survives these is run against all, in the end. What then survives must stand
in `scripts/mutation/accepted.toml` with a reason, or the command ends with 1.

Which tests reach which lines is measured before, under coverage, which takes about as long as the
suite, and kept in `build/mutation`; of files of tests that changed it is measured anew.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from mutation import mutants, reach, trial
from mutation.drawn import draw
from mutation.mutants import Mutant
from mutation.reach import FileReach
from mutation.tree import PRELOADED, Copy, Tree, preload, scratch
from mutation.trial import NOT_RUN, NOTICED, SURVIVED

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "mutation"
ACCEPTED = "accepted"
UNFINISHED = 3
"""The exit code where `--stop` ended the command before its work was done."""


@dataclass
class Clock:
    """When to stop.

    Attributes:
        end: by `time.monotonic`.
    """

    end: float

    @property
    def over(self) -> bool:
        """Whether it is time."""
        return time.monotonic() > self.end


def main() -> int:
    """Run what is asked for; returns the exit code."""
    asked = options()
    tree = Tree(asked.root, asked.package, tuple(asked.tests))
    clock = Clock(time.monotonic() + asked.stop)
    known = {} if not (asked.resume and asked.json.exists()) else recorded(asked.json)
    with scratch() as folder:
        missing = reach.missing(tree, asked.reach, tree.test_files())
        if missing and not asked.as_is:
            preload(tree, asked.preload)
            if not measure(tree, folder, asked, missing, clock):
                return UNFINISHED
        if asked.measure:
            return 0
        faults = list(chosen(tree, asked))
        # What may pass is run against the likeliest tests alone.
        passes = mutants.accepted(asked.accept)
        if any(to_do(known.get(one.key), math.inf) for one in faults):
            preload(tree, asked.preload)
        # What survives the likeliest tests is run against all when all others have been tried.
        for most in (asked.most, math.inf):
            todo = [one for one in faults if to_do(known.get(one.key), most)]
            todo = [one for one in todo if one.key not in known or one.key not in passes]
            reaches = reach.read(tree, asked.reach) if todo else []
            work = Work(tree, reaches, todo, asked.grace, most)
            done = len(faults) - len(todo)
            for number, one in side_by_side(tree, folder, asked.jobs, clock, work.tried, len(todo)):
                done += 1
                known[todo[number].key] = one
                say(done, len(faults), one)
                write(asked, [known[one.key] for one in faults if one.key in known])
            if clock.over:
                return UNFINISHED
    found = [known[one.key] for one in faults]
    write(asked, found)
    return told(found)


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--named", action="store_true", help="the named faults alone")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--count", type=int, default=200, help="how many are drawn")
    parser.add_argument("--only", default="", help="faults whose words or file hold this text")
    parser.add_argument("--jobs", type=int, default=1, help="how many are tried side by side")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--resume", action="store_true", help="keep what the report has")
    parser.add_argument(
        "--most", type=float, default=20.0, help="seconds of tests before all of them are run"
    )
    parser.add_argument(
        "--grace", type=float, default=40.0, help="seconds beside the tests', then it is a hang"
    )
    parser.add_argument("--measure", action="store_true", help="what tests reach, and no more")
    parser.add_argument("--as-is", action="store_true", help="measure nothing anew")
    parser.add_argument(
        "--stop", type=float, default=math.inf, help="seconds after which to end with 3"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--package", default="vlmprune", help="the package under src")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="folders of tests")
    parser.add_argument("--list", type=Path, default=HERE / "named.toml", help="named faults")
    parser.add_argument("--accept", type=Path, default=HERE / "accepted.toml", help="with reasons")
    parser.add_argument("--reach", type=Path, help="where what tests reach is kept")
    parser.add_argument("--preload", nargs="*", default=list(PRELOADED), help="what tests import")
    asked = parser.parse_args()
    asked.reach = asked.reach or asked.root / "build" / "mutation"
    if asked.resume and asked.json is None:
        parser.error("--resume goes on with a report; name it by --json.")
    return asked


def measure(
    tree: Tree, folder: Path, asked: argparse.Namespace, files: list[str], clock: Clock
) -> bool:
    """Measure what files of tests reach; returns whether all were."""
    asked.reach.mkdir(parents=True, exist_ok=True)

    def measuring(copy: Copy, number: int) -> str:
        return reach.measure(tree, copy, asked.reach, files[number])

    done = 0
    for number, words in side_by_side(tree, folder, asked.jobs, clock, measuring, len(files)):
        done += 1
        print(bar(done, len(files)), f"reached by {files[number]}: {words}", flush=True)
    return done == len(files)


_COPIES: list[Copy] = []
"""In a process that works beside others: the copy of the package that is its own."""
_WORK: list[Callable[[Copy, int], Any]] = []


def _own_copy(tree: Tree, folder: Path) -> None:
    _COPIES[:] = [Copy(tree, folder / str(os.getpid()) / "source")]


def _one(number: int, clock: Clock) -> Any:
    return None if clock.over else _WORK[0](_COPIES[0], number)


def side_by_side(
    tree: Tree,
    folder: Path,
    jobs: int,
    clock: Clock,
    work: Callable[[Copy, int], Any],
    count: int,
) -> Iterator[tuple[int, Any]]:
    """Do numbered work in so many processes, each with a copy of its own; yields what is done.

    Args:
        tree: what the copies are of.
        folder: for the copies.
        jobs: how many processes; they are forked, and so have all that was imported.
        clock: nothing is begun when its time is over.
        work: takes a copy and a number; returns anything but None.
        count: numbers are those below this one.
    """
    _WORK[:] = [work]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, fork, _own_copy, (tree, folder)) as pool:
        numbers = {pool.submit(_one, number, clock): number for number in range(count)}
        for future in as_completed(numbers):
            if (found := future.result()) is not None:
                yield numbers[future], found


def chosen(tree: Tree, asked: argparse.Namespace) -> Iterator[Mutant]:
    """The faults that were asked for."""
    found = [*mutants.named(tree, asked.list)]
    if not asked.named:
        found += draw(tree, asked.seed, asked.count)
    yield from (one for one in found if asked.only in one.fault or asked.only in one.file)


def to_do(one: dict[str, Any] | None, most: float) -> bool:
    """Whether a fault is still to be tried against tests of so many seconds; None: it never was."""
    if one is None:
        return True
    result = one["result"]
    return bool(
        math.isinf(most) and result["outcome"] == SURVIVED and result["tests"] < result["of"]
    )


@dataclass
class Work:
    """Faults, and what they are tried against.

    Attributes:
        tree: what they are in.
        reaches: what tests reach.
        faults: the faults.
        grace: as in `trial.run`.
        most: as in `trial.choose`.
    """

    tree: Tree
    reaches: Sequence[FileReach]
    faults: Sequence[Mutant]
    grace: float
    most: float

    def tried(self, copy: Copy, number: int) -> dict[str, Any]:
        """What came of a fault, as the report has it."""
        fault = self.faults[number]
        some = trial.choose(self.tree, self.reaches, fault, self.most)
        result = trial.run(self.tree, copy, fault, some, copy.folder.parent, self.grace)
        names = ("fault", "file", "where", "before", "after")
        about = {name: getattr(fault, name) for name in names}
        return about | {"line": min(fault.lines)} | {"result": asdict(result)}


def recorded(path: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """The faults of a report, those left out that were not run."""
    found = json.loads(path.read_text(encoding="utf-8"))["faults"]
    return {
        (one["file"], one["where"], one["before"], one["after"]): one
        for one in found
        if one["result"]["outcome"] != NOT_RUN
    }


def write(asked: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """Note the reasons of those that are accepted, and write the report where one is wanted."""
    reasons = mutants.accepted(asked.accept)
    for one in found:
        key = (one["file"], one["where"], one["before"], one["after"])
        one["accepted"] = reasons.get(key) if one["result"]["outcome"] == SURVIVED else None
    if asked.json is None:
        return
    about = {"seed": asked.seed, "named alone": asked.named, "seconds of tests": asked.most}
    report = {"about": about, "counts": counts(found), "faults": found}
    asked.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")


def counts(found: list[dict[str, Any]]) -> dict[str, int]:
    """How many faults came to what."""
    return dict(Counter(outcome(one) for one in found)) | {"all": len(found)}


def outcome(one: dict[str, Any]) -> str:
    """What a fault of a report came to, in a word or two."""
    return ACCEPTED if one.get("accepted") else str(one["result"]["outcome"])


def bar(number: int, total: int) -> str:
    """How far it is."""
    return f"{'█' * (20 * number // total):·<20} {number:>4}/{total}"


def say(number: int, total: int, one: dict[str, Any]) -> None:
    """One line of a fault."""
    result = one["result"]
    words = f"{one['file']}:{one['line']} {one['fault']}: {result['outcome']}"
    by = f" by {result['by']}" if result["outcome"] == NOTICED else f" {result['by']}"
    print(bar(number, total), words + by.rstrip(), f"({result['seconds']:.0f} s)", flush=True)


def told(found: list[dict[str, Any]]) -> int:
    """Print what survived, and how many came to what; returns the exit code."""
    left = [one for one in found if outcome(one) in (SURVIVED, NOT_RUN)]
    for one in left:
        print(f"\n{outcome(one)}: {one['file']}:{one['line']} in {one['where'] or 'the file'}")
        print(f"  {one['fault']}, {one['result']['tests']} of {one['result']['of']} tests")
        for sign, lines in (("-", one["before"]), ("+", one["after"])):
            print(*(f"  {sign} {line}" for line in lines.splitlines()), sep="\n")
    print(", ".join(f"{count} {name}" for name, count in counts(found).items()))
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
