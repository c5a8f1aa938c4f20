"""What stands in the way of a picture beside the picture itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmprune import VlmpruneError
from vlmprune.io.pictures import open_image, size_of


@pytest.mark.parametrize("opened", [open_image, size_of])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "is too large for the memory; give a smaller one."),
        (PermissionError(13, "Permission denied"), "may not be read; give one that may."),
    ],
    ids=["memory", "permission"],
)
def test_one_sentence_names_it(
    opened: Any, error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A superuser may read anything, and memory is seldom full, so Pillow is made to say so."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png")

    def refusing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(Image, "open", refusing)
    with pytest.raises(VlmpruneError) as told:
        opened(tmp_path / "a.png")
    assert str(told.value) == f"image {str(tmp_path / 'a.png')!r} {said}"
