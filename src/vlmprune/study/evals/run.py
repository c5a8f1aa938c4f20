"""Accuracy of a method on a task: batched, each picture encoded once, and resumable.

Greedy answers by the host's own `generate`. A method that does not look at the question gets each
picture's encoding once, for all questions about it; so does one that acts inside the language
model alone, and the model without any pruner, behind a stage that keeps every token and changes no
bit. A method that looks at the question before the language model encodes for each question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vlmprune.hosts import families, processed
from vlmprune.hosts.decoder import decoder_layers
from vlmprune.io.models import Loaded, enough_memory, prepare_texts
from vlmprune.io.options import at_least_one
from vlmprune.io.processors import scaled
from vlmprune.pruner import Handle, Pruner
from vlmprune.report import LEFT, Report, RowsReport
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.study.evals.results import UNPRUNED, Evaluation
from vlmprune.study.evals.store import Store
from vlmprune.study.tasks import Sample, Task
from vlmprune.study.tasks.answered import Answered
from vlmprune.views import EncoderView, Selection

BATCH = 32
"""Questions answered at once where nobody says how many."""


@dataclass(frozen=True)
class Everything(Pruner):
    """Keep every visual token: what comes after it may then be given encoded pictures."""

    text_agnostic: ClassVar[bool] = True

    def select(self, view: EncoderView) -> Selection:
        """All candidates."""
        return Selection(view.candidates, {})


def evaluate(
    loaded: Loaded,
    pruner: Pruner | None,
    task: Task,
    limit: int | None = None,
    batch: int = BATCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
    store: str | None = None,
    visions: dict[tuple[str, str], Vision] | None = None,
) -> Evaluation:
    """Answer a task's questions and score the answers.

    Args:
        loaded: model and processor.
        pruner: the method; None for the model as it is.
        task: what is asked.
        limit: how many samples, from the task's first; None for all.
        batch: questions answered at once.
        progress: told how many samples are done, and of how many.
        store: path of a file to which results are appended sample by sample. If it holds results
            of the same model, method and task, those are kept and only the rest is answered.
        visions: pictures encoded before, by method and group; used and filled. Evaluations of
            methods that act inside the language model can share one, as long as there is memory
            for all pictures.

    Raises:
        VlmpruneError: the task cannot be read, the store holds something else, the method refuses
            the model, or the memory is too small.
    """
    at_least_one(batch=batch, limit=limit)
    samples = task.samples(limit)
    nothing = empty(loaded, pruner, task)
    with ExitStack() as stack:
        kept = stack.enter_context(Store(store, nothing, pruner)) if store is not None else None
        done = dict(kept.results) if kept is not None else {}
        missing = [one for one in samples if one.id not in done]
        answered = len(samples) - len(missing)
        progress(answered, len(samples))
        if missing:
            stack.enter_context(enough_memory(loaded.model.device))
            stack.enter_context(scaled(loaded.processor, task.side))
            runner = stack.enter_context(_Runner(loaded, pruner, task, visions))
            for some in runner.batches(samples, batch):
                new = [one for one in some if one.id not in done]
                if not new:
                    continue
                # Those of a batch that are known are answered again, so that it is the same batch.
                wanted = {one.id for one in new}
                for result in runner.answer(some):
                    if result.id in wanted:
                        done[result.id] = result
                        if kept is not None:
                            kept.append(result)
                answered += len(new)
                progress(answered, len(samples))
    return replace(nothing, results=tuple(done[one.id] for one in samples))


def empty(loaded: Loaded, pruner: Pruner | None, task: Task) -> Evaluation:
    """A method on a task before any question is answered."""
    return Evaluation(task.label, method_name(pruner), model_name(loaded.model), ())


def method_name(pruner: Pruner | None) -> str:
    """A pruner with its settings; "unpruned" for None."""
    return UNPRUNED if pruner is None else repr(pruner)


def model_name(model: Any) -> str:
    """A model's class, its language model in words, and the type of its weights."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {families.architecture(model)}, {dtype}"


