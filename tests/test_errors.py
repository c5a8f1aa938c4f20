"""What was probably meant where a name is none of those that there are."""

from __future__ import annotations

import pytest

from vlmprune.errors import meant

NAMES = ("vispruner", "visionzip", "llava-1.5-7b")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("vispuner", "vispruner"),
        ("VisionZip", "visionzip"),
        ("llava-1.5", "llava-1.5-7b"),
        ("magic", ""),
        ("", ""),
        (7, ""),
        # It is one of them, and something else is wrong.
        ("vispruner", ""),
    ],
)
def test_the_nearest_name_is_told(written: object, told: str) -> None:
    assert meant(written, NAMES) == (f" (did you mean {told!r}?)" if told else "")
    assert meant(written, ()) == ""
