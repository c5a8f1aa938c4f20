"""What `compare` found: figures and answers of every configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from vlmprune.costs.units import ready
from vlmprune.io.outputs import mark_of
from vlmprune.study.stats import Interval

MARK = mark_of("compare")
SIDE = 384
"""Pixels of a drawn picture's long side, about twice what the page shows; grids of 16 and 24 divide
it."""
STEPS, STILL = 8, 192
"""Steps of an answer that are drawn, of all pictures together, and pixels of their long side."""
MOST = 12
"""Questions that are drawn, so that the page stays small."""

# Of a `ShownAnswer`, what JSON has.
_TOLD = ("text", "score", "same", "kept", "kv_share", "parts", "heads", "reached", "read_share")


@dataclass(frozen=True)
class Row:
    """One configuration. Costs are means over the questions, NaN where they are unknown.

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
        first_token_ratio: time to the first token, that of all tokens being 1.
        first_token_ms: the same in milliseconds, on a GPU; None on a CPU, where only ratios tell.
        kv_read: bytes for visual tokens that a decode step reads; None where that is `kv_bytes`.
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
    first_token_ratio: float
    first_token_ms: float | None = None
    kv_read: float | None = None

    @property
    def full(self) -> bool:
        """Whether it is the unpruned model."""
        return not self.spec

    @property
    def verdict(self) -> str:
        """ "loses" or "wins" against the control; "" where the interval does not tell."""
        ends = None if self.against is None else self.against.ends
        if ends is None:
            return ""
        return "loses" if ends[1] < 0 else "wins" if ends[0] > 0 else ""


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
class Still:
    """What one step of an answer read.

    Attributes:
        word: that it ended or went on with.
        images: for each picture which cells were read.
    """

    word: str
    images: list[Image.Image] = field(repr=False)


@dataclass(frozen=True)
class ShownAnswer:
    """What one configuration made of a question.

    Attributes:
        text: the answer.
        score: 0 to 1; None where no true answer is known.
        same: whether it is the unpruned model's.
        drawn: for each picture what was kept.
        kept: visual tokens that were kept, those inside the language model to its last layer.
        before: visual tokens that there were.
        kv_share: bytes of the visual tokens' keys and values, those of all tokens being 1; NaN
            where they are unknown.
        trouble: why nothing is drawn.
        parts: how many were kept because they are important, and because they are diverse.
        heads: share of the visual tokens that each layer's KV heads keep, where a cache was cut.
        reached: visual tokens that reach each layer, where not all reach the last.
        read_share: bytes of the visual tokens that a step reads, those of all tokens being 1, where
            the cache is read in part.
        strip: some of its steps, in order.
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
    read_share: float | None = None
    strip: list[Still] = field(repr=False, default_factory=list)


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
    answers: list[ShownAnswer] = field(repr=False)


@dataclass(frozen=True)
class Comparison:
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
        """Everything that JSON can hold, None for what is unknown; pictures are left out."""
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
        made: dict[str, Any] = ready(out)
        return made