class _Runner:
    """A pruner on a model that answers batches of a task's samples."""

    def __init__(
        self,
        loaded: Loaded,
        pruner: Pruner | None,
        task: Task,
        visions: dict[tuple[str, str], Vision] | None,
    ) -> None:
        self.loaded, self.task = loaded, task
        self.shared = visions is not None
        self.visions = {} if visions is None else visions
        stages = [] if pruner is None else list(pruner.links)
        shortening = [stage for stage in stages if stage.shortens]
        self.reuses = all(stage.text_agnostic for stage in shortening)
        everything = Everything()
        if pruner is None:
            self.pruner: Pruner = everything
        else:
            self.pruner = pruner if shortening else everything | pruner
        self.key = " | ".join(repr(stage) for stage in shortening or [everything])

    def __enter__(self) -> _Runner:
        self.handle: Handle = self.pruner.attach(self.loaded.model)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.detach()

    def batches(self, samples: Sequence[Sample], batch: int) -> Iterator[list[Sample]]:
        """Samples to be answered together: of one length class, near each other in the task.

        About as many groups of pictures as `batch` are at hand at a time; their encodings are
        given up before the next are read.
        """
        groups: dict[str, list[Sample]] = {}
        for one in samples:
            groups.setdefault(one.group, []).append(one)
        names = list(groups)
        for start in range(0, len(names), batch):
            near = names[start : start + batch]
            classes: dict[int, list[Sample]] = {}
            for name in near:
                for one in groups[name]:
                    classes.setdefault(self.task.max_new_tokens(one), []).append(one)
            for some in classes.values():
                for at in range(0, len(some), batch):
                    yield some[at : at + batch]
            if not self.shared:
                self.visions.clear()

    @torch.inference_mode()
    def answer(self, samples: Sequence[Sample]) -> list[Answered]:
        """Answers to one batch."""
        start = time.perf_counter()
        model, processor = self.loaded.model, self.loaded.processor
        pictures = {one.group: one.opened() for one in samples}
        texts = [self.task.prompt(one, processor) for one in samples]
        images = [pictures[one.group] for one in samples]
        inputs = prepare_texts(self.loaded, images, texts)
        given = dict(inputs)
        if self.reuses and any(images):
            visions = [self._vision(one, images[i], texts[i]) for i, one in enumerate(samples)]
            joined = [vision for vision in visions if vision is not None]
            given["vision"] = replace(
                joined[0], items=tuple(item for vision in joined for item in vision.items)
            )
            for medium in self.handle.family.media:
                given.pop(medium.inputs[0], None)
        limit = max(self.task.max_new_tokens(one) for one in samples)
        out = model.generate(**given, max_new_tokens=limit, do_sample=False, num_beams=1)
        new = out[:, processed.ids_of(inputs).shape[1] :]
        answers = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        report = self.handle.report
        assert report is not None
        layers = len(decoder_layers(model))
        figures = _figures(report, layers, len(samples))
        seconds = (time.perf_counter() - start) / len(samples)
        return [
            Answered(
                id=one.id,
                group=one.group,
                kind=one.kind,
                answer=text,
                score=self.task.score(one, text) if one.answers else None,
                seconds=seconds,
                **figures,
            )
            for one, text in zip(samples, answers, strict=True)
        ]

    def _vision(self, sample: Sample, images: Sequence[Any], text: str) -> Vision | None:
        """A sample's pictures, encoded and pruned; None without any."""
        if not images:
            return None
        name = (self.key, sample.group)
        if name not in self.visions:
            inputs = prepare_texts(self.loaded, [images], [text])
            self.visions[name] = self.handle.encode(**inputs)
        return self.visions[name]


def _figures(report: Report, layers: int, samples: int) -> dict[str, float]:
    """What each sample of a batch cost: its share of the batch's figures.

    Args:
        report: of the whole batch.
        layers: of the language model.
        samples: of the batch.
    """
    figures = {
        "visual_tokens": _mean_tokens(report, layers),
        "visual_tokens_before": report.visual_tokens_before,
        "decoder_flops": report.decoder_flops_after,
        "decoder_flops_before": report.decoder_flops_before,
        "flops": report.flops_after,
        "flops_before": report.flops_before,
        "kv_bytes": report.kv_bytes_after,
        "kv_bytes_before": report.kv_bytes_before,
        "kv_read": report.kv_bytes_read,
    }
    return {name: value / samples for name, value in figures.items()}


def _mean_tokens(report: Report, layers: int) -> float:
    """Visual tokens that a layer saw, on average over the layers."""
    counts = [sum(map(len, one.kept)) for one in report.layers if isinstance(one, RowsReport)]
    if len(counts) == layers:
        # Of tokens that skip layers and come back it tells every layer.
        return sum(counts) / layers
    total = float(report.visual_tokens_after)
    for roles in report.roles:
        for name, left in roles.items():
            if name.startswith(LEFT):
                # Those that left before a layer were seen by the layers before it.
                total += int(left.sum()) * int(name.removeprefix(LEFT)) / layers
    return total
