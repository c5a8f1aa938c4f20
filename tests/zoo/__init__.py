"""Tiny random models of every supported family's real class, and requests as processors make them.

No tokenizer, no image library and no download is needed. `ZOO` is the table that tests are
generated from; `WINDOWED` has the families that look back no further than a window, with a window
shorter than the requests.
"""

from __future__ import annotations

from zoo import llava, qwen, tiles
from zoo.base import Entry, Modality, Request

__all__ = ["WINDOWED", "ZOO", "Entry", "Modality", "Request"]

ZOO: dict[str, Entry] = {**llava.FAMILIES, **qwen.FAMILIES, **tiles.FAMILIES}
WINDOWED: dict[str, Entry] = tiles.WINDOWED
