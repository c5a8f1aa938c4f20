"""`vlmprune search` on a model and a task: from a spec to a setting, and its check elsewhere.

The task's pictures are parted in two halves. The search sees one; what it chose is then measured
on the other, since the best of many trials looks better than it is on the questions that chose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmprune import spec
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import families
from vlmprune.hosts.decoder import decoder_layers
from vlmprune.io.models import Loaded
from vlmprune.io.options import check_pictures, one_of
from vlmprune.method import Method
from vlmprune.pruner import Pruner
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.evals.run import evaluate, model_name
from vlmprune.study.search import optimise
from vlmprune.study.search.spaces import Space, space_of
from vlmprune.study.stats import Mean, interval_of
from vlmprune.study.tasks import Task
from vlmprune.study.tasks.part import Part
from vlmprune.version import __version__

# What a search makes small, by the name on the command line.
COSTS = {
    "flops": ("decoder_flops", "FLOPs of the language model's prefill on visual tokens"),
    "kv": ("kv_bytes", "bytes of the visual tokens' keys and values"),
    "read": ("kv_read", "bytes for visual tokens that a decode step reads"),
    "tokens": ("visual_tokens", "visual tokens, averaged over layers"),
}
# Pictures whose encodings are held in memory from one trial to the next.
REMEMBERED = 200
# The method whose schedule is searched layer by layer.
SCHEDULED = "gsearch"


@dataclass(frozen=True)
class Asked:
    """What is searched, checked as far as it can be without a model.

    Attributes:
        stage: the method with the settings that stay.
        space: what is varied; empty for a schedule.
        cost: a name of `COSTS`.
        max_loss: as a share of the unpruned accuracy.
        trials: how many in all.
        group: decoder layers that share a rate, of a schedule.
        limit: samples of each half.
        batch: questions at once.
        out: the file to be written.
    """

    stage: spec.Stage
    space: Space
    cost: str
    max_loss: float
    trials: int
    group: int
    limit: int | None
    batch: int
    out: Path

    @property
    def journal(self) -> Path:
        """The file of all trials."""
        return self.out.with_suffix(".journal")

    @property
    def picture(self) -> Path:
        """The file of the plot."""
        return self.out.with_suffix(".png")

    @property
    def scheduled(self) -> bool:
        """Whether it is a schedule of rates that is searched."""
        return self.stage.name == SCHEDULED


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    Attributes:
        found: all trials.
        method: the chosen setting's spec; "" where none is within the limit.
        content: what was written.
        full: the unpruned model on the other half of the pictures.
        checked: the choice there; None without one.
    """

    found: optimise.Found
    method: str
    content: dict[str, Any] = field(repr=False)
    full: Evaluation | None = field(repr=False, default=None)
    checked: Evaluation | None = field(repr=False, default=None)

    @property
    def difference(self) -> Mean | None:
        """How much better (below 0: worse) the choice is than the unpruned model there.

        Without the ends of its interval where there are too few pictures to tell.
        """
        if self.checked is None or self.full is None:
            return None
        found = self.checked.minus(self.full)
        if found is None:
            return None
        told = interval_of(found, [one.group for one in self.checked.scored])
        return replace(found, low=told.low, high=told.high)


def ask(
    method: str,
    over: Sequence[str],
    cost: str | None,
    max_loss: float,
    trials: int,
    group: int,
    limit: int | None,
    batch: int,
    out: Path,
) -> Asked:
    """Check what was asked for; without a cost that which the method is there for.

    Raises:
        VlmpruneError: one sentence says what does not fit.
    """
    stages = spec.read(method)
    if len(stages) > 1:
        raise VlmpruneError(
            f"{method!r} chains several methods; search one at a time, and chain what comes of it."
        )
    check_pictures(stages)
    stage = stages[0]
    in_part = stage.cls.recall is not Method.recall
    cost = cost or ("read" if in_part else "flops")
    one_of("cost", cost, COSTS)
    if in_part and cost in ("flops", "tokens"):
        raise VlmpruneError(
            f"--cost {cost} is the same for every setting of {stage.name}, which keeps all tokens; "
            "use --cost read."
        )
    for name, value in (("trials", trials), ("group", group)):
        if value < 1:
            raise VlmpruneError(f"{name}={value} is not a whole number of 1 or more.")
    if cost == "read" and in_part:
        # A step that reads all where that is faster would cost the same whatever is set.
        stage.settings.setdefault("always", True)
    scheduled = stage.name == SCHEDULED
    if scheduled and (over or stage.file is not None or "rates" in stage.settings):
        raise VlmpruneError(
            f"{SCHEDULED}'s rates are what is searched; leave out --over, from= and rates."
        )
    # What the method itself holds a file of, it would not be searched for.
    fixed = list(stage.settings)
    space = {} if scheduled else space_of(stage.names, fixed, over)
    missing = [] if scheduled else [name for name in stage.missing if name not in space]
    if missing:
        raise VlmpruneError(
            f"method {stage.name!r} needs {missing[0]}; give it in the method, or in --over."
        )
    return Asked(stage, space, cost, max_loss, trials, group, limit, batch, out)


