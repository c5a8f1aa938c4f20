"""Files that commands write: where they may go, and whose they are.

One policy for all of them. A file bears the mark of the command that wrote it, and a file without
that mark is overwritten by `--force` alone. All names of a command's files are checked before any
work, and again when they are written, which happens whole or not at all (`vlmprune.files`).
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.costs.units import MIB, ready
from vlmprune.errors import VlmpruneError, reason
from vlmprune.files import path_of, write, writing

# Bytes at a text's beginning in which the mark is looked for.
_HEAD = 4096
# The largest header of a safetensors file that is read for its mark.
_HEADER = 100 * MIB
# EXIF's number of "Software".
_SOFTWARE = 0x131
# Formats of pictures that have a comment instead of EXIF.
_COMMENTED = ("GIF", "JPEG2000")
# Where a mark stands, and nowhere else: who merely speaks of a command has not been written by it.
_JSON = re.compile(rb'\s*\{\s*"(?:made_by|format)"\s*:\s*"(vlmprune [^"\\]*)"')
_HTML = re.compile(rb'<meta name="generator" content="(vlmprune [^"]*)">')
_MARKDOWN = re.compile(rb"<!-- (vlmprune [^>]*) -->\r?\n")


def mark_of(command: str) -> str:
    """What stands in the files that a command writes."""
    return f"vlmprune {command}"


def maker(path: Path) -> str:
    """The mark in a file; "" where there is none.

    It is the first entry of a JSON object ("made_by" or "format"), the generator of an HTML page,
    the first line of Markdown, the software or comment of a picture, or the metadata of a
    safetensors file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
        found = _JSON.match(head) or _MARKDOWN.match(head)
        if found is None and head[:9].lower() == b"<!doctype":
            found = _HTML.search(head)
        if found is not None:
            return found[1].decode("utf-8", "replace")
        size = int.from_bytes(head[:8], "little")
        if head[8:9] == b"{" and size <= _HEADER:
            file.seek(8)
            return _stored(file.read(size))
    return _drawn(path)


