"""Conversations about the demonstration scenes, and runs on them that take a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmprune.learned import QueCC

from vlmprune import embedded
from vlmprune.io.models import Loaded
from vlmprune.training.data import Entry, read
from vlmprune.training.learner import Learner
from vlmprune.training.rows import RowMaker
from vlmprune.training.trainer import Run, TrainingSettings

SIDE = 56
"""Pixels a side: 16 visual tokens instead of 256."""


def scenes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((embedded.scenes() / "scenes.json").read_text())
    return found


def listed(turns: int = 4) -> list[dict[str, Any]]:
    """The demonstration scenes in LLaVA's format, with absolute paths."""
    entries = []
    for number, scene in enumerate(scenes()):
        said = []
        for place, asked in enumerate(scene["questions"][:turns]):
            mark = "<image>\n" if place == 0 else ""
            said.append({"from": "human", "value": mark + asked["question"]})
            said.append({"from": "gpt", "value": asked["answer"]})
        file = str(embedded.scenes() / scene["file"])
        entries.append({"id": f"scene-{number}", "image": file, "conversations": said})
    return entries


def written(folder: Path, content: Any = None) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(listed() if content is None else content))
    return path


def entries(folder: Path) -> list[Entry]:
    return read(written(folder))


def run(loaded: Loaded, some: list[Entry], out: Path, pruner: Any = None, **settings: Any) -> Run:
    """A run of a small QueCC on small pictures."""
    import torch

    torch.manual_seed(0)
    if pruner is None:
        pruner = QueCC.fresh(loaded.model, window=2, hidden=16)
    rows = RowMaker(loaded.processor)
    given = {"steps": 4, "batch": 2, "turns": 2, "warm_up": 1, "every": 2, "save_every": 2}
    chosen = TrainingSettings(**(given | settings))
    learner = Learner(loaded.model, pruner)
    return Run(loaded, learner, rows, some, some[:1], None, None, chosen, out, "a run", {})
