"""The figures of docs/, made from the JSON files that the programs here wrote.

    python benchmarks/render.py
    python benchmarks/render.py --results FOLDER --docs FOLDER

A part of a page stands between `<!-- name -->` and `<!-- end name -->`. One whose file is not there
stays as it is, but for the figures of a GPU: without any the markers stay, with nothing between
them. Of what was measured on a CPU there are ratios alone, and of GPU figures that were, as in a
dry run, under a heading that says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import accuracy
import compiled
import decode
import equal_compute
import host_cost
import kept_again
import learned
import plphp_coverage
import recall
import recall_page
import selection
import serve_page
import tower
import training_steps
from accuracy_tables import Table
from page_parts import DOCS, RESULTS, replaced
from program import command
from vlmprune.study.bench import tables

Content = Mapping[str, Any]

NAMES = {
    "llava-next": "LLaVA-NeXT-7B",
    "llava-1.5": "LLaVA-1.5-7B",
    "qwen2.5-vl": "Qwen2.5-VL-7B",
    "selection": "Selection and the tap",
    "decode": "Decoding over a cut cache",
    "compiled": "A compiled step on a static cache",
}
"""Headings of what `gpu.sh` measured, in order; other files come after these, by their names."""


TIMED = ("recall_float32", "recall_bfloat16")
"""Files of `recall.py`, in the order of the page."""


def gpu(files: Mapping[str, Content]) -> str:
    """What `gpu.sh` measured: the content of its JSON files by name, without ending."""
    if not files:
        return ""
    order = [name for name in NAMES if name in files] + sorted(set(files) - set(NAMES))
    on_gpu = all(tables.on_gpu(files[name]) for name in order)
    parts = [
        f"## {'On a GPU' if on_gpu else 'A dry run of the GPU figures, on a CPU'}",
        "`sh benchmarks/gpu.sh`: random weights in the shapes of real models, so that what they "
        "answer means nothing; how long it takes is what the shape takes.",
    ]
    makers = {
        "selection": selection.markdown,
        "decode": decode.markdown,
        "compiled": compiled.markdown,
    }
    explained = False
    for name in order:
        if name in makers:
            made = makers[name](files[name])
        else:
            # What the columns are is said once.
            made = tables.markdown(files[name], with_legend=not explained)
            explained = True
        parts += [f"### {NAMES.get(name, name)}", made.strip()]
    return "\n\n".join(parts)


def of_methods(found: Content, again: Content | None = None) -> dict[str, str]:
    """The parts about all methods.

    Args:
        found: accuracies.
        again: what is kept again under noise; None where that was not measured.
    """
    shares = None if again is None else kept_again.shares(again)
    shown = Table(accuracy.planned_now(found, accuracy.planned([])), shares)
    told = {} if again is None else {"kept again": kept_again.setup(again)}
    return told | {
        "setup": shown.setup(),
        "accuracy": shown.accuracy(),
        "gains": shown.gains(),
        "cost": shown.cost(),
        "own": shown.own(),
        "kinds": shown.kinds(),
        "left out": "\n".join(f"- {why}." for why in accuracy.NOT_HERE.values()),
    }


def of_learned(found: Content) -> dict[str, str]:
    """The part about methods that learn."""
    return {"learned": Table(accuracy.planned_now(found, learned.planned())).by_tokens()}


def of_study(found: Content) -> dict[str, str]:
    """The parts about layers against tokens."""
    return {
        "study setup": equal_compute.setup(found),
        "study equal": equal_compute.equal(found),
        "study every": equal_compute.every(found),
    }


def read(folder: Path) -> dict[str, Content]:
    """The JSON files of a folder by their names, without ending."""
    files = sorted(folder.glob("*.json"))
    return {one.stem: json.loads(one.read_text(encoding="utf-8")) for one in files}


def results_page(folder: Path) -> dict[str, str]:
    """The parts of docs/results.md whose files are there."""
    makers = {
        "learned": of_learned,
        "equal_compute": of_study,
        "tower": lambda found: {"tower": tower.markdown(found)},
    }
    files = read(folder)
    made: dict[str, str] = {}
    if "accuracy" in files:
        made |= of_methods(files["accuracy"], files.get(kept_again.FILE.stem))
    for name, found in files.items():
        if name in makers:
            made |= makers[name](found)
    return made


def plphp_page(folder: Path) -> dict[str, str]:
    """The parts of docs/plphp.md whose file is there."""
    found = read(folder).get(plphp_coverage.FILE.stem)
    return {} if found is None else plphp_coverage.parts(found)


def recall_parts(folder: Path) -> dict[str, str]:
    """The parts of docs/recall.md whose file is there."""
    files = read(folder)
    found = files.get("recall")
    made = {} if found is None else recall_page.parts(found)
    timed = [files[name] for name in TIMED if name in files]
    return made | ({"recall traffic": "\n\n".join(map(recall.markdown, timed))} if timed else {})


def training_page(folder: Path) -> dict[str, str]:
    """The part of docs/training-with-pruning.md whose file is there."""
    found = read(folder).get("training")
    return {} if found is None else {"training": training_steps.lines(found)}


def benchmarks_page(folder: Path) -> dict[str, str]:
    """The parts of docs/benchmarks.md whose files are there."""
    own = read(folder).get(host_cost.FILE.stem)
    made = {} if own is None else {"host cost": host_cost.markdown(own)}
    return made | {"gpu": gpu(read(folder / "gpu"))}


PAGES: dict[str, Callable[[Path], dict[str, str]]] = {
    "benchmarks.md": benchmarks_page,
    "plphp.md": plphp_page,
    "recall.md": recall_parts,
    "results.md": results_page,
    "training-with-pruning.md": training_page,
    "serving.md": lambda folder: serve_page.parts(read(folder)),
}
"""By page what stands between its markers, out of a folder of results."""


def render(text: str, made: Mapping[str, str]) -> str:
    """A page with its parts made anew."""
    for name, part in made.items():
        text = replaced(text, name, part)
    return text


def main(
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = RESULTS,
    docs: Annotated[Path, typer.Option(help="Folder of the pages; those it has are made.")] = DOCS,
) -> None:
    """Write the parts of all pages, and draw the curve of docs/serving.md."""
    for name, parts in PAGES.items():
        page = docs / name
        if page.exists():
            made = render(page.read_text(encoding="utf-8"), parts(results))
            page.write_text(made, encoding="utf-8")
    if (docs / "serving.md").exists():
        serve_page.draw(read(results), docs / "serving.png")


if __name__ == "__main__":
    command(main)()
