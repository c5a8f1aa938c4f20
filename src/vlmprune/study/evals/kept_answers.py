"""Where answers are kept, so that those that are known are not asked for again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.io.models import Loaded
from vlmprune.io.pictures import as_seen
from vlmprune.io.sources import Source
from vlmprune.pruner import Pruner
from vlmprune.study.evals.run import method_name, model_name
from vlmprune.study.tasks import Task
from vlmprune.version import __version__


def digest(loaded: Loaded, source: Source, task: Task) -> str:
    """A name for what answers depend on besides the method, so that no other's are taken up."""
    seen: list[Any] = [__version__, source.name, model_name(loaded.model)]
    seen += [loaded.model.device.type, task.label]
    if source.folder is not None:
        seen += [_stamp(file) for file in sorted(source.folder.iterdir()) if file.is_file()]
    files = task.read_from()
    if files is not None:
        seen += [_stamp(file) for file in files]
    else:
        for one in task.samples():
            images = [_stamp(i) if isinstance(i, Path) else _pixels(i) for i in one.images]
            limit = task.max_new_tokens(one)
            seen.append([one.id, one.question, one.answers, limit, images])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12]


def file_name(name: str, pruner: Pruner | None) -> str:
    """The name of a file for a method's answers.

    Args:
        name: of the method, for people.
        pruner: the method, which alone counts.
    """
    marked = hashlib.sha256(method_name(pruner).encode()).hexdigest()[:8]
    return f"{plain(name)}-{marked}.jsonl"


def plain(name: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")[:60]


def _stamp(file: Path) -> list[Any]:
    about = file.stat()
    return [file.name, about.st_size, about.st_mtime_ns]


def _pixels(image: Image.Image) -> str:
    # As the model gets it: the bytes of a palette's numbers say nothing of its colours.
    seen = as_seen(image)
    return hashlib.sha256(repr(seen.size).encode() + seen.tobytes()).hexdigest()
