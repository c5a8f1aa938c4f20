"""What `eval` tells: a method's scores beside the unpruned model's on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from vlmprune.costs.units import percent, ready
from vlmprune.io.outputs import mark_of
from vlmprune.study import markdown
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.stats import GROUPS, Interval, Mean, interval_of
from vlmprune.study.wording import ALL_TOKENS, counted, in_percent, in_points

MARK = mark_of("eval")

COSTS = {
    "visual tokens": "visual_tokens",
    "LLM FLOPs": "decoder_flops",
    "with encoder": "flops",
    "visual KV": "kv_bytes",
}
"""Rows of the table by their title; each relative to what it was before pruning."""


@dataclass(frozen=True)
class Score:
    """One score of the method, and what the unpruned model makes of the same questions.

    Attributes:
        name: "accuracy", "agreement", or a kind of question.
        count: questions.
        pruned: the method's.
        full: the unpruned model's; None where it was not asked, and for agreement.
        difference: the method's less the unpruned model's, question by question.
    """

    name: str
    count: int
    pruned: Interval
    full: Interval | None = None
    difference: Interval | None = None


@dataclass(frozen=True)
class Assessed:
    """A method on a task.

    Attributes:
        label: the model's.
        spec: the method's whole spec.
        answers: the method's.
        full: the unpruned model's on the same questions; None where it was not asked.
        figures: the task's own, of the method.
        full_figures: the same of the unpruned model.
    """

    label: str
    spec: str
    answers: Evaluation
    full: Evaluation | None
    figures: Mapping[str, float]
    full_figures: Mapping[str, float]

    @property
    def name(self) -> str:
        """What the score is."""
        return "agreement" if self.answers.mean is None else "accuracy"

    @cached_property
    def accuracy(self) -> Score | None:
        """Over all questions with true answers; None without any."""
        return None if self.answers.mean is None else _score("accuracy", self.answers, self.full)

    @cached_property
    def agreement(self) -> Score | None:
        """How often the answer is the unpruned model's; None where that was not asked."""
        if self.full is None:
            return None
        return _score("agreement", self.answers.agreeing(self.full), None)

    @cached_property
    def by_kind(self) -> list[Score]:
        """Accuracy, or agreement where no answer is known, by kind; empty if there are no kinds."""
        answers, full = self.answers, self.full
        if answers.mean is None:
            if full is None:
                return []
            answers, full = answers.agreeing(full), None
        kinds = list(answers.by_kind)
        if kinds in ([], [""]):
            return []
        return [
            _score(kind or "other", _of(answers, kind), None if full is None else _of(full, kind))
            for kind in kinds
        ]

    @property
    def too_few(self) -> bool:
        """Whether there are too few pictures for an interval."""
        return len({one.group for one in self.answers.results}) < GROUPS

    @property
    def title(self) -> str:
        """What was asked."""
        return f"{self.label} on {self.asked}"

    @property
    def asked(self) -> str:
        """The task, and how many questions."""
        return f"{self.answers.task}, {counted(len(self.answers.results), 'question')}"

    def lines(self) -> list[tuple[str, str, str, str]]:
        """The table: name, the unpruned model's, the method's, difference."""
        scores = [one for one in (self.accuracy, self.agreement) if one is not None]
        lines = [_line(one, one.name) for one in scores]
        lines += [_line(one, f"  {one.name} ({one.count})") for one in self.by_kind]
        for name, value in self.figures.items():
            before = self.full_figures.get(name)
            change = "" if before is None else f"{value - before:+.1f}"
            lines.append((name, "" if before is None else f"{before:.1f}", f"{value:.1f}", change))
        for title, name in self._costs.items():
            share = self.answers.share(name)
            change = "" if math.isnan(share) else percent(share - 1, "+.1f")
            lines.append((title, percent(1), percent(share, ".1f"), change))
        return lines

    @property
    def _costs(self) -> dict[str, str]:
        """Rows of costs; what a decode step reads is told where it is not what is held."""
        read = self.answers.total("kv_read")
        held = self.answers.total("kv_bytes")
        told = {} if read == held or math.isnan(read) else {"visual KV, read by a step": "kv_read"}
        return COSTS | told

    def notes(self) -> list[str]:
        """What the figures mean, a sentence each."""
        said = {
            "accuracy": "accuracy: mean score of the answers",
            "agreement": "no true answer is known: agreement alone is told",
        }[self.name]
        if self.full is not None:
            said += "; agreement: share of answers that are the unpruned model's"
        notes = [said]
        if self.too_few:
            notes.append("too few pictures for intervals")
        else:
            notes.append(
                "in brackets 95 % intervals, bootstrapped over pictures; a difference, in points, "
                "is no accident of the pictures where its interval leaves out 0"
            )
        notes.append(
            "costs: of the visual tokens, relative to all tokens; LLM FLOPs: of its prefill, with "
            "encoder: the encoder's as well"
        )
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold, but for the answers."""
        full = self.full
        return {
            "model": self.label,
            "task": self.answers.task,
            "method": self.spec,
            "samples": len(self.answers.results),
            "score": self.name,
            "accuracy": _dict(self.accuracy),
            "agreement": _dict(self.agreement),
            "by_kind": {one.name: _dict(one) for one in self.by_kind},
            "figures": dict(self.figures),
            "unpruned": None if full is None else {"figures": dict(self.full_figures)},
            "shares": {name: ready(self.answers.share(name)) for name in self._costs.values()},
            "visual_tokens": self.answers.total("visual_tokens") / len(self.answers.results),
            "seconds": self.answers.total("seconds"),
        }

    def markdown(self, command: str) -> str:
        """The table and what it means."""
        parts = [
            f"<!-- {MARK} -->",
            f"# {self.title}",
            markdown.table(
                ("", ALL_TOKENS, self.spec, "difference"),
                [(_listed(name), *cells) for name, *cells in self.lines()],
            ),
            "\n".join(f"- {one}" for one in self.notes()),
            f"```\n{command}\n```",
        ]
        return "\n\n".join(parts) + "\n"


def _listed(name: str) -> str:
    # Leading spaces mark a kind; Markdown would drop them.
    return "– " + name.strip() if name.startswith("  ") else name  # noqa: RUF001


def _line(one: Score, name: str) -> tuple[str, str, str, str]:
    full = "" if one.full is None else in_percent(one.full)
    if one.difference is None:
        return name, full, in_percent(one.pruned), ""
    return name, full, in_percent(one.pruned), in_points(one.difference)


def _of(answers: Evaluation, kind: str) -> Evaluation:
    return replace(answers, results=tuple(one for one in answers.results if one.kind == kind))


def _score(name: str, answers: Evaluation, full: Evaluation | None) -> Score:
    mean = answers.mean
    assert mean is not None
    pruned, count = _interval(mean, answers), len(answers.scored)
    if full is None or full.mean is None:
        return Score(name, count, pruned)
    difference = answers.minus(full)
    assert difference is not None
    return Score(name, count, pruned, _interval(full.mean, answers), _interval(difference, answers))


def _interval(mean: Mean, answers: Evaluation) -> Interval:
    return interval_of(mean, [one.group for one in answers.scored])


def _dict(one: Score | None) -> dict[str, Any] | None:
    if one is None:
        return None
    content = asdict(one)
    del content["name"]
    return content
