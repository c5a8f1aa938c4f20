"""Files that are written whole or not at all, and what is said where the disk refuses.

Nothing but the standard library, so that every room may write by it. Which file a command may
write is decided in `io.outputs`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmprune.errors import VlmpruneError, reason

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says where there is no room, or none for so large a file."""

# What the system says where nothing is, nor could be, under a name.
_ABSENT = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
)
_ROOM = "make room there, or give another path"
_LEAVE = "give a path that you may write to"
_WAYS_OUT = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "allow larger files (`ulimit -f`), or give another path",
    errno.EACCES: _LEAVE,
    errno.EPERM: _LEAVE,
    errno.EROFS: _LEAVE,
}


def path_of(text: str | Path) -> Path:
    """The path that somebody gives, with `~` and `~name` spelt out.

    Raises:
        VlmpruneError: no such user is known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise VlmpruneError(
            f"{str(text)!r} begins with the home folder of a user who is not known here; write "
            "the path out."
        ) from error


def status(path: str | Path) -> os.stat_result | None:
    """What the system says of a path; None where nothing is, nor could be, under that name.

    Raises:
        VlmpruneError: it may not be looked at.
    """
    try:
        return Path(path).stat()
    # No name holds a null character.
    except ValueError:
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise unreadable(path, error) from error


def is_file(path: str | Path) -> bool:
    """Whether a path is an ordinary file's; raises as `status`."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder's; raises as `status`."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def parsed(text: str) -> Any:
    """What a text of JSON holds.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python follows.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def unreadable(path: str | Path, error: OSError) -> VlmpruneError:
    """The sentence where a path cannot be read: path, cause and the way out."""
    return VlmpruneError(
        f"{str(path)!r} cannot be read ({error.strerror or reason(error)}); give a path that you "
        "may read."
    )


def refused(path: str | Path, error: OSError) -> VlmpruneError:
    """The sentence where a file cannot be written: path, cause and the way out."""
    way = _WAYS_OUT.get(error.errno or 0, "give another path")
    return VlmpruneError(
        f"{str(path)!r} cannot be written ({error.strerror or reason(error)}); {way}."
    )


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Tell of every refusal of the system within it by `refused`."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file, to be filled, that then takes the place of another.

    It lies in the same folder, is on the disk before it takes the place, and is removed where
    anything fails, Ctrl-C included. A symbolic link is written through: what it points to is
    replaced, and the link stays. The file's permissions are a new file's, as umask has them.

    Args:
        path: of the file to be written; its folder must be there.

    Yields:
        The temporary file, which is there and empty.

    Raises:
        VlmpruneError: the disk refuses.
    """
    target = Path(os.path.realpath(path))
    made = target.parent / f".vlmprune-{secrets.token_hex(8)}.tmp"
    try:
        with writing(path):
            # The system applies umask by itself; asking for it would change it for all threads.
            os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            mode = made.stat().st_mode & 0o777
            yield made
            # Who filled it may have put another file in its place.
            made.chmod(mode)
            _flush(made)
            made.replace(target)
    except BaseException:
        with suppress(OSError):
            made.unlink(missing_ok=True)
        raise
    with suppress(OSError):
        # That the name is on the disk, too; not every system lets a folder be opened.
        _flush(target.parent)


def _flush(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def write(path: str | Path, content: bytes | str) -> None:
    """Write a file at once, so that nobody finds half of it; see `replacing`.

    Raises:
        VlmpruneError: the disk refuses.
    """
    # File names may hold bytes that are no text; they are written as escapes, as JSON has them.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with replacing(path) as made, made.open("wb") as file:
        file.write(data)
