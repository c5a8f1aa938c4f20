"""Accuracy of every method at five budgets, on the embedded model's held-out scenes.

    python benchmarks/accuracy.py                              # what is missing
    python benchmarks/accuracy.py --only fastv,random --again  # these methods alone, anew

Each row (a method with its settings at one budget) is written to the JSON as soon as it is done, so
that a run that was killed goes on with the next. A row is made anew when its settings, its weights,
or the model, pictures and questions have changed since; whoever changes the code of a method asks
for its rows `--again`. `render.py` writes the tables.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from accuracy_tables import BUDGETS
from page_parts import RESULTS
from program import command, refuse
from vlmprune import METHODS, embedded
from vlmprune.io import outputs
from vlmprune.io.models import Loaded, quiet
from vlmprune.methods.bases.learned import Learned
from vlmprune.methods.pyramiddrop import PyramidDrop
from vlmprune.pruner import Pruner
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.study import measure as measured
from vlmprune.study.evals.results import UNPRUNED, Evaluation
from vlmprune.study.evals.run import BATCH, evaluate, model_name
from vlmprune.study.tasks import Sample, Scenes, Task
from vlmprune.study.tasks.scorers import same_parts

FILE = RESULTS / "accuracy.json"
BETWEEN = (0.85, 0.7, 0.6, 0.42, 0.28)
"""Further budgets of the random control, for methods that keep more than their own budget."""
SEEDS = (0, 1, 2)
"""Draws of the random control, whose scores are averaged."""

Settings = Callable[[float], dict[str, Any] | None]


def keep(budget: float) -> dict[str, Any]:
    """The nominal budget, by whatever the method means by `keep`."""
    return {"keep": budget}


def spread(r: float) -> float:
    """PLPHP's dr for a rate: three quarters of the way to 0 or 1, as the default is at r=0.4."""
    return round(min(0.3, 0.75 * r, 0.75 * (1 - r)), 4)


def whole_rows(budget: float) -> dict[str, Any] | None:
    """FoPru by grid rows of 16 tokens; fewer than one cannot be kept."""
    return {"keep": budget, "choose": "row"} if budget >= 1 / 16 else None


def rates(**more: Any) -> Settings:
    """PLPHP's at a mean rate, with thresholds calibrated on validation scenes for its window."""
    return lambda budget: {"r": budget, "dr": spread(budget), **more}


TAUS = {0.5: 0.84, 0.33: 0.71, 0.22: 0.595, 0.11: 0.42, 0.05: 0.285}
"""ZipVL's, by the share of KV bytes that they come to on the first questions."""


def pyramid(budget: float, layers: int = 5) -> dict[str, Any] | None:
    """PyramidDrop's ratio at which the layers see the budget on average; the first sees all."""
    before = PyramidDrop().layers(layers)

    def mean(ratio: float) -> float:
        return sum(ratio ** sum(i >= at for at in before) for i in range(layers)) / layers

    if mean(0.0) >= budget:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < budget else (low, middle)
    return {"ratio": round(low, 4)}


SETTINGS: dict[str, dict[str, Settings]] = {
    # Controls.
    "random": {"random": keep},
    "uniform": {"uniform grid": keep},
    "average_pooling": {"average pooling": keep},
    "downsample": {"downsampling": keep},
    # Before the language model.
    "vispruner": {
        "VisPruner": keep,
        "VisPruner, ratio 0.75": lambda b: {"keep": b, "important_ratio": 0.75},
    },
    "fastervlm": {"FasterVLM": keep},
    "vtc_cls": {"VTC-CLS": keep},
    "fopru": {"FoPru, rank": keep, "FoPru, row": whole_rows},
    "visionzip": {"VisionZip": keep},
    # Defaults that are not those of 0.1 are written out, so that rows of then are not reused.
    "prumerge": {
        "PruMerge": lambda b: {"keep": b, "plus": False, "heads": "joined"},
        "PruMerge+": lambda b: {"keep": b, "plus": True, "heads": "joined"},
    },
    "divprune": {"DivPrune": keep},
    "cdpruner": {"CDPruner": keep},
    "tome": {"ToMe": keep},
    "evit": {"EViT": keep},
    # Inside it: `keep` is what goes on from the layer that drops, or as the class says.
    "fastv": {"FastV": keep},
    "dart": {"DART": lambda b: {"keep": b, "normed": True}},
    "sparsevlm": {"SparseVLM": keep},
    "pyramiddrop": {"PyramidDrop": pyramid},
    "psigmoid": {"P-Sigmoid": keep},
    "gsearch": {},
    # The cache: PLPHP's r is the mean rate.
    "plphp": {
        "PLPHP": rates(alpha=0.958, beta=0.317),
        "PLPHP, window 8": rates(alpha=0.951, beta=0.754, window=8),
    },
    "zipvl": {"ZipVL": lambda budget: {"tau": TAUS[budget]}},
}
"""By method and label, the settings at a budget; methods that are not named here get `keep`."""