def run(
    loaded: Loaded,
    asked: Asked,
    task: Task,
    say: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """Search on one half of a task's pictures, check on the other, and write the outcome.

    Raises:
        VlmpruneError: the task has too few pictures, the method refuses the model, or the journal
            is another search's.
    """
    halves = [Part(task, odd, asked.limit) for odd in (False, True)]
    for half in halves:
        if not [one for one in half.samples() if one.answers]:
            raise VlmpruneError(
                f"{task.label} has too few questions with known answers to choose on some and "
                "check on others; give at least two pictures with such questions."
            )
    visions: dict[tuple[str, str], Vision] = {}
    few = len({one.group for one in halves[0].samples()}) <= REMEMBERED
    figure = COSTS[asked.cost][0]
    now = "without pruning"

    def answered(pruner: Pruner | None, half: Part) -> Evaluation:
        # What acts inside the language model sees the same pictures in every trial.
        shared = few and (pruner is None or not pruner.shortens)
        return evaluate(
            loaded,
            pruner,
            half,
            batch=asked.batch,
            progress=lambda done, total: say(f"{now}: {done} of {total} questions"),
            visions=visions if shared else None,
        )

    def measure(pruner: Pruner | None) -> optimise.Measured:
        made = answered(pruner, halves[0])
        assert made.accuracy is not None
        if math.isnan(made.share(figure)):
            raise VlmpruneError(
                f"what is to become small, cost {asked.cost!r}, is unknown of this model; choose "
                "another cost, such as tokens."
            )
        return optimise.Measured(made.accuracy, made.share(figure))

    about = {
        "version": __version__,
        "model": model_name(loaded.model),
        "method": spec_of(asked.stage),
        "space": {name: str(one) for name, one in asked.space.items()},
        "task": halves[0].label,
        "cost": asked.cost,
        "max_loss": asked.max_loss,
        "group": asked.group,
    }
    # A schedule's trials are shared out among layers, so their number is part of what it is.
    about |= {"trials": asked.trials} if asked.scheduled else {}

    def told(trials: int) -> None:
        nonlocal now
        now = f"trial {trials + 1} of {asked.trials}"

    under_way = optimise.Search(
        measure, asked.max_loss, asked.trials, asked.journal, about, told, then=defaults_then(asked)
    )
    architecture = families.architecture(loaded.model)
    if asked.scheduled:
        layers = len(decoder_layers(loaded.model))
        if layers < 2:
            raise VlmpruneError("a schedule needs two decoder layers or more; this model has one.")
        cls: Any = asked.stage.cls
        found = under_way.rates(
            lambda rates: cls(rates=tuple(rates), **asked.stage.settings), layers, asked.group
        )
    else:
        found = under_way.over(optimise.builder(asked.stage), asked.space)
    pruner = None
    if found.best is not None:
        pruner = _chosen(asked, found.best)
    method = ""
    if pruner is not None:
        method = f"{SCHEDULED}:from={asked.out}" if asked.scheduled else spec.dump(pruner)
    now = "checking the choice on other pictures"
    visions.clear()
    full = checked = None
    if pruner is not None:
        full, checked = (answered(one, halves[1]) for one in (None, pruner))
    content = optimise.document(found, method, about)
    if found.best is not None and asked.scheduled:
        rates = found.best.settings["rates"]
        from vlmprune.select import schedule

        content = schedule.document(rates, architecture, halves[0].label) | {"search": content}
    outcome = Outcome(found, method, content, full, checked)
    content["checked"] = _check_of(outcome, halves[1].label)
    return outcome


def defaults_then(asked: Asked) -> str:
    """Settings that the search leaves open and that had another default up to version 0.2."""
    given = {*asked.stage.settings, *asked.space}
    other = {k: v for k, v in asked.stage.cls.former.items() if k not in given}
    return " and ".join(f"{name}={value!r}" for name, value in other.items())


def _chosen(asked: Asked, best: optimise.Tried) -> Pruner:
    if asked.scheduled:
        cls: Any = asked.stage.cls
        return cls(rates=tuple(best.settings["rates"]), **asked.stage.settings)
    return optimise.builder(asked.stage)(best.settings)


def _check_of(outcome: Outcome, label: str) -> dict[str, Any] | None:
    difference = outcome.difference
    if outcome.checked is None or outcome.full is None or difference is None:
        return None
    return {
        "task": label,
        "accuracy without pruning": outcome.full.accuracy,
        "accuracy": outcome.checked.accuracy,
        "difference": [difference.value, difference.low, difference.high],
        "samples": difference.count,
    }


def spec_of(stage: spec.Stage) -> str:
    """A stage as text, for telling searches apart."""
    settings = [f"{name}={value!r}" for name, value in sorted(stage.settings.items())]
    settings += [f"{spec.FROM}={stage.file}"] * (stage.file is not None)
    return f"{stage.name}:{','.join(settings)}" if settings else stage.name
