"""What there is: the methods and the supported models, as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def methods(names: Sequence[str] = ()) -> dict[str, Any]:
    """Methods: name, stage, needs, paper, settings with defaults, deviations.

    Args:
        names: which; none for all.

    Raises:
        VlmpruneError: one is unknown.
    """
    from vlmprune import spec
    from vlmprune.methods import METHODS

    classes = {name: spec.class_of(name) for name in names or METHODS}
    return {"methods": [_method(name, classes[name]) for name in names or METHODS]}


def _method(name: str, cls: type) -> dict[str, Any]:
    from vlmprune import spec
    from vlmprune.methods.bases.learned import Learned, shipped

    settings = {}
    for field in spec.settings_of(cls):
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


def models() -> dict[str, Any]:
    """The supported families, the vision towers behind them, and the embedded model or None."""
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
            "proved": proved([medium.kind for medium in family.media]),
            "note": family.note,
            "refused": dict(family.fails),
        }
        for kind, family in FAMILIES.items()
    ]
    towers = [
        {"model_type": kind, "cls_token": cls, "score": _score(cls)} for kind, cls in TOWERS.items()
    ]
    own = _embedded(embedded.path()) if embedded.installed() else None
    return {"families": families, "towers": towers, "embedded": own}


def _embedded(folder: Path) -> dict[str, Any]:
    """The embedded model, which lies in a folder."""
    import json

    from vlmprune.hosts.families import FAMILIES

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    advised = (config.get("vlmprune") or {}).get("positions")
    return {
        "name": "embedded model",
        "path": str(folder),
        "model_type": kind,
        "class": FAMILIES[kind].cls,
        "tower": config["vision_config"]["model_type"],
        "positions": advised or FAMILIES[kind].positions,
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "note": "used where no --model is given; works offline",
    }


def proved(media: list[str]) -> str:
    """What tests/hosts/families/test_every_family.py proves of each record, with its media."""
    videos = ", videos, both in one prompt" if "video" in media else ""
    return (
        f"equal to masking with SDPA and eager attention: padding, several images{videos}; cut "
        "caches, where they can be cut, equal to per-head masking; keeping everything changes no "
        "bit"
    )


def _score(cls_token: bool) -> str:
    return "CLS attention" if cls_token else "attention received"
