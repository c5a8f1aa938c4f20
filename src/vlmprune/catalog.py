"""What there is: the methods and the supported models, as plain data and as Rich tables."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from rich.table import Table

HINT = "Give settings as in --method vispruner:keep=64,important_ratio=0.75; chain methods by +."


def methods(names: Sequence[str] = ()) -> dict[str, Any]:
    """Methods: name, stage, needs, paper, settings with defaults, deviations.

    Args:
        names: which; none for all.

    Raises:
        VlmpruneError: one is unknown.
    """
    from vlmprune.methods import METHODS

    for name in names:
        if name not in METHODS:
            raise VlmpruneError(f"method {name!r} is unknown; use one of {', '.join(METHODS)}.")
    return {"methods": [_method(name, METHODS[name]) for name in names or METHODS]}


def _method(name: str, cls: type) -> dict[str, Any]:
    from vlmprune import spec
    from vlmprune.methods.bases.learned import Learned, shipped

    settings = {}
    for field in fields(cls):
        if not field.init:
            continue
        required = spec.required(field)
        settings[field.name] = {
            "required": required,
            "default": None if required else spec.default_of(field),
        }
    paragraphs = [" ".join(p.split()) for p in (inspect.getdoc(cls) or "").split("\n\n")]
    deviations = [p for p in paragraphs if p.startswith("Where it deviates")]
    return {
        "name": name,
        "class": cls.__name__,
        "summary": paragraphs[0],
        "stage": getattr(cls, "stage", ""),
        "needs": getattr(cls, "needs", ""),
        "paper": getattr(cls, "paper", ""),
        "reusable_across_questions": bool(getattr(cls, "text_agnostic", False)),
        "settings": settings,
        "reads_files": spec.reads_files(cls),
        "training": getattr(cls, "training", "none"),
        "weights": shipped(name) if issubclass(cls, Learned) else [],
        "deviations": deviations[0].partition(": ")[2] if deviations else "",
    }


def overview(found: dict[str, Any]) -> Table:
    """One line a method of `methods()`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("method", "stage", "needs", "reusable", "paper"):
        table.add_column(title, style="bold" if title == "method" else "")
    for one in found["methods"]:
        reusable = "yes" if one["reusable_across_questions"] else "no"
        paper = one["paper"].removeprefix("arXiv ")
        table.add_row(one["name"], one["stage"], one["needs"], reusable, paper)
    return table


def method_table(method: dict[str, Any]) -> Table:
    """One method of `methods()`."""
    settings = ", ".join(
        f"{name} (required)" if about["required"] else f"{name}={about['default']!r}"
        for name, about in method["settings"].items()
    )
    if method["reads_files"]:
        settings += ", or from=FILE and what to change of it"
    reusable = (
        "the question is not looked at: what is kept serves all questions about an image"
        if method["reusable_across_questions"]
        else "chosen anew for each question"
    )
    table = _grid(f"{method['name']}  ({method['class']})")
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for title, text in (
        ("what", method["summary"]),
        ("stage", method["stage"]),
        ("needs", method["needs"]),
        ("question", reusable),
        ("training", method["training"].replace("none", "")),
        ("settings", settings),
        ("weights", ", ".join(method["weights"])),
        ("paper", method["paper"]),
        ("deviations", method["deviations"]),
    ):
        if text:
            table.add_row(title, text)
    return table


def models() -> dict[str, Any]:
    """The supported families, the vision towers behind them, and the embedded model."""
    import json

    from vlmprune import embedded
    from vlmprune.hosts.families import FAMILIES, TOWERS

    families = [
        {
            "model_type": kind,
            "name": family.name,
            "class": family.cls,
            "media": [medium.kind for medium in family.media],
            "score": family.score,
            "positions": family.positions,
            "proved": _proved([medium.kind for medium in family.media]),
            "note": family.note,
            "refused": dict(family.fails),
        }
        for kind, family in FAMILIES.items()
    ]
    towers = [
        {"model_type": kind, "cls_token": cls, "score": _score(cls)} for kind, cls in TOWERS.items()
    ]
    folder = embedded.path()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    advised = (config.get("vlmprune") or {}).get("positions")
    own = {
        "name": "embedded model",
        "path": str(folder),
        "model_type": kind,
        "class": FAMILIES[kind].cls,
        "tower": config["vision_config"]["model_type"],
        "positions": advised or FAMILIES[kind].positions,
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "note": "used where no --model is given; works offline",
    }
    return {"families": families, "towers": towers, "embedded": own}


def _proved(media: list[str]) -> str:
    """What tests/hosts/families/test_every_family.py proves of each record, with its media."""
    videos = ", videos, both in one prompt" if "video" in media else ""
    return (
        f"equal to masking with SDPA and eager attention: padding, several images{videos}; cut "
        "caches equal to per-head masking; keeping everything changes no bit"
    )


def _score(cls_token: bool) -> str:
    return "CLS attention" if cls_token else "attention received"


def models_table(found: dict[str, Any]) -> Table:
    """`models()` as one table of three parts."""
    own = found["embedded"]
    rows = [*found["families"], own | {"note": f"{own['bytes'] / 1e6:.0f} MB; {own['note']}"}]
    table = _grid("Supported models")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_row("[dim not bold]family[/]", "[dim]class[/]", "[dim]positions[/]")
    for one in rows:
        table.add_row(one["name"], one["class"], one["positions"])
        refused = [f"transformers {at}, where {why}" for at, why in one.get("refused", {}).items()]
        parts = {"score": one.get("score"), "note": one.get("note"), "not on": "; ".join(refused)}
        for part, words in parts.items():
            if words:
                table.add_row(f"[dim not bold]  {part}[/]", f"[dim]{words}[/]")
    table.add_row()
    table.add_row("proved on each", _proved(["image"]))
    table.add_row("", "[dim]videos too, and both in one prompt, where a family has them[/]")
    table.add_row(
        "any other", "[dim]…ForConditionalGeneration is checked when a pruner attaches[/]"
    )
    table.add_row()
    table.add_row("[dim not bold]vision tower[/]", "[dim]scored by[/]")
    for tower in found["towers"]:
        table.add_row(tower["model_type"], tower["score"])
    return table


def _grid(title: str) -> Table:
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
