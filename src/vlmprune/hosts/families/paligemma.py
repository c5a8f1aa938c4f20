"""PaliGemma and PaliGemma 2: every patch a visual token."""

from __future__ import annotations

from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.squares import WINDOWS, Squares

FAMILIES: dict[str, Family] = {
    "paligemma": Family(
        score="attention received in the last layer",
        name="PaliGemma, PaliGemma 2",
        cls="PaliGemmaForConditionalGeneration",
        positions="compact",
        media=(Squares(),),
        mixes={"<5.24": "their prefixes see each other"},
        note=f"no CLS token; positions begin at 1; PaliGemma 2: no cut caches; {WINDOWS}",
        first=1,
    ),
}
