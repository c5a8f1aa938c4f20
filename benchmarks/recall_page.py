"""What `recall_accuracy.py` stored, as the tables of docs/recall.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from page_parts import table
from vlmprune.study.evals.results import UNPRUNED
from vlmprune.study.stats import Mean, mean_of

KINDS = ("presence", "count", "at", "where", "left", "above", "read", "describe")
"""By the generator's names, the long answers last."""
AIM, AIM_KIND, ENOUGH = -1.5, -3.0, 200
"""Points that may be lost, at 95 %: of all questions, and of each kind with so many questions."""

Sample = tuple[str, str, str, int, int]
Which = Callable[[Sample], bool]


class Rows:
    """Stored rows, and means of them."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.samples: list[Sample] = [tuple(one) for one in found["samples"]]
        self.rows: dict[str, Mapping[str, Any]] = {one["label"]: one for one in found["rows"]}

    def mean(self, label: str, which: Which, less: str | None = None, of: str = "scores") -> Mean:
        """The mean of a row over some of its samples, or how much more it has than another row.

        Args:
            label: the row's.
            which: samples that count.
            less: the other row, of which the same samples are taken.
            of: "scores", or "same" for being the unpruned model's answer.
        """
        own = self.rows[label][of]
        other = "0" * len(own) if less is None else self.rows[less][of]
        some = [i for i, sample in enumerate(self.samples[: len(own)]) if which(sample)]
        scores = [float(own[i]) - float(other[i]) for i in some]
        made = mean_of(scores, [self.samples[i][2] for i in some])
        assert made is not None
        return made

    def cells(self, label: str, less: str | None = None) -> Mean:
        """The share of the listings' cells that are right, or how much more than another row's."""
        own = self.rows[label]["cells"]
        listed = [sample for sample in self.samples if sample[1] == "describe"]
        other = [0] * len(own) if less is None else self.rows[less]["cells"]
        scores = [(a - b) / 16 for a, b in zip(own, other, strict=False)]
        made = mean_of(scores, [sample[2] for sample in listed[: len(own)]])
        assert made is not None
        return made

    def scenes(self, label: str) -> int:
        """How many scenes a row was measured on."""
        return len({sample[2] for sample in self.samples[: len(self.rows[label]["scores"])]})

    @property
    def pruned(self) -> list[str]:
        """All rows but the unpruned model's."""
        return [label for label in self.rows if label != UNPRUNED]

    @property
    def close(self) -> list[str]:
        """The rows on all scenes."""
        return [one for one in self.pruned if self.rows[one]["scenes"] is None]


def every(sample: Sample) -> bool:
    """Any sample."""
    return True


def longer(sample: Sample) -> bool:
    """One whose answer has more than one word."""
    return sample[3] > 1


def short(sample: Sample) -> bool:
    """One whose answer is a word."""
    return not longer(sample)


def of_kind(kind: str) -> Which:
    """Samples of a kind."""
    return lambda sample: sample[1] == kind


def setup(found: Mapping[str, Any]) -> str:
    """What was measured with what."""
    about, rows = found["about"], Rows(found)
    count = sum(sample[1] == "describe" for sample in rows.samples)
    return (
        f"{len(rows.samples)} questions about {rows.scenes(UNPRUNED)} scenes, {count} of them "
        f"listings of 16 cells; {about['model']}; torch {about['torch']}, transformers "
        f"{about['transformers']}, {about['batch']} questions at once, one thread. Unpruned: "
        f"{percent(rows.mean(UNPRUNED, every))} per cent."
    )


