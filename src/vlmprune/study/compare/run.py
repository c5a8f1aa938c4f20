"""Methods and budgets over the same questions: answers, costs and times. Prints nothing.

`evals` answers, `bench` times all ways in turns, `drawn` draws what was kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from vlmprune.errors import VlmpruneError
from vlmprune.io import options, sources
from vlmprune.io.models import Loaded, prepare_texts
from vlmprune.io.processors import scaled
from vlmprune.pruner import Pruner
from vlmprune.study.bench.run import compare as compare_times
from vlmprune.study.bench.workload import Work
from vlmprune.study.compare.configurations import Way
from vlmprune.study.compare.drawn import drawn
from vlmprune.study.compare.results import (
    MOST,
    Comparison,
    Row,
    Shown,
    ShownAnswer,
    Skipped,
)
from vlmprune.study.evals import kept_answers
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.evals.run import BATCH, evaluate
from vlmprune.study.stats import interval_of
from vlmprune.study.tasks import Sample, Task
from vlmprune.study.wording import ALL_TOKENS, counted

TIMED = 4
"""Questions that a timed call answers at once."""
SHOWN = 4
"""Questions of a task that are drawn where nobody says how many."""

Tell = Callable[[str, int, int], None]
"""Told what goes on, and how many steps of how many are done."""


@dataclass(frozen=True)
class Pictures(Task):
    """Questions about pictures of one's own, without true answers.

    Attributes:
        files: the pictures.
        opened: the same, opened.
        questions: asked about each.
        limit: tokens of the longest answer.
    """

    files: tuple[str, ...]
    opened: tuple[Image.Image, ...]
    questions: tuple[str, ...]
    limit: int = 64

    @property
    def label(self) -> str:
        """As people call it."""
        return counted(len(self.files), "picture")

    def samples(self, limit: int | None = None) -> list[Sample]:
        """Every question about every picture."""
        found = [
            Sample(id=f"{i}-{j}", images=(image,), question=question, group=str(i))
            for i, image in enumerate(self.opened)
            for j, question in enumerate(self.questions)
        ]
        return found[:limit]

    def max_new_tokens(self, sample: Sample) -> int:
        """The limit that was given."""
        return self.limit

    def score(self, sample: Sample, text: str) -> float:
        """Never asked: no true answer is known."""
        raise NotImplementedError


def compare(
    loaded: Loaded,
    source: sources.Source,
    ways: Sequence[Way],
    task: Task,
    limit: int | None = None,
    batch: int = BATCH,
    repeat: int = 5,
    show: int | None = SHOWN,
    store: Path | None = None,
    tell: Tell = lambda message, done, total: None,
) -> Comparison:
    """Answer a task's questions in every way, and measure what each costs.

    Args:
        loaded: model and processor.
        source: where they come from.
        ways: the configurations.
        task: what is asked.
        limit: how many questions, from the task's first; None for all.
        batch: questions answered at once.
        repeat: timed turns.
        show: questions whose pictures are drawn; None for all.
        store: a folder for the answers, so that a comparison that was stopped goes on; None keeps
            none.
        tell: told what goes on.

    Raises:
        VlmpruneError: the task cannot be read or has no pictures, no way can be gone, or the disk
            or the memory refuses.
    """
    with scaled(loaded.processor, task.side):
        return _compared(loaded, source, ways, task, limit, batch, repeat, show, store, tell)


def _compared(
    loaded: Loaded,
    source: sources.Source,
    ways: Sequence[Way],
    task: Task,
    limit: int | None,
    batch: int,
    repeat: int,
    show: int | None,
    store: Path | None,
    tell: Tell,
) -> Comparison:
    """`compare`, with the processor as the task wants it."""
    options.at_least_one(batch=batch, repeat=repeat)
    samples = task.samples(limit)
    pictured = [one for one in samples if one.images]
    if not pictured:
        raise VlmpruneError(f"task {task.label!r} has no questions about pictures; choose another.")
    chosen = pictured if show is None else _pick(pictured, show)
    steps = _Steps(tell, len(samples), len(ways), min(TIMED, len(pictured)), repeat, len(chosen))
    stem = None if store is None else store / kept_answers.digest(loaded, source, task)

    def answers(name: str, pruner: Pruner | None) -> Evaluation:
        file = None if stem is None else str(stem / kept_answers.file_name(name, pruner))
        return evaluate(
            loaded,
            pruner,
            task,
            limit,
            batch,
            progress=lambda done, total: steps.at(f"{name}: question {done} of {total}", done),
            store=file,
        )

    full = answers(ALL_TOKENS, None)
    steps.finish(len(samples))
    found: list[tuple[Way, Evaluation]] = []
    skipped: list[Skipped] = []
    for way in ways:
        try:
            if way.videos:
                raise VlmpruneError(
                    f"it needs videos, and {task.label} has pictures; leave it out."
                )
            found.append((way, answers(way.spec, way.pruner)))
        except VlmpruneError as error:
            skipped.append(Skipped(way.spec, str(error)))
            steps.finish(steps.each - len(samples))
        steps.finish(len(samples))
    if not found:
        raise VlmpruneError(
            f"no method could be compared; of {skipped[0].spec}: {skipped[0].reason}"
        )
    times = _times(loaded, source, [way for way, _ in found], task, pictured, repeat, steps)
    shown = _show(loaded, [(None, full), *found], task, chosen, steps)
    rows = _rows(full, found, times, loaded.model.device.type != "cpu")
    return Comparison(
        model=source.label,
        task=task.label,
        scored=full.mean is not None,
        questions=len(samples),
        rows=rows,
        skipped=skipped,
        shown=shown,
        device=str(loaded.model.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        repeat=repeat,
        timed=min(TIMED, len(pictured)),
    )


class _Steps:
    """How far a comparison is; a step is a question.

    Attributes:
        timed: of a timed call.
        each: of a way from its answers to its pictures.
    """

    def __init__(
        self, tell: Tell, questions: int, ways: int, timed: int, repeat: int, shown: int
    ) -> None:
        self.tell, self.done, self.timed = tell, 0, timed
        self.each = questions + (repeat + 1) * timed + shown
        # All tokens are answered and timed, but not drawn.
        self.total = (1 + ways) * self.each - shown

    def at(self, message: str, more: int = 0) -> None:
        """Say what goes on, `more` steps after the last part."""
        self.tell(message, self.done + more, self.total)

    def finish(self, steps: int) -> None:
        """A part of so many steps is done."""
        self.done += steps


def _pick(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Some samples, each about other pictures as long as there are, and of other kinds."""
    groups: dict[str, list[Sample]] = {}
    for one in samples:
        groups.setdefault(one.group, []).append(one)
    found = [group[at % len(group)] for at, group in enumerate(groups.values())][:count]
    ids = {one.id for one in found}
    return found + [one for one in samples if one.id not in ids][: count - len(found)]


