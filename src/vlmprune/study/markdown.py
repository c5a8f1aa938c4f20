"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = 1) -> str:
    """A table.

    Args:
        heads: of its columns.
        rows: the cells, one a column.
        left: as in `header`.
    """
    return "\n".join([header(heads, left), *map(line, rows)])


def header(heads: Sequence[str], left: int | None = None) -> str:
    """A table's first two lines.

    Args:
        heads: of its columns.
        left: the first columns, which are set to the left, those of figures to the right; None for
            all.
    """
    words = len(heads) if left is None else left
    rules = ["---"] * words + ["---:"] * (len(heads) - words)
    return f"{line(heads)}\n|{'|'.join(rules)}|"


def line(cells: Sequence[str]) -> str:
    """A table's line."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