OWN: dict[str, dict[str, dict[str, Any]]] = {
    "prumerge": {
        "PruMerge, as many as outliers": {"plus": False, "heads": "joined"},
        "PruMerge+, likewise": {"plus": True, "heads": "joined"},
    },
    "pyramiddrop": {"PyramidDrop, ratio 0.5": {}},
    "gsearch": {"G-Search, for 1 % loss": {"rates": "1;1;0.879;0.7759;0.388"}},
    "zipvl": {"ZipVL, τ = 0.975": {}, "ZipVL, τ = 0.96": {"tau": 0.96}},
    "plphp": {"PLPHP, r = 0.4, default thresholds": {}},
}
"""Settings without a budget: methods that decide themselves how much they keep. G-Search's rates
are what `vlmprune search gsearch --max-loss 1% --trials 32` found on 60 validation scenes, which
`training/embedded/held_out.py --split validation` writes as a folder task."""

NOT_HERE = {
    "evs": "EVS chooses among frames of a video, and these are pictures",
    "quecc": "QueCC is trained, and stands in the table of methods that learn",
    "vistog": "VisToG likewise",
    "recall": "Recall keeps all and reads less, and has a page of its own (docs/recall.md)",
    "mod": "VideoLLM-MoD is trained on clips, and these are pictures",
}
"""Methods without rows, and why."""


@dataclass(frozen=True)
class Row:
    """One line of the table at one budget."""

    method: str
    label: str
    budget: float | None
    settings: tuple[dict[str, Any], ...]

    @property
    def pruners(self) -> list[Pruner]:
        """The pruner; for the random control one a seed."""
        return [METHODS[self.method](**one) for one in self.settings]

    @property
    def key(self) -> tuple[str, float | None]:
        """What tells it from the others."""
        return self.label, self.budget

    def __str__(self) -> str:
        return self.label if self.budget is None else f"{self.label} at {self.budget:.0%}"


def planned(only: list[str]) -> list[Row]:
    """All rows, controls first, or those of some methods."""
    names = [name for name in SETTINGS if name in METHODS]
    names += [name for name in METHODS if name not in SETTINGS and name not in NOT_HERE]
    rows = []
    for name in names:
        if only and name not in only:
            continue
        labels = SETTINGS.get(name, {METHODS[name].__name__: keep})
        for label, settings in labels.items():
            for budget in (*BUDGETS, *(BETWEEN if name == "random" else ())):
                one = settings(budget)
                if one is None:
                    continue
                several = [one | {"seed": seed} for seed in SEEDS] if name == "random" else [one]
                rows.append(Row(name, label, budget, tuple(several)))
        rows += [Row(name, label, None, (one,)) for label, one in OWN.get(name, {}).items()]
    return rows


def digest(folder: Path) -> str:
    """Of all files of a folder."""
    content = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        content.update(file.name.encode() + file.read_bytes())
    return content.hexdigest()[:16]


def read(path: Path, pictures: Path | None = None) -> dict[str, Any]:
    """What was measured before, as far as it is about the same pictures and model.

    Args:
        path: of the JSON file.
        pictures: their folder; None for the held-out scenes.
    """
    fresh: dict[str, Any] = {
        "scenes": digest(pictures or embedded.held_out()),
        "model": digest(embedded.path()),
        "rows": [],
    }
    if not path.exists():
        return fresh
    found: dict[str, Any] = json.loads(path.read_text())
    same = all(found.get(name) == fresh[name] for name in ("scenes", "model"))
    return found if same else fresh


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write the file at once, so that a kill leaves the old or the new one; a row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in found.items() if name != "rows"}
    lines = ",\n".join(json.dumps(row) for row in found["rows"])
    text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n]\n}\n"
    outputs.write(path, text)


