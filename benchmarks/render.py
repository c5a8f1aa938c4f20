"""The GPU section of docs/benchmarks.md, made from the JSON files that `gpu.sh` wrote.

    python benchmarks/render.py

The section stands between `<!-- gpu -->` and `<!-- end gpu -->`. Without any JSON there is none:
the markers stay, with nothing between them. Of what was measured on a CPU, as in a dry run, there
are ratios alone, under a heading that says so.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmprune.files import write
from vlmprune.study.bench import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKERS = re.compile(r"(<!-- gpu -->\n).*?(<!-- end gpu -->)", flags=re.DOTALL)
NAMES = {
    "llava-next": "LLaVA-NeXT-7B",
    "llava-1.5": "LLaVA-1.5-7B",
    "qwen2.5-vl": "Qwen2.5-VL-7B",
    "selection": "Selection and the tap",
    "decode": "Decoding over a cut cache",
}
"""Headings in order; other files come after these, under their own names."""


def section(files: Mapping[str, Any]) -> str:
    """The section.

    Args:
        files: content of the JSON files by name, without ending.

    Returns:
        Markdown; empty where there is no file.
    """
    if not files:
        return ""
    order = [name for name in NAMES if name in files] + sorted(set(files) - set(NAMES))
    gpu = all("CPU" not in files[name].get("seconds_are", "") for name in order)
    parts = [f"## {'On a GPU' if gpu else 'A dry run of the GPU figures, on a CPU'}"]
    parts.append(
        "`sh benchmarks/gpu.sh`: random weights in the shapes of real models, so that what they "
        "answer means nothing; how long it takes is what the shape takes."
    )
    makers: dict[str, Callable[[Any], str]] = {"selection": selection, "decode": decode}
    explained = False
    for name in order:
        if name in makers:
            made = makers[name](files[name])
        else:
            # What the columns are is said once.
            made = tables.markdown(files[name], with_legend=not explained)
            explained = True
        parts += [f"### {NAMES.get(name, name)}", made.strip()]
    return "\n\n".join(parts) + "\n"


def selection(content: Mapping[str, Any]) -> str:
    """What `selection.py` found."""
    gpu = "CPU" not in content["seconds_are"]
    lines = [
        "| crops | selection | tower | peak of selection | tap |",
        "|---:|---:|---:|---:|---:|",
    ]
    for one in content["results"]:
        peak = one["peak_bytes"]
        ours = one["seconds"]["selection, ours"]
        cells = (
            str(one["crops"]),
            f"{one['selection_speedup']:.2f}x" + (f" ({1e3 * ours:.2f} ms)" if gpu else ""),
            f"{one['tower_speedup']:.2f}x",
            f"{peak['selection, theirs'] / max(1, peak['selection, ours']):.2f}x",
            f"{100 * one['tap_share_of_tower']:.2f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    what = (
        "The authors' procedure over ours, and the tap's share of the tower's time "
        f"(`benchmarks/selection.py`); {content['setting']}."
    )
    return f"{what}\n\n" + "\n".join(lines)


def decode(content: Mapping[str, Any]) -> str:
    """What `decode.py` found."""
    setting, results = content["setting"], content["results"]
    about = ", ".join(setting[name] for name in ("device", "dtype"))
    versions = f"torch {setting['torch']}, transformers {setting['transformers']}"
    what = (
        "Time of one decode step relative to the dense cache; the floors are Transformers' cache "
        f"cut to the same bytes (`{setting['command']}`); {about}, {versions}."
    )
    if not results:
        return f"{what} Nothing fitted the memory."
    gpu = all(one["on_gpu"] for one in results)
    names = [name for name in results[0]["ratios"] if name.endswith("/ dense")]
    heads = [name.partition(" / ")[0] for name in names]
    first = ["shape, batch x visual tokens", *(["dense, ms"] if gpu else [])]
    lines = [f"| {' | '.join([*first, *heads])} |", "|---" * (len(first) + len(heads)) + "|"]
    for one in results:
        prompt = one["setting"]
        cells = [f"{one['shape']}, {prompt['batch']} x {prompt['visual']}"]
        if gpu:
            cells.append(f"{1e3 * statistics.median(one['seconds']['dense']):.2f}")
        ratios = (one["ratios"].get(name) for name in names)
        cells += ["" if ratio is None else f"{ratio[0]:.2f}" for ratio in ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return f"{what}\n\n" + "\n".join(lines)


def render(text: str, files: Mapping[str, Any]) -> str:
    """The page with its section made anew."""
    if not MARKERS.search(text):
        raise typer.BadParameter("the page has no lines <!-- gpu --> and <!-- end gpu -->")
    return MARKERS.sub(lambda at: f"{at[1]}{section(files)}{at[2]}", text)


def main(
    results: Annotated[Path, typer.Option(help="Folder of JSON files.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="Page with the markers.")] = PAGE,
) -> None:
    """Render the section."""
    found = sorted(results.glob("*.json")) if results.is_dir() else []
    files = {one.stem: json.loads(one.read_text(encoding="utf-8")) for one in found}
    write(page, render(page.read_text(encoding="utf-8"), files))


if __name__ == "__main__":
    typer.run(main)