def curve(found: Mapping[str, Any]) -> str:
    """All rows: accuracy, and paired differences from the unpruned model."""
    rows = Rows(found)
    heads = [
        "way",
        "scenes",
        "all",
        "minus unpruned",
        "more than one word",
        "one word",
        "listed cells",
        "same answer",
    ]
    lines = [
        [
            UNPRUNED,
            str(rows.scenes(UNPRUNED)),
            percent(rows.mean(UNPRUNED, every)),
            "",
            percent(rows.mean(UNPRUNED, longer)),
            percent(rows.mean(UNPRUNED, short)),
            percent(rows.cells(UNPRUNED)),
            "",
        ]
    ]
    for label in rows.pruned:
        lines.append(
            [
                label,
                str(rows.scenes(label)),
                percent(rows.mean(label, every)),
                *(points(rows.mean(label, some, UNPRUNED)) for some in (every, longer, short)),
                points(rows.cells(label, UNPRUNED)),
                f"{100 * rows.mean(label, every, of='same').value:.1f}",
            ]
        )
    return table(heads, lines)


def kinds(found: Mapping[str, Any]) -> str:
    """By kind, what the rows on all scenes have less than the unpruned model."""
    rows = Rows(found)
    close = rows.close
    lines = []
    for kind in KINDS:
        some = of_kind(kind)
        full = rows.mean(UNPRUNED, some)
        lines.append(
            [
                kind,
                str(full.count),
                percent(full),
                *(points(rows.mean(label, some, UNPRUNED)) for label in close),
            ]
        )
    return table(["kind", "questions", UNPRUNED, *close], lines)


def aims(found: Mapping[str, Any]) -> str:
    """Whether the rows on all scenes lose no more than they may."""
    rows, out = Rows(found), []
    for label in rows.close:
        whole = 100 * rows.mean(label, every, UNPRUNED).low
        by_kind = {
            kind: 100 * rows.mean(label, of_kind(kind), UNPRUNED).low
            for kind in KINDS
            if rows.mean(UNPRUNED, of_kind(kind)).count >= ENOUGH
        }
        below = [f"{kind} {low:+.1f}" for kind, low in by_kind.items() if low < AIM_KIND]
        least = min(by_kind, key=lambda kind: by_kind[kind])
        told = (
            f"too low: {', '.join(below)}"
            if below
            else f"the lowest is {least} with {by_kind[least]:+.1f}"
        )
        out.append(
            f"- {label}: {whole:+.1f} of all questions ({'met' if whole >= AIM else 'not met'}); "
            f"by kind {'not met' if below else 'met'}, {told}."
        )
    return "\n".join(out)


def tokens(found: Mapping[str, Any]) -> str:
    """How much of the answers comes behind the first token."""
    rows = Rows(found)

    def cells(which: Which) -> Sequence[str]:
        some = [sample for sample in rows.samples if which(sample)]
        many = sum(longer(sample) for sample in some) / len(some)
        return [
            str(len(some)),
            f"{100 * many:.0f} %",
            f"{sum(sample[4] for sample in some) / len(some):.1f}",
        ]

    columns = [cells(of_kind(kind)) for kind in KINDS] + [cells(every)]
    names = ("questions", "answers of more than one word", "tokens of an answer, mean")
    lines = [[name, *(column[i] for column in columns)] for i, name in enumerate(names)]
    first = 100 * min(row["first"] for row in rows.rows.values())
    told = f"In every row the first word is the unpruned model's in {first:.4g} % of the answers"
    return f"{table(['', *KINDS, 'all'], lines)}\n\n{told}{'' if first == 100 else ', or more'}."


def parts(found: Mapping[str, Any]) -> dict[str, str]:
    """All parts of the page."""
    makers = {"setup": setup, "curve": curve, "aims": aims, "kinds": kinds, "tokens": tokens}
    return {f"recall {name}": make(found) for name, make in makers.items()}


def percent(mean: Mean) -> str:
    """A mean with its interval."""
    return f"{100 * mean.value:.1f} ({100 * mean.low:.1f} to {100 * mean.high:.1f})"


def points(mean: Mean) -> str:
    """A difference with its interval."""
    return f"{100 * mean.value:+.1f} ({100 * mean.low:+.1f} to {100 * mean.high:+.1f})"
