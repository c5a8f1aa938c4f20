"""The table of a comparison: its columns, and its rows as text, by budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vlmprune.costs.units import digits, flops_unit, mib
from vlmprune.study.compare.results import Comparison, Row
from vlmprune.study.wording import budget, interval


@dataclass(frozen=True)
class Line:
    """A row of the table as text.

    Attributes:
        name: of the method.
        texts: by column, as in `columns`.
        row: where it comes from.
    """

    name: str
    texts: dict[str, str]
    row: Row


def columns(result: Comparison) -> dict[str, str]:
    """Titles of the table's columns behind the name; a line break parts their lines."""
    unit, _ = unit_of(result)
    read = any(row.kv_read is not None for row in result.rows)
    has_random = any(row.against is not None for row in result.rows)
    return {
        "tokens": "visual\ntokens",
        "score": f"{result.what}\n%",
        **({"against": "against\nrandom"} if has_random else {}),
        "decoder": f"LLM\n{unit}FLOPs",
        "flops": f"all\n{unit}FLOPs",
        "kv": "visual KV\nMiB",
        **({"read": "visual KV\nread, MiB"} if read else {}),
        "first": "first token\nratio",
        **({"ms": "first token\nms"} if result.rows[0].first_token_ms is not None else {}),
    }


def sections(result: Comparison) -> Iterator[tuple[str, list[Line]]]:
    """The table's rows as text, by budget: a heading, and the lines below it."""
    _, scale = unit_of(result)
    budgets = dict.fromkeys((row.full, row.keep) for row in result.rows)
    for full, keep in budgets:
        rows = [row for row in result.rows if (row.full, row.keep) == (full, keep)]
        title = "" if full else "own budget" if keep is None else f"keep {budget(keep)}"
        yield title, [Line(row.name, _texts(row, scale), row) for row in rows]


def _texts(row: Row, scale: float) -> dict[str, str]:
    return {
        "tokens": f"{row.visual_tokens:.0f}",
        "score": interval(row.score),
        "against": difference(row),
        "decoder": digits(row.decoder_flops / scale),
        "flops": digits(row.flops / scale),
        "kv": mib(row.kv_bytes),
        "read": mib(row.kv_bytes if row.kv_read is None else row.kv_read),
        "first": f"{row.first_token_ratio:.2f}",
        "ms": "" if row.first_token_ms is None else f"{row.first_token_ms:.1f}",
    }


def difference(row: Row) -> str:
    """Points more or less than the control, with half the interval's width and the verdict."""
    one = row.against
    if one is None:
        return ""
    around = "" if one.ends is None else f" ±{50 * (one.ends[1] - one.ends[0]):.1f}"
    return f"{100 * one.value:+.1f}{around} {row.verdict}".rstrip()


def unit_of(result: Comparison) -> tuple[str, float]:
    """The unit in which the most expensive configuration has a few digits, and its size."""
    # Where the vision tower's are unknown, the language model's may still be known.
    found = [value for row in result.rows for value in (row.decoder_flops, row.flops)]
    return flops_unit(max((one for one in found if not math.isnan(one)), default=0.0))
