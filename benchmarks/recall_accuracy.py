"""Accuracy of Recall on scenes that nothing was chosen on, beside PLPHP and random tokens.

    python training/embedded/held_out.py --assets A --folder SCENES --scenes 400 --seed 31
    python benchmarks/recall_accuracy.py SCENES             # what is missing
    python benchmarks/recall_accuracy.py SCENES --only "2 %" --again   # rows of such a name, anew

Each row is written to the JSON as soon as it is done, so that a run that was killed goes on with
the next. A row is made anew when its settings, or the model, pictures and questions have changed
since; whoever changes the code of a method asks for its rows `--again`. `render.py` writes the
tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from accuracy import rates, read
from page_parts import RESULTS
from program import command, refuse
from retention import RandomHeads
from vlmprune import METHODS, embedded
from vlmprune.io import outputs
from vlmprune.io.models import Loaded, quiet
from vlmprune.pruner import Pruner
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.study import measure as measured
from vlmprune.study.evals.results import UNPRUNED, Evaluation
from vlmprune.study.evals.run import BATCH, evaluate, model_name
from vlmprune.study.tasks import Sample, Scenes
from vlmprune.study.tasks.folder import Folder
from vlmprune.study.tasks.scenes import KINDS
from vlmprune.study.tasks.scorers import same_parts, words

FILE = RESULTS / "recall.json"
SOME = 100
"""Scenes of the rows that need no close interval."""
READS = (0.125, 0.0625, 0.03125, 0.02, 0.01)
MAIN = 0.0625
"""The default, which is measured in all variants."""
CLOSE = (MAIN, 0.02, 0.01)
"""Shares that are looked at closely, by kind."""
RATES = rates(alpha=0.951, beta=0.754, window=8)(0.1)
"""PLPHP's at a tenth of the bytes, with the thresholds of docs/plphp.md for its window."""


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Attributes:
        label: its name.
        method: by which it is made, or "" for the model as it is.
        settings: the method's.
        scenes: from the first, on which it is measured; None for all.
    """

    label: str
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    scenes: int | None = SOME

    @property
    def pruner(self) -> Pruner | None:
        """What is attached."""
        if not self.method:
            return None
        cls = RandomHeads if self.method == "random_heads" else METHODS[self.method]
        return cls(**self.settings)

    @property
    def facts(self) -> dict[str, Any]:
        """What it is made with."""
        return {"method": self.method, "settings": dict(self.settings), "scenes": self.scenes}


def recall(read: float, scenes: int | None = SOME, **more: Any) -> Row:
    """Recall at a share, with the mean for the rest and in four bits where nothing else is said."""
    told = ", ".join(f'`{name}="{value}"`' for name, value in more.items())
    # With as few tokens a CPU would be done sooner reading all, and Recall would step aside.
    settings = {"read": read, "sketch": "int4", "rest": "mean", "always": True, **more}
    label = f"Recall, {100 * read:g} %" + (f", {told}" if told else "")
    return Row(label, "recall", settings, scenes)


def planned() -> list[Row]:
    """All rows; those that are looked at closely, by kind, are on all scenes."""
    return [
        Row(UNPRUNED, scenes=None),
        *(recall(read, None if read in CLOSE else SOME) for read in READS),
        *(recall(read, None if read == MAIN else SOME, rest="none") for read in READS),
        *(recall(MAIN, sketch=sketch) for sketch in ("int2", "int8", "exact")),
        Row("PLPHP, `window=8`, 10 %", "plphp", RATES),
        Row("random tokens, 10 %", "random_heads", {"r": 0.1, "dr": 0}),
    ]


@dataclass(frozen=True)
class Drawn(Folder):
    """Scenes as `held_out.py` writes them for another seed."""

    def max_new_tokens(self, sample: Sample) -> int:
        """As for the scenes that come with the model."""
        return Scenes().max_new_tokens(replace(sample, kind=KINDS.get(sample.kind, sample.kind)))


def described(task: Drawn, loaded: Loaded) -> list[list[Any]]:
    """Of each sample what the tables need: id, kind, scene, and words and tokens of its answer."""
    tokenizer = loaded.processor.tokenizer

    def tokens(answer: str) -> int:
        # And the one that ends it.
        return len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1

    return [
        [one.id, one.kind, one.group, len(words(one.answers[0])), tokens(one.answers[0])]
        for one in task.samples()
    ]


def figures(made: Evaluation, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, Any]:
    """What the JSON keeps of an evaluation, in the task's order of samples.

    Args:
        made: of the first samples, or all.
        answers: the unpruned model's.
        samples: of the task.
    """
    said = [result.answer for result in made.results]
    pairs = list(zip(said, answers, strict=False))
    return {
        "scores": "".join(str(int(result.score or 0)) for result in made.results),
        "same": "".join(str(int(a == b)) for a, b in pairs),
        "first": sum(words(a)[:1] == words(b)[:1] for a, b in pairs) / len(pairs),
        "cells": [
            round(16 * same_parts(answer, sample.answers[0]))
            for answer, sample in zip(said, samples, strict=False)
            if sample.kind == "describe"
        ],
        "kv_bytes": round(made.share("kv_bytes"), 5),
        "seconds": round(made.total("seconds"), 1),
    }


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write the file at once, a line a sample or row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, value in found.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(one) for one in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    outputs.write(path, "{\n" + ",\n".join(parts) + "\n}\n")


def stale(row: Row, known: Mapping[str, Any] | None) -> bool:
    """Whether a row is missing, or was made with other settings."""
    return known is None or any(known[name] != value for name, value in row.facts.items())


def main(
    scenes: Annotated[Path, typer.Argument(help="Folder that held_out.py wrote.")],
    only: Annotated[str, typer.Option(help="Rows whose name has this alone.")] = "",
    again: Annotated[bool, typer.Option(help="Make rows anew that are known.")] = False,
    some: Annotated[int, typer.Option(help="Scenes of the rows that are not on all.")] = SOME,
    batch: Annotated[int, typer.Option(help="Questions answered at once.")] = BATCH,
    results: Annotated[Path, typer.Option(help="JSON file, read and written.")] = FILE,
) -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)
    rows = [replace(one, scenes=one.scenes and some) for one in planned()]
    wanted = [one for one in rows if only in one.label]
    refuse({f"no row has {only!r} in its name.": not wanted})
    task = Drawn(scenes)
    samples = task.samples()
    found = read(results, scenes)
    with quiet():
        loaded = Loaded(*embedded.load())
    versions = {name: one for name, one in measured.versions().items() if name != "vlmprune"}
    found["about"] = {"model": model_name(loaded.model), **versions, "batch": batch}
    found["samples"] = described(task, loaded)
    # All act inside the language model alone, and share the pictures' encodings.
    visions: dict[tuple[str, str], Vision] = {}
    known = {one["label"]: one for one in found["rows"]}
    console = Console()
    groups = list(dict.fromkeys(sample.group for sample in samples))
    for row in rows:
        first = row.label == UNPRUNED and row.label not in known
        if not first and (row not in wanted or not (again or stale(row, known.get(row.label)))):
            continue
        begin = time.perf_counter()
        within = set(groups[: row.scenes])
        limit = sum(sample.group in within for sample in samples)
        made = evaluate(loaded, row.pruner, task, limit=limit, batch=batch, visions=visions)
        if row.label == UNPRUNED:
            found["answers"] = [result.answer for result in made.results]
        kept = figures(made, found["answers"], samples)
        known[row.label] = {"label": row.label, **row.facts, **kept}
        found["rows"] = [known[one.label] for one in rows if one.label in known]
        write(results, found)
        console.print(
            f"{row.label}: {made.accuracy:.1%} right, {time.perf_counter() - begin:.0f} s"
        )


if __name__ == "__main__":
    command(main)()
