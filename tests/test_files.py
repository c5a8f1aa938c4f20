"""Paths as people give them, whatever stands in them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vlmprune.errors import VlmpruneError
from vlmprune.files import is_file, is_folder, path_of, status, write


def test_home_folders_are_spelt_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/a") == tmp_path / "a" and path_of("a") == Path("a")
    with pytest.raises(RuntimeError):
        Path("~nouser/a").expanduser()
    with pytest.raises(VlmpruneError, match="'~nouser/a' begins with the home folder of a user"):
        path_of("~nouser/a")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "nowhere/a", f"{__file__}/a", ""])
def test_names_that_nothing_can_have_are_not_there(name: str) -> None:
    assert not is_file(name)
    assert name == "" or (status(name) is None and not is_folder(name))


def test_what_is_there() -> None:
    assert is_file(__file__) and not is_folder(__file__)
    assert is_folder(Path(__file__).parent) and not is_file(Path(__file__).parent)


def test_what_may_not_be_looked_at_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", refuses)
    with pytest.raises(VlmpruneError, match=r"'a/b' cannot be read \(Permission denied\)"):
        is_file("a/b")


def test_bytes_of_file_names_that_are_no_text_are_written_as_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.jpg")
    with pytest.raises(UnicodeEncodeError):
        name.encode("utf-8")
    write(tmp_path / "a", name)
    assert (tmp_path / "a").read_bytes() == rb"a\udcff.jpg"
