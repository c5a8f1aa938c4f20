"""Tasks, one a file: what is asked about which pictures, and how the answers are scored."""

from __future__ import annotations

from pathlib import Path

from vlmprune.errors import VlmpruneError
from vlmprune.tasks.base import Sample, Task
from vlmprune.tasks.folder import Folder
from vlmprune.tasks.scenes import Scenes

# By the name that the command line takes.
TASKS: dict[str, type[Task]] = {"scenes": Scenes, "folder": Folder}

__all__ = ["TASKS", "Folder", "Sample", "Scenes", "Task", "find_task"]


def find_task(text: str) -> Task:
    """The task that a text names: `scenes`, or `folder:PATH`, or the path of such a folder.

    Raises:
        VlmpruneError: there is no such task.
    """
    name, _, rest = text.partition(":")
    if text == Scenes.name:
        return Scenes()
    if name == Folder.name and rest:
        return Folder(Path(rest))
    if text and Path(text).expanduser().is_dir():
        return Folder(Path(text))
    raise VlmpruneError(
        f"task {text!r} is unknown; use scenes, or folder:PATH for a folder of pictures with a "
        "questions.json."
    )
