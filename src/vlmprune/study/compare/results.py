"""What `compare` found: figures of every configuration, and the table that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from vlmprune.study.compare.plot import Dot

ALL_TOKENS = "all tokens"
MARK = "vlmprune compare"
"""Stands in all that `compare` writes, so that nothing else is overwritten."""

# Of an `Answer`, what JSON has.
_TOLD = ("text", "score", "same", "kept", "kv_share", "parts", "heads", "reached")


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        value: the mean.
        low: lower end; None where there are too few questions to tell.
        high: upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One configuration. Costs are means over the questions.

    Attributes:
        name: the method with its settings but the budget, or `ALL_TOKENS`.
        keep: the budget; None where the method has none, or its spec gives it.
        spec: the whole spec; "" for all tokens.
        control: whether the method is a control.
        score: share of right answers, or of answers that are the unpruned model's.
        agreement: share of answers that are the unpruned model's.
        against: how much more it scores than the control `random` at the same budget, question by
            question; None where there is no such control.
        visual_tokens: that the language model saw.
        decoder_flops: of the language model's prefill on visual tokens.
        flops: the same and the vision tower's.
        kv_bytes: of the visual tokens' keys and values.
        prefill_ratio: time to the first token, that of all tokens being 1.
        prefill_ms: the same in milliseconds, on a GPU; None on a CPU, where only ratios tell.
    """

    name: str
    keep: int | float | None
    spec: str
    control: bool
    score: Interval
    agreement: float
    against: Interval | None
    visual_tokens: float
    decoder_flops: float
    flops: float
    kv_bytes: float
    prefill_ratio: float
    prefill_ms: float | None = None

    @property
    def full(self) -> bool:
        """Whether it is the unpruned model."""
        return not self.spec

    @property
    def verdict(self) -> str:
        """ "loses" or "wins" against the control; "" where the interval does not tell."""
        one = self.against
        if one is None or one.low is None or one.high is None:
            return ""
        return "loses" if one.high < 0 else "wins" if one.low > 0 else ""


@dataclass(frozen=True)
class Skipped:
    """A configuration that the model or the request does not allow.

    Attributes:
        spec: the whole spec.
        reason: one sentence.
    """

    spec: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """What one configuration made of a question.

    Attributes:
        text: the answer.
        score: 0 to 1; None where no true answer is known.
        same: whether it is the unpruned model's.
        drawn: for each picture what was kept.
        kept: visual tokens that were kept, those inside the language model to its last layer.
        before: visual tokens that there were.
        kv_share: bytes of the visual tokens' keys and values, those of all tokens being 1.
        trouble: why nothing is drawn.
        parts: how many were kept because they are important, and because they are diverse.
        heads: share of the visual tokens that each layer's KV heads keep, where a cache was cut.
        reached: visual tokens that reach each layer, where not all reach the last.
    """

    text: str
    score: float | None
    same: bool
    drawn: list[Image.Image] = field(repr=False, default_factory=list)
    kept: int = 0
    before: int = 0
    kv_share: float = 1.0
    trouble: str = ""
    parts: dict[str, int] = field(default_factory=dict)
    heads: list[list[float]] = field(repr=False, default_factory=list)
    reached: list[int] = field(repr=False, default_factory=list)


@dataclass(frozen=True)
class Shown:
    """A question with the answers of all configurations, in the order of the rows.

    Attributes:
        question: as it was asked.
        truths: all true answers; empty where nobody knows.
        images: its pictures.
        answers: one a row.
    """

    question: str
    truths: tuple[str, ...]
    images: list[Image.Image] = field(repr=False)
    answers: list[Answer] = field(repr=False)


