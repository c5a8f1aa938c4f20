"""Files that are written: where they may go, and whose they are.

All that a command writes names that command near its beginning, so that nothing else is
overwritten.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.errors import VlmpruneError

# Bytes at a file's beginning in which the mark is looked for.
_HEAD = 4096


def mark_of(command: str) -> str:
    """What stands in the files that a command writes."""
    return f"vlmprune {command}"


def is_marked(path: Path, mark: str) -> bool:
    """Whether a file is of the command whose mark it is."""
    with path.open("rb") as file:
        return mark.encode() in file.read(_HEAD)


def check_free(path: Path, mark: str) -> Path:
    """Refuse a file that could not be written, or that is there and not ours; makes the folder.

    Args:
        path: the file.
        mark: what stands in a file of ours, see `mark_of`.

    Raises:
        VlmpruneError: it is one of these.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise VlmpruneError(f"{str(path)!r} is a folder; give the name of a file in it.")
        if path.exists() and not is_marked(path, mark):
            raise VlmpruneError(
                f"{str(path)!r} is there already and not of `{mark}`; give another name, or "
                "move it away."
            )
    except OSError as error:
        raise VlmpruneError(f"{str(path)!r} cannot be written ({error.strerror}).") from error
    if not os.access(path.parent, os.W_OK):
        raise VlmpruneError(f"{str(path)!r} cannot be written (Permission denied).")
    return path


def check_target(path: Path) -> Path:
    """Refuse a file that could not be written, before any work.

    Raises:
        VlmpruneError: its folder is missing, it is a folder itself, or permission is.
    """
    if path.is_dir():
        raise VlmpruneError(f"{str(path)!r} is a folder; give the name of a file in it.")
    if not path.parent.is_dir():
        raise VlmpruneError(f"the folder of {str(path)!r} does not exist; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise VlmpruneError(f"{str(path)!r} may not be written; give another file.")
    return path


def result_path(target: str, option: str = "--out", ending: str = ".json") -> Path:
    """Where results go; makes the folder.

    Args:
        target: as it was given.
        option: that gave it, for error sentences.
        ending: that it must have.

    Raises:
        VlmpruneError: the suffix is another, or the place cannot be written.
    """
    path = Path(target).expanduser()
    if path.suffix.lower() != ending:
        raise VlmpruneError(
            f"{option} {target!r} does not end in {ending}; use a name such as out{ending}."
        )
    if not _writable([path]):
        raise VlmpruneError(f"{option} {target!r} cannot be written; choose another path.")
    return path


def overlay_paths(target: str, images: Sequence[str]) -> list[Path]:
    """Where the pictures go: `target`, or `target`-1, -2, … for several images.

    Makes the folder, so that a path that cannot be written is found before any work.

    Raises:
        VlmpruneError: the suffix is unknown, the place cannot be written, or a picture that was
            given would be overwritten.
    """
    path = Path(target).expanduser()
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise VlmpruneError(
            f"overlay {target!r} has no suffix of a picture; use a name such as overlay.png."
        )
    names = [path]
    if len(images) > 1:
        names = [path.with_stem(f"{path.stem}-{i}") for i in range(1, len(images) + 1)]
    if not _writable(names):
        raise VlmpruneError(f"overlay {target!r} cannot be written; choose another path.")
    for name in names:
        if any(name.exists() and name.samefile(image) for image in images):
            raise VlmpruneError(f"overlay {str(name)!r} is one of the images; choose another path.")
    return names


def _writable(names: Sequence[Path]) -> bool:
    """Whether files of one folder can be written; makes the folder."""
    folder = names[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK) and all(
            os.access(name, os.W_OK) and not name.is_dir() for name in names if name.exists()
        )
    except OSError:
        return False


def write(path: Path, content: bytes | str) -> None:
    """Write a file at once, so that nobody finds half of it.

    Raises:
        VlmpruneError: the disk refuses.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # What a link points to is written, not the link.
    path, name = path.resolve(), None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            name = Path(file.name)
            file.write(data)
        # As any new file has them; a temporary one is the owner's alone.
        mask = os.umask(0)
        os.umask(mask)
        name.chmod(0o666 & ~mask)
        name.replace(path)
    except OSError as error:
        if name is not None:
            name.unlink(missing_ok=True)
        raise VlmpruneError(f"{str(path)!r} cannot be written ({error.strerror}).") from error


def json_text(content: Mapping[str, Any]) -> str:
    """An object as a JSON file holds it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def save_json(content: Mapping[str, Any], path: Path) -> None:
    """Write an object as JSON, into a folder that there is.

    Raises:
        VlmpruneError: the disk refuses.
    """
    check_target(path)
    try:
        path.write_text(json_text(content), encoding="utf-8")
    except OSError as error:
        raise VlmpruneError(f"{str(path)!r} cannot be written ({error.strerror}).") from error
