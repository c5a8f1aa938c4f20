"""The embedded model of vlmprune and what goes with it, as folders; `README.md` is its card.

Nothing is imported here: `from vlmprune import embedded` loads what lies in the folders.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "1.0.0"

__all__ = ["clips", "held_out", "learned", "path", "scenes"]

_HOME = Path(__file__).parent


def path() -> Path:
    """Folder of the model, as `from_pretrained` takes it."""
    return _HOME / "model"


def scenes() -> Path:
    """Folder of the demonstration scenes: pictures and `scenes.json` (questions, true answers)."""
    return _HOME / "scenes"


def held_out() -> Path:
    """Folder of the held-out test scenes: pictures and `scenes.json`, as in `scenes`."""
    return _HOME / "held_out"


def clips() -> Path:
    """Folder of held-out clips: frames and `questions.json`, as a folder task has it."""
    return _HOME / "clips"


def learned() -> Path:
    """Folder of the weights of methods that were trained on the model, one folder each."""
    return _HOME / "learned"
