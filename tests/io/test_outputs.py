"""What may be overwritten, and that a file is written whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from vlmprune import files
from vlmprune.errors import VlmpruneError
from vlmprune.io.outputs import Output, check_folder, check_target, claim, maker

MARK = "vlmprune bench"


def process(code: str, *words: Any, **given: Any) -> subprocess.Popen[str]:
    """A Python process that runs some code, with pipes to all its streams."""
    piped = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | given
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, words)], text=True, **piped
    )


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    target.write_text("the old figures")
    writer = process(
        """
        import sys
        from vlmprune.files import replacing
        with replacing(sys.argv[1]) as made, made.open("w") as file:
            file.write("half of the new ")
            file.flush()
            print("half", flush=True)
            sys.stdin.readline()
            file.write("figures")
        """,
        target,
    )
    assert writer.stdout is not None and writer.stdout.readline() == "half\n"
    (temporary,) = set(tmp_path.iterdir()) - {target}
    assert temporary.read_text() == "half of the new "
    writer.kill()
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert target.read_text() == "the old figures"


def test_a_disk_without_room_is_one_sentence_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    target.write_text("the old figures")
    writer = process(
        """
        import sys
        from vlmprune.errors import VlmpruneError
        from vlmprune.files import write
        try:
            write(sys.argv[1], b"x" * 100_000)
        except VlmpruneError as error:
            print(error)
        """,
        target,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    said, errors = writer.communicate()
    assert errors == "" and said.count("\n") == 1
    assert f"{str(target)!r} cannot be written (File too large); allow larger files" in said
    assert target.read_text() == "the old figures" and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_one_may_not_write_to_is_one_sentence() -> None:
    """A superuser may write anywhere, so the process becomes another user where it can."""
    reader = process(
        """
        import os, shutil, tempfile
        from pathlib import Path
        from vlmprune.errors import VlmpruneError
        from vlmprune.io.outputs import check_folder, check_target
        folder = Path(tempfile.mkdtemp())
        mine = folder / "mine.json"
        mine.touch(0o444)
        folder.chmod(0o755 if os.getuid() == 0 else 0o555)
        if os.getuid() == 0:
            os.seteuid(65534)
        try:
            for act in (check_target, check_folder):
                for name in ("new.json", "mine.json")[: 2 - (act is check_folder)]:
                    try:
                        act(folder / name)
                    except VlmpruneError as error:
                        print(error)
        finally:
            os.seteuid(os.getuid())
            folder.chmod(0o755)
            shutil.rmtree(folder)
        """
    )
    said, errors = reader.communicate()
    assert errors == "" and said.count("\n") == 3, (said, errors)
    for line in said.splitlines():
        assert "cannot be written (Permission denied); give a path that you may write to" in line


FAILURES: list[BaseException] = [KeyboardInterrupt(), OSError(28, "No space left on device")]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("failure", FAILURES, ids=["Ctrl-C", "full"])
def test_nothing_is_left_of_a_write_that_fails(
    failure: BaseException, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "figures.json"
    target.write_text("the old figures")

    def fails(*_: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        place: Any = os if step == "fsync" else Path
        patch.setattr(place, step, fails)
        expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else VlmpruneError
        with pytest.raises(expected) as caught:
            files.write(target, "the new figures")
    if expected is VlmpruneError:
        assert str(caught.value) == (
            f"{str(target)!r} cannot be written (No space left on device); make room there, or "
            "give another path."
        )
    assert target.read_text() == "the old figures" and list(tmp_path.iterdir()) == [target]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = tmp_path / "figures.json", []
    flush = os.fsync

    def watched(place: int) -> None:
        seen.append((Path(f"/proc/self/fd/{place}").readlink().name, target.exists()))
        flush(place)

    monkeypatch.setattr(os, "fsync", watched)
    files.write(target, "figures")
    (first, there), (second, after) = seen
    assert first.startswith(".vlmprune-") and not there
    assert second == tmp_path.name and after


def test_permissions_follow_umask_and_links_are_written_through(tmp_path: Path) -> None:
    real, link = tmp_path / "real" / "a.json", tmp_path / "a.json"
    real.parent.mkdir()
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        files.write(link, "one")
        assert real.stat().st_mode & 0o777 == 0o640
        real.chmod(0o600)
        os.umask(0o002)
        files.write(link, "two")
        # Safetensors would leave it to its owner alone.
        with files.replacing(tmp_path / "b") as made:
            save_file({"x": torch.zeros(1)}, made)
    finally:
        os.umask(before)
    assert link.is_symlink() and real.read_text() == "two"
    assert real.stat().st_mode & 0o777 == (tmp_path / "b").stat().st_mode & 0o777 == 0o664
    assert [one.name for one in real.parent.iterdir()] == ["a.json"]
    # Whose a file is, is asked of what the link points to.
    real.write_text("my notes")
    with pytest.raises(VlmpruneError, match="is there already and not of"):
        Output(link, MARK).check()
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(VlmpruneError, match=r"cannot be written .*symbolic links"):
        check_target(link)


def _png(path: Path, text: str) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", text)
    Image.new("RGB", (9, 9)).save(path, pnginfo=about)


@pytest.mark.parametrize(
    ("name", "content", "mark"),
    [
        ("a.json", '{\n  "made_by": "vlmprune bench",\n "x": 1}', MARK),
        ("a.json", '{"format": "vlmprune evaluation 1"}\n{}', "vlmprune evaluation 1"),
        ("a.json", '{"note": "made_by", "by": "vlmprune bench"}', ""),
        ("a.json", '{"x": {"made_by": "vlmprune bench"}}', ""),
        ("a.json", '[{"made_by": "vlmprune bench"}]', ""),
        ("a.json", "", ""),
        ("a.md", f"<!-- {MARK} -->\n\n# figures", MARK),
        ("a.md", f"# my notes\n\nmade by `{MARK}`\n\n<!-- {MARK} -->\n", ""),
        ("a.html", f'<!DOCTYPE html>\n<meta name="generator" content="{MARK}">', MARK),
        ("a.html", f"<!DOCTYPE html>\n<title>{MARK}</title>", ""),
        ("a.png", lambda path: _png(path, MARK), MARK),
        ("a.png", lambda path: _png(path, "Matplotlib"), ""),
        ("a.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + MARK.encode()), ""),
        *(
            (f"a.{ending}", lambda path: Output(path, MARK).write_picture(PICTURE), MARK)
            for ending in ("png", "jpg", "gif", "webp", "tif")
        ),
        # A format without room for it: overwritten by --force alone.
        ("a.bmp", lambda path: Output(path, MARK).write_picture(PICTURE), ""),
        (
            "a.safetensors",
            lambda path: save_file({"x": torch.zeros(2)}, path, {"format": MARK}),
            MARK,
        ),
        ("a.safetensors", lambda path: save_file({"x": torch.zeros(2)}, path), ""),
        ("a.safetensors", lambda path: path.write_bytes(b"\x09" + b"\0" * 7 + b"{torn"), ""),
    ],
)
def test_whose_a_file_is(
    name: str, content: str | Callable[[Path], Any], mark: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        content(path)
    assert maker(path) == mark
    before = path.read_bytes()
    if mark == MARK:
        Output(path, MARK).check()
    for other in {"vlmprune run", MARK} - {mark}:
        with pytest.raises(VlmpruneError, match="move it away, or overwrite it by --force"):
            Output(path, other).check()
        Output(path, other, force=True).check()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


PICTURE = Image.new("RGB", (32, 32), "red")


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        (".", "is a folder; give the name of a file in it"),
        ("pipe", "is no ordinary file"),
        ("file/a", "cannot be a folder, for it is a file; give another path"),
        (250 * "ab", r"cannot be written \(File name too long\)"),
    ):
        for force in (False, True):
            with pytest.raises(VlmpruneError, match=said):
                Output(tmp_path / name, MARK, force).check()
    with pytest.raises(VlmpruneError, match="is a file; give another path"):
        check_folder(tmp_path / "file" / "a")
    with pytest.raises(VlmpruneError, match=r"the folder of '.*a' does not exist; make it first"):
        check_target(tmp_path / "new" / "a")
    Output(tmp_path / "new" / "folder" / "a", MARK).check()
    assert len(list(tmp_path.iterdir())) == 2
    Output(tmp_path / "new" / "folder" / "a", MARK).write("text")
    assert (tmp_path / "new" / "folder" / "a").read_text() == "text"


def test_no_two_outputs_are_one_file_and_none_is_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a.png")
    one, two = (Output(tmp_path / name, MARK, force=True) for name in ("a.png", "link"))
    with pytest.raises(VlmpruneError, match="are one file"):
        claim([one, None, two])
    with pytest.raises(VlmpruneError, match="is one of the files to be read"):
        claim([one], [tmp_path / "link"])
    claim([one], [tmp_path / "b.png"])


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    output = Output(tmp_path / "a.md", MARK)
    output.check()
    output.path.write_text("my notes")
    with pytest.raises(VlmpruneError, match="is there already"):
        output.write("figures")
    assert output.path.read_text() == "my notes"


def test_a_picture_that_its_format_cannot_hold_is_one_sentence(tmp_path: Path) -> None:
    """JPEG ends at 65535 pixels a side, which Pillow tells only as it writes."""
    wide = Output(tmp_path / "kept.jpg", MARK)
    with pytest.raises(VlmpruneError, match=r"kept\.jpg' cannot be drawn .*; use .* kept\.png\.$"):
        wide.write_picture(Image.new("L", (65536, 1)))
    assert not list(tmp_path.iterdir())