@dataclass(frozen=True)
class Result:
    """All configurations over the same questions.

    Attributes:
        model: its label.
        task: the task's label, or "pictures".
        scored: whether there are true answers; else `score` is the agreement.
        questions: how many were asked.
        rows: the configurations: all tokens first, then by budget, controls first.
        skipped: those that could not be asked.
        shown: some questions, for the page.
        device: the model's, as torch calls it.
        dtype: of its weights.
        repeat: timed turns, of which the medians were taken.
        timed: questions that a timed call answers at once.
    """

    model: str
    task: str
    scored: bool
    questions: int
    rows: list[Row]
    skipped: list[Skipped]
    shown: list[Shown] = field(repr=False)
    device: str
    dtype: str
    repeat: int
    timed: int

    @property
    def what(self) -> str:
        """What the score is."""
        return "accuracy" if self.scored else "agreement"

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold; pictures are left out."""
        plain = ("model", "task", "questions", "device", "dtype", "repeat", "timed")
        out: dict[str, Any] = {name: getattr(self, name) for name in plain}
        out["score"] = self.what
        out["rows"] = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        out["skipped"] = [asdict(one) for one in self.skipped]
        out["shown"] = [
            {
                "question": one.question,
                "truths": list(one.truths),
                "answers": [
                    {"name": row.name, "keep": row.keep} | {k: getattr(a, k) for k in _TOLD}
                    for row, a in zip(self.rows, one.answers, strict=True)
                ],
            }
            for one in self.shown
        ]
        return out

    def dots(self) -> list[Dot]:
        """The configurations as the plot has them."""
        _, scale = flops_unit(self.rows)
        return [
            Dot(
                name=row.name,
                label=budget(row.keep) if row.keep is not None else "",
                score=row.score.value,
                costs=(row.flops / scale, row.kv_bytes / 2**20, row.prefill_ratio),
                low=row.score.low,
                high=row.score.high,
                control=row.control,
                full=row.full,
            )
            for row in self.rows
        ]

    @property
    def axes(self) -> tuple[str, str, str]:
        """What the costs of the plot are."""
        return (
            f"{flops_unit(self.rows)[0]}FLOPs of prefill (vision tower and visual tokens)",
            "KV cache of visual tokens (MiB)",
            f"prefill time on {self.device} (all tokens: 1)",
        )


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


def columns(result: Result) -> dict[str, str]:
    """Titles of the table's columns behind the name; a line break parts their lines."""
    unit, _ = flops_unit(result.rows)
    has_random = any(row.against is not None for row in result.rows)
    return {
        "tokens": "visual\ntokens",
        "score": f"{result.what}\n%",
        **({"against": "against\nrandom"} if has_random else {}),
        "decoder": f"LLM\n{unit}FLOPs",
        "flops": f"all\n{unit}FLOPs",
        "kv": "KV\nMiB",
        "prefill": "prefill\nratio",
        **({"ms": "prefill\nms"} if result.rows[0].prefill_ms is not None else {}),
    }


def sections(result: Result) -> Iterator[tuple[str, list[Line]]]:
    """The table's rows as text, by budget: a heading, and the lines below it."""
    _, scale = flops_unit(result.rows)
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
        "kv": digits(row.kv_bytes / 2**20),
        "prefill": f"{row.prefill_ratio:.2f}",
        "ms": "" if row.prefill_ms is None else f"{row.prefill_ms:.1f}",
    }


def interval(one: Interval) -> str:
    """Per cent with the ends of the interval."""
    value = f"{100 * one.value:.1f}"
    if one.low is None or one.high is None:
        return value
    return f"{value} ({100 * one.low:.0f}-{100 * one.high:.0f})"


def difference(row: Row) -> str:
    """Points more or less than the control, with half the interval's width and the verdict."""
    one = row.against
    if one is None:
        return ""
    value = f"{100 * one.value:+.1f}"
    if one.low is not None and one.high is not None:
        value += f" ±{50 * (one.high - one.low):.1f}"
    return f"{value} {row.verdict}".rstrip()


def digits(value: float) -> str:
    """A number with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def budget(keep: int | float) -> str:
    """A budget as people say it: 64, or 25 %."""
    return str(keep) if isinstance(keep, int) else f"{100 * keep:.3g} %"


def flops_unit(rows: Sequence[Row]) -> tuple[str, float]:
    """The unit in which the most expensive configuration has a few digits, and its size."""
    most = max(row.flops for row in rows)
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if most >= size:
            return unit, size
    return "M", 1e6
