"""What our own work costs on a tiny model of 32 layers, where nothing else does.

    python benchmarks/host_cost.py
    git worktree add ../before REV && python benchmarks/host_cost.py --before ../before

CPU seconds of a first token, and of several, relative to the unpruned model in the same process.
With another checkout both take turns, and the last column is how these compare: below 1, a call
costs less than before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from page_parts import ROOT, around, table
from program import about, command, refuse, save
from turns import in_turns, ratio
from vlmprune.study.measure import facts

HERE, BEFORE = "now", "before"


def turn(folder: Path, times: int, tokens: int) -> dict[str, dict[str, float]]:
    """Seconds of one process that runs a checkout's library."""
    parts = (folder / "src", folder / "packages" / "vlmprune-embedded" / "src")
    path = os.pathsep.join(map(str, parts))
    program = [sys.executable, str(ROOT / "benchmarks" / "host_cost_turn.py")]
    surroundings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, str(times), str(tokens)], env=surroundings, check=True, capture_output=True
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def relative(turns: list[Any]) -> dict[tuple[str, str], list[float]]:
    """By method and what is asked, turn by turn, seconds relative to the unpruned model's."""
    out: dict[tuple[str, str], list[float]] = defaultdict(list)
    for found in turns:
        bare = found.pop("unpruned")
        for method, costs in found.items():
            for what, seconds in costs.items():
                out[method, what].append(seconds / bare[what])
    return out


def main(
    before: Annotated[Path | None, typer.Option(help="another checkout to compare with")] = None,
    times: Annotated[int, typer.Option(help="calls of each kind in a turn", min=1)] = 9,
    tokens: Annotated[int, typer.Option(help="tokens of the longer answer", min=2)] = 20,
    rounds: Annotated[int, typer.Option(help="turns", min=1)] = 4,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Measure what a call costs on the host's side."""
    folders = {HERE: ROOT} | ({} if before is None else {BEFORE: before.resolve()})
    for folder in folders.values():
        refuse({f"{str(folder)!r} is no checkout of vlmprune.": not (folder / "src").is_dir()})
    runs = in_turns(folders, lambda name: turn(folders[name], times, tokens), rounds)
    shares = {name: relative(found) for name, found in runs.items()}
    rows = []
    for key, now in shares[HERE].items():
        row = [*key, around(ratio(now, [1.0] * len(now)))]
        if before is not None:
            then = shares[BEFORE][key]
            row += [around(ratio(then, [1.0] * len(then))), around(ratio(now, then))]
        rows.append(row)
    heads = ["method", "", "/ unpruned"] + ["/ unpruned, before", "now / before"] * (
        len(folders) - 1
    )
    machine = facts(torch.device("cpu")) | {"threads": 1}
    print(f"32 layers of width 32; {about(machine)}.\n\n{table(heads, rows)}")
    told = {name: {" ".join(key): r for key, r in found.items()} for name, found in shares.items()}
    save(json_path, {"machine": machine, "relative_to_unpruned": told})


if __name__ == "__main__":
    command(main)()
