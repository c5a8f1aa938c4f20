"""Lists of entries in JSON files that people write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.files import parsed


def entries(path: Path, what: str, form: str) -> list[Any]:
    """What a file lists, one entry or more.

    Args:
        path: the file.
        what: the entries, in words.
        form: how the file is written, for error sentences.

    Raises:
        VlmpruneError: the file cannot be read, or holds no such list.
    """
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VlmpruneError(
            f"{str(path)!r} cannot be read ({error.strerror}); write it as {form}."
        ) from error
    except ValueError as error:
        raise VlmpruneError(f"{path} is no JSON ({error}); write it as {form}.") from error
    if not isinstance(found, list) or not found:
        raise VlmpruneError(f"{path} holds no list of {what}; write it as {form}.")
    return found