def _stored(header: bytes) -> str:
    """The mark in a safetensors file's header."""
    try:
        about = json.loads(header)["__metadata__"]["format"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(about)


def _drawn(path: Path) -> str:
    """The mark in a picture."""
    try:
        with Image.open(path) as image:
            found = image.info.get("Software"), image.info.get("comment")
            texts = [*found, image.getexif().get(_SOFTWARE)]
    # Broken files make Pillow's decoders fail in many ways.
    except Exception:
        return ""
    for text in texts:
        said = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if isinstance(said, str) and said.startswith("vlmprune "):
            return said
    return ""


@dataclass(frozen=True)
class Output:
    """A file that a command writes.

    Attributes:
        path: of it.
        mark: what stands in it, and in one that may be overwritten.
        force: overwrite any file.
    """

    path: Path
    mark: str
    force: bool = False

    def check(self) -> None:
        """Refuse a file that could not be written, or that is there and not ours.

        Raises:
            VlmpruneError: it is one of these.
        """
        with writing(self.path):
            there = self.path.parent.is_dir()
        if not there:
            check_folder(self.path.parent)
            return
        check_target(self.path)
        if not self.force and self.foreign():
            raise VlmpruneError(
                f"{str(self.path)!r} is there already and not of `{self.mark}`; give another name, "
                "move it away, or overwrite it by --force."
            )

    def foreign(self) -> bool:
        """Whether a file is there that this command did not write."""
        with writing(self.path):
            return self.path.exists() and not self.ours()

    def ours(self) -> bool:
        """Whether the file that is there is one of this command's."""
        return maker(self.path) == self.mark

    def write(self, content: bytes | str) -> None:
        """Write it, whole or not at all, if it still may be; its folder is made if need be.

        Raises:
            VlmpruneError: another file has come there meanwhile, or the disk refuses.
        """
        make_folder(self.path.parent)
        self.check()
        write(self.path, content)

    def write_json(self, content: Mapping[str, Any]) -> None:
        """Write an object as JSON; its first entry must be the mark."""
        self.write(json_text(content))

    def write_picture(
        self,
        picture: Image.Image,
        later: Sequence[Image.Image] = (),
        durations: Sequence[int] = (),
    ) -> None:
        """Write a picture in the format of its name, with the mark where the format has room.

        Args:
            picture: it, or the first frame of one that moves.
            later: the other frames, of a format that can move; shown over and over.
            durations: milliseconds of each frame, the first's among them.

        Raises:
            VlmpruneError: the disk or the format refuses.
        """
        kind = Image.registered_extensions()[self.path.suffix.lower()]
        about: dict[str, Any] = {"comment": self.mark.encode()}
        if kind not in _COMMENTED:
            exif = Image.Exif()
            exif[_SOFTWARE] = self.mark
            about = {"exif": exif}
        if later:
            about |= {"save_all": True, "append_images": list(later), "loop": 0}
            about |= {"duration": list(durations)}
        drawn = io.BytesIO()
        try:
            picture.save(drawn, format=kind, **about)
        except (OSError, ValueError) as error:
            raise VlmpruneError(
                f"{str(self.path)!r} cannot be drawn ({reason(error)}); use a name such as "
                f"{self.path.stem}.png."
            ) from error
        self.write(drawn.getvalue())


def claim(outputs: Iterable[Output | None], inputs: Iterable[str | Path] = ()) -> None:
    """Check all files of a command, before any work.

    Args:
        outputs: all of them; None for one that nobody asked for.
        inputs: files that the command reads, which are never overwritten.

    Raises:
        VlmpruneError: one may not be written, two are one file, or one is read.
    """
    read = {os.path.realpath(one) for one in inputs}
    seen: dict[str, Path] = {}
    for one in outputs:
        if one is None:
            continue
        real = os.path.realpath(one.path)
        if real in seen:
            raise VlmpruneError(
                f"{str(seen[real])!r} and {str(one.path)!r} are to be written and are one file; "
                "give each a name of its own."
            )
        seen[real] = one.path
        if real in read:
            raise VlmpruneError(
                f"{str(one.path)!r} is one of the files to be read; choose another path."
            )
        one.check()


def check_target(path: Path) -> Path:
    """Refuse a file that could not be written, before any work.

    Raises:
        VlmpruneError: its folder is missing or takes no files, it is a folder itself or no
            ordinary file, or permission is missing.
    """
    with writing(path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and stat.S_ISDIR(mode):
            raise VlmpruneError(f"{str(path)!r} is a folder; give the name of a file in it.")
        if mode is not None and not stat.S_ISREG(mode):
            # A device or a pipe would be replaced by a file.
            raise VlmpruneError(f"{str(path)!r} is no ordinary file; give the name of one.")
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise VlmpruneError(f"the folder of {str(path)!r} does not exist; make it first.")
        if mode is not None and not os.access(path, os.W_OK):
            raise PermissionError(13, os.strerror(13))
        _try(folder)
    return path


def check_folder(path: Path) -> None:
    """Refuse a folder in which files could not be written; one that is not there is not made.

    Raises:
        VlmpruneError: it, or what it would be made in, is no folder, or takes no files.
    """
    with writing(path):
        place = Path(os.path.realpath(path))
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            what = "it" if place == Path(os.path.realpath(path)) else repr(str(place))
            raise VlmpruneError(
                f"{str(path)!r} cannot be a folder, for {what} is a file; give another path."
            )
        _try(place)


def make_folder(path: Path) -> None:
    """Make a folder with those above it, if it is not there.

    Raises:
        VlmpruneError: the disk refuses.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def _try(folder: Path) -> None:
    """Make a file and remove it: permissions do not tell of file systems that are read-only."""
    probe = folder / f".vlmprune-{secrets.token_hex(8)}.tmp"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    finally:
        probe.unlink(missing_ok=True)


def named(target: str, option: str, *endings: str) -> Path:
    """The path that an option gives.

    Args:
        target: as it was given.
        option: that gave it.
        endings: of which it must have one.

    Raises:
        VlmpruneError: it ends otherwise.
    """
    path = path_of(target)
    if path.suffix.lower() not in endings:
        raise VlmpruneError(
            f"{option} {target!r} does not end in {endings[0]}; use a name such as out{endings[0]}."
        )
    return path


def file_of(target: str, option: str) -> Path:
    """The path of a file that an option gives, with a name of its own.

    Raises:
        VlmpruneError: it has none, as `/` and `.` have not.
    """
    path = path_of(target)
    if not path.name:
        raise VlmpruneError(f"{option} {target!r} is a folder; give the name of a file in it.")
    return path


def overlay_names(target: str, images: Sequence[str]) -> list[Path]:
    """Where the pictures go: `target`, or `target`-1, -2, … for several images.

    Raises:
        VlmpruneError: the suffix is no picture's.
    """
    path = path_of(target)
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise VlmpruneError(
            f"overlay {target!r} has no suffix of a picture; use a name such as overlay.png."
        )
    return numbered(path, len(images))


def numbered(path: Path, count: int) -> list[Path]:
    """A file's name for so many files: of several each with its number, from 1."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]


def json_text(content: Mapping[str, Any]) -> str:
    """An object as a JSON file holds it; null for what is unknown."""
    return json.dumps(ready(content), indent=2, ensure_ascii=False) + "\n"


def save_json(content: Mapping[str, Any], path: Path) -> None:
    """Write an object as JSON, into a folder that there is.

    Raises:
        VlmpruneError: the disk refuses.
    """
    check_target(path)
    write(path, json_text(content))


__all__ = [
    "Output",
    "check_folder",
    "check_target",
    "claim",
    "file_of",
    "json_text",
    "make_folder",
    "maker",
    "mark_of",
    "named",
    "numbered",
    "overlay_names",
    "save_json",
    "write",
    "writing",
]