def _times(
    loaded: Loaded,
    source: sources.Source,
    ways: Sequence[Way],
    task: Task,
    samples: Sequence[Sample],
    repeat: int,
    steps: _Steps,
) -> dict[str, float]:
    """Milliseconds to the first token by spec, and by `ALL_TOKENS`."""
    some = samples[:TIMED]
    images = [one.opened() for one in some]
    texts = [task.prompt(one, loaded.processor) for one in some]
    inputs = prepare_texts(loaded, images, texts)
    work = Work(loaded.model, inputs, source.label, len(images[0]))

    def say(message: str) -> None:
        steps.at(message)
        steps.finish(steps.timed)

    result = compare_times(work, {way.spec: way.pruner for way in ways}, 1, repeat, say)
    return {one.name: one.first_ms.median for one in (result.full, *result.methods)}


def _show(
    loaded: Loaded,
    found: Sequence[tuple[Way | None, Evaluation]],
    task: Task,
    samples: Sequence[Sample],
    steps: _Steps,
) -> list[Shown]:
    """What each way keeps of some samples' pictures, and answers."""
    by_id = [{one.id: one for one in answers.results} for _, answers in found]
    shown = []
    for number, sample in enumerate(samples):
        images = sample.opened()
        text = task.prompt(sample, loaded.processor)
        inputs = prepare_texts(loaded, [images], [text])
        answers: list[ShownAnswer] = []
        for (way, _), results in zip(found, by_id, strict=True):
            said = results[sample.id]
            answer = ShownAnswer(said.answer, said.score, said.answer == by_id[0][sample.id].answer)
            if way is not None:
                steps.at(f"Drawing: {way.spec}…")
                limit = task.max_new_tokens(sample) if number < MOST else 0
                answer = drawn(loaded, way.pruner, inputs, images, answer, limit)
                steps.finish(1)
            answers.append(answer)
        before = next((one.before for one in answers if one.before), 0)
        answers[0] = replace(answers[0], kept=before, before=before)
        shown.append(Shown(sample.question, sample.answers, images, answers))
    return shown


def _rows(
    full: Evaluation,
    found: Sequence[tuple[Way, Evaluation]],
    times: dict[str, float],
    absolute: bool,
) -> list[Row]:
    everything = full if full.mean is not None else full.agreeing(full)
    controls = {(type(w.keep), w.keep): one for w, one in reversed(found) if w.reference}
    rows = [_row(None, full, everything, full, None, times, absolute)]
    for way, answers in found:
        scored = answers if full.mean is not None else answers.agreeing(full)
        control = None if way.reference else controls.get((type(way.keep), way.keep))
        if control is not None and full.mean is None:
            control = control.agreeing(full)
        rows.append(_row(way, answers, scored, full, control, times, absolute))
    return rows


def _row(
    way: Way | None,
    answers: Evaluation,
    scored: Evaluation,
    full: Evaluation,
    control: Evaluation | None,
    times: dict[str, float],
    absolute: bool,
) -> Row:
    count, name = len(answers.results), ALL_TOKENS if way is None else way.spec
    score, same = scored.mean, answers.agreeing(full).mean
    difference = None if control is None else scored.minus(control)
    assert score is not None and same is not None
    groups = [one.group for one in scored.scored]
    held, read = answers.total("kv_bytes"), answers.total("kv_read")
    return Row(
        name=ALL_TOKENS if way is None else way.name,
        keep=None if way is None else way.keep,
        spec="" if way is None else way.spec,
        control=way is not None and way.control,
        score=interval_of(score, groups),
        agreement=same.value,
        against=None if difference is None else interval_of(difference, groups),
        visual_tokens=answers.total("visual_tokens") / count,
        decoder_flops=answers.total("decoder_flops") / count,
        flops=answers.total("flops") / count,
        kv_bytes=held / count,
        first_token_ratio=times[name] / times[ALL_TOKENS],
        first_token_ms=times[name] if absolute else None,
        kv_read=None if read == held or math.isnan(read) else read / count,
    )
