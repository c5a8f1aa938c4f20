"""Tasks, one a file: what is asked about which pictures, and how the answers are scored.

Here belong readers of question sets and scorers of answers; nothing here runs a model.
May import `io`, the embedded model's pictures, and `errors`.
"""

from __future__ import annotations

from pathlib import Path

from vlmprune.errors import VlmpruneError, meant
from vlmprune.files import is_folder, path_of, status
from vlmprune.study.tasks.base import Sample, Task
from vlmprune.study.tasks.clips import Clips
from vlmprune.study.tasks.folder import Folder
from vlmprune.study.tasks.gqa import Gqa
from vlmprune.study.tasks.local import Local
from vlmprune.study.tasks.mme import Mme
from vlmprune.study.tasks.pope import Pope
from vlmprune.study.tasks.scenes import Scenes
from vlmprune.study.tasks.scienceqa import ScienceQa
from vlmprune.study.tasks.textvqa import TextVqa
from vlmprune.study.tasks.vqav2 import Vqav2

# Local copies of standard sets, by the name that the command line takes.
COPIES: dict[str, type[Local]] = {
    one.name: one for one in (Pope, Gqa, TextVqa, ScienceQa, Mme, Vqav2)
}
TASKS: dict[str, type[Task]] = {"scenes": Scenes, "clips": Clips, "folder": Folder, **COPIES}

__all__ = ["COPIES", "TASKS", "Clips", "Folder", "Local", "Sample", "Scenes", "Task", "find_task"]


def find_task(text: str) -> Task:
    """The task that a text names.

    `scenes` or `clips`; `folder:PATH`, or the path of such a folder; or `pope:PATH` and its like
    for a local copy of a standard set.

    Raises:
        VlmpruneError: there is no such task, or nothing at the path.
    """
    name, _, rest = text.partition(":")
    if text == Scenes.name:
        return Scenes()
    if text == Clips.name:
        return Clips()
    if name == Folder.name and rest:
        return Folder(Path(rest))
    if name in COPIES and rest:
        task = COPIES[name](Path(rest))
        if status(task.given) is None:
            raise VlmpruneError(
                f"{rest!r} does not exist; {name}:PATH takes a folder with {task.names}."
            )
        return task
    if text and is_folder(path_of(text)):
        return Folder(Path(text))
    raise VlmpruneError(
        f"task {text!r} is unknown{meant(name, TASKS)}; use scenes or clips, or folder:PATH for a "
        f"folder of pictures with a questions.json, or {', '.join(COPIES)} likewise for a local "
        "copy of a standard set."
    )
