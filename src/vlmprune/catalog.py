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
    from vlmprune.hosts.families import FAMILIES, PROVED, TOWERS

    families = [
        {
            "model_type": kind,
            "name": family.name,
            "class": family.cls,
            "media": [medium.kind for medium in family.media],
            "score": family.score,
            "positions": family.positions,
            "proved": "; ".join(
                one.words if one.name == family.name else f"{one.name}: {one.words}"
                for one in PROVED.values()
                if one.record == kind
            ),
            "proofs": [_proof(one) for one in PROVED.values() if one.record == kind],
            "note": family.note,
            "refused": dict(family.fails),
        }
        for kind, family in FAMILIES.items()
    ]
    towers = [
        {"model_type": kind, "cls_token": cls, "score": _score(cls)} for kind, cls in TOWERS.items()
    ]
    own = _embedded(embedded.path()) if embedded.installed() else None
    return {"families": families, "towers": towers, "embedded": own, "proved": proved()}


def _proof(one: Any) -> dict[str, Any]:
    """What is proved of a model, of which `proved` tells the rest."""
    return {
        "name": one.name,
        "media": list(one.media),
        "together": one.together,
        "methods": list(one.stages),
        "refused": dict(one.refused),
    }


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


def proved() -> dict[str, Any]:
    """What the tests prove of each model with a record, and the kinds of methods that they try."""
    from vlmprune.hosts.families.proved import ATTENTION, STAGES, STEPS

    return {
        "each": (
            f"{STEPS} steps equal to masking, where layers are recurrent to a prompt without the "
            f"dropped tokens: one image, several, padded batches with rows without any, videos "
            f"likewise, VisPruner on each with {' and '.join(ATTENTION)} attention, what acts on "
            "the cache with one of the two in turn; a later turn; bfloat16 and float16; keeping "
            "everything changes no bit"
        ),
        "attention": list(ATTENTION),
        "steps": STEPS,
        "methods": {stage: f"{where} ({one})" for stage, (where, one) in STAGES.items()},
    }


def _score(cls_token: bool) -> str:
    return "CLS attention" if cls_token else "attention received"
