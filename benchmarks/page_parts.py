"""The one way in which figures become text: Markdown, for a terminal and for the pages of docs/."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlmprune import VlmpruneError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of some columns."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    lines.insert(1, "|---" * len(heads) + "|")
    return "\n".join(lines)


def around(made: Sequence[float]) -> str:
    """A ratio as `turns.ratio` has it, with its spread where there is one."""
    value, spread = made
    return f"{value:.2f}" if math.isnan(spread) else f"{value:.2f} ± {value * spread:.2f}"


def mib(size: float) -> str:
    """Bytes in MiB, with three digits or all before the point."""
    value = size / 2**20
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def replaced(text: str, name: str, made: str) -> str:
    """A page with the part between `<!-- name -->` and `<!-- end name -->` made anew.

    Raises:
        VlmpruneError: the page has no such lines.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise VlmpruneError(f"the page has no lines <!-- {name} --> and <!-- end {name} -->.")
    body = made.rstrip("\n") + "\n" if made else ""
    return pattern.sub(lambda at: at[1] + body + at[2], text)
