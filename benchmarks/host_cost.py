"""What our own work costs on a tiny model of 32 layers, where nothing else does.

    python benchmarks/host_cost.py
    python benchmarks/host_cost.py --json benchmarks/results/host_cost.json
    git worktree add ../before REV && python benchmarks/host_cost.py --before ../before

CPU time of a first token and of a decode step, relative to that of the unpruned model, and how many
operations on tensors a layer has more; of VisPruner also a first token relative to a natively short
prompt's, and with many pictures. With another checkout both take turns, and the last column is how
they compare: below 1, a call costs less than before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from page_parts import RESULTS, ROOT, around, table
from program import about, command, refuse, save
from turns import in_turns, ratio
from vlmprune.study.measure import facts

HERE, BEFORE = "now", "before"
OPERATIONS = ", operations"
FILE = RESULTS / "host_cost.json"
# By checkout, and then by what is measured, method and call, one number a turn.
Found = Mapping[str, Mapping[str, Mapping[str, Mapping[str, list[float]]]]]


def turn(folder: Path, *sizes: int) -> Any:
    """What one process finds that runs a checkout's library."""
    parts = (folder / "src", folder / "packages" / "vlmprune-embedded" / "src")
    path = os.pathsep.join(map(str, parts))
    program = [sys.executable, str(ROOT / "benchmarks" / "host_cost_turn.py")]
    surroundings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, *map(str, sizes)], env=surroundings, check=True, capture_output=True
    )
    return json.loads(done.stdout)


def together(turns: list[Any]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The turns of one checkout, number by number."""
    out: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for found in turns:
        for what, methods in found.items():
            for method, calls in methods.items():
                for call, number in calls.items():
                    out[what][method][call].append(number)
    return json.loads(json.dumps(out))


def tables(found: Found) -> str:
    """What was found, as Markdown: time, and operations."""
    heads = ["", "method", "call", "time"]
    counts = ["", "method", "call", "operations a layer more"]
    if BEFORE in found:
        heads += ["before", "now / before"]
        counts += ["before"]
    rows, numbers = [], []
    for what, methods in found[HERE].items():
        for method, calls in methods.items():
            for call, now in calls.items():
                then = found.get(BEFORE, {}).get(what, {}).get(method, {}).get(call)
                counted = what.endswith(OPERATIONS)
                row = [what.removesuffix(OPERATIONS), method, call]
                if counted:
                    row.append(f"{now[-1]:.1f}")
                    if BEFORE in found:
                        row.append("" if then is None else f"{then[-1]:.1f}")
                else:
                    row.append(around(ratio(now, [1.0] * len(now))))
                    if BEFORE in found and then is not None:
                        row += [around(ratio(then, [1.0] * len(then))), around(ratio(now, then))]
                    elif BEFORE in found:
                        row += ["", ""]
                (numbers if counted else rows).append(row)
    return f"{table(heads, rows)}\n\n{table(counts, numbers)}"


def markdown(content: Mapping[str, Any]) -> str:
    """The part of docs/benchmarks.md."""
    machine, layers = content["machine"], content["layers"]
    return f"{layers} layers of width 32; {about(machine)}.\n\n{tables(content['found'])}"


def main(
    before: Annotated[Path | None, typer.Option(help="another checkout to compare with")] = None,
    times: Annotated[int, typer.Option(help="pairs of calls of each kind in a turn", min=1)] = 9,
    tokens: Annotated[int, typer.Option(help="steps of the longer answer", min=1)] = 16,
    rounds: Annotated[int, typer.Option(help="turns", min=1)] = 4,
    layers: Annotated[int, typer.Option(help="decoder layers", min=2)] = 32,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Measure what a call costs on the host's side."""
    folders = {HERE: ROOT} | ({} if before is None else {BEFORE: before.resolve()})
    for folder in folders.values():
        refuse({f"{str(folder)!r} is no checkout of vlmprune.": not (folder / "src").is_dir()})
    runs = in_turns(folders, lambda name: turn(folders[name], times, tokens, layers), rounds)
    machine = facts(torch.device("cpu")) | {"threads": 1}
    found = {name: together(turns) for name, turns in runs.items()}
    content = {"machine": machine, "layers": layers, "found": found}
    print(markdown(content))
    save(json_path, content)


if __name__ == "__main__":
    command(main)()