def figures(evaluations: list[Evaluation], samples: Sequence[Sample]) -> dict[str, Any]:
    """What the JSON keeps of one row's evaluations, in the task's order of samples."""
    one = evaluations[0]
    scores = [sum(e.results[i].score or 0 for e in evaluations) for i in range(len(samples))]
    cells = [
        round(sum(16 * same_parts(e.results[i].answer, sample.answers[0]) for e in evaluations))
        for i, sample in enumerate(samples)
        if sample.kind == "listing"
    ]
    names = ("visual_tokens", "decoder_flops", "flops", "kv_bytes")
    return {
        "repeats": len(evaluations),
        "scores": "".join(str(int(score)) for score in scores),
        "cells": cells,
        "shares": {name: round(one.share(name), 5) for name in names},
        "seconds": round(sum(e.total("seconds") for e in evaluations), 1),
    }


def planned_now(found: Mapping[str, Any], rows: list[Row]) -> dict[str, Any]:
    """What was measured, with those rows alone that are planned, in their order."""
    known = {(row["label"], row["budget"]): row for row in found["rows"]}
    return {**found, "rows": [known[row.key] for row in rows if row.key in known]}


def stale(row: Row, known: Mapping[str, Any] | None) -> bool:
    """Whether a row is missing, or was made with other settings or weights."""
    return known is None or any(known.get(name) != value for name, value in facts(row).items())


def facts(row: Row) -> dict[str, Any]:
    """What a row was made with."""
    found = {"method": row.method, "settings": list(row.settings)}
    if issubclass(METHODS[row.method], Learned):
        found["weights"] = [repr(pruner) for pruner in row.pruners]
    return found


def measure(
    path: Path,
    rows: list[Row],
    batch: int = BATCH,
    again: bool = False,
    task: Task | None = None,
    pictures: Path | None = None,
) -> None:
    """Make what is missing or stale, and write the file after each row.

    Args:
        path: of the JSON file.
        rows: what is wanted.
        batch: questions answered at once.
        again: whether rows are made anew that are known.
        task: what is asked, the held-out scenes by default; its lists are of kind "listing".
        pictures: folder of the task's pictures.
    """
    found, task = read(path, pictures), task or Scenes()
    known = {(row["label"], row["budget"]): row for row in found["rows"]}
    todo = [row for row in rows if again or stale(row, known.get(row.key))]
    with quiet():
        loaded = Loaded(*embedded.load())
    versions = measured.versions()
    fresh = again or "unpruned" not in found
    if fresh:
        for row in known.values() if "about" in found else ():
            about = found["about"]
            row.setdefault("versions", {name: about[name] for name in versions if name in about})
        found["about"] = {"model": model_name(loaded.model), **versions, "batch": batch}
    samples = task.samples()
    found["samples"] = [[one.id, one.kind, one.group] for one in samples]
    # What acts inside the language model alone shares the pictures' encodings.
    visions: dict[tuple[str, str], Vision] = {}
    console = Console()
    with Progress(console=console) as bar:
        line = bar.add_task("", total=len(samples))

        def run(pruner: Pruner | None, name: str) -> Evaluation:
            bar.reset(line, description=name)
            shared = visions if pruner is None or not pruner.shortens else None
            return evaluate(
                loaded,
                pruner,
                task,
                batch=batch,
                visions=shared,
                progress=lambda done, total: bar.update(line, completed=done, total=total),
            )

        if fresh:
            found["unpruned"] = figures([run(None, UNPRUNED)], samples)
            write(path, found)
        for number, row in enumerate(todo, 1):
            begin = time.perf_counter()
            name = f"{number} of {len(todo)}: {row}"
            made = figures([run(pruner, name) for pruner in row.pruners], samples)
            known[row.key] = {"label": row.label, "budget": row.budget, **facts(row), **made}
            # Rows of a file may be of several releases, each of which is told.
            known[row.key]["versions"] = versions
            found["rows"] = list(known.values())
            write(path, found)
            right = sum(map(int, made["scores"])) / made["repeats"] / len(samples)
            console.print(f"{row}: {right:.1%} right, {time.perf_counter() - begin:.0f} s")


def main(
    only: Annotated[str, typer.Option(help="Names of methods, parted by commas.")] = "",
    again: Annotated[bool, typer.Option(help="Make rows anew that are known.")] = False,
    batch: Annotated[int, typer.Option(help="Questions answered at once.")] = BATCH,
    results: Annotated[Path, typer.Option(help="JSON file, read and written.")] = FILE,
) -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS or name in NOT_HERE]
    refuse({f"no rows for {', '.join(unknown)}.": bool(unknown)})
    measure(results, planned(names), batch, again)


if __name__ == "__main__":
    command(main)()
