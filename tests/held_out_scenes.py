"""The held-out scenes of the embedded model."""

from __future__ import annotations

import json

from PIL import Image

from vlmprune import embedded

SCENES = json.loads((embedded.held_out() / "scenes.json").read_text(encoding="utf-8"))


def picture(number: int) -> Image.Image:
    return Image.open(embedded.held_out() / SCENES[number]["file"]).convert("RGB")
