"""The cheapest setting of a method that stays within a given loss, by Bayesian optimisation.

Optuna proposes, a callable measures. Every trial is kept in a journal, so that a search that was
killed goes on where it stopped, with the proposals that it would have made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune import spec
from vlmprune.errors import VlmpruneError
from vlmprune.files import FULL, refused
from vlmprune.io.outputs import Output, make_folder, mark_of
from vlmprune.pruner import Pruner
from vlmprune.study.measure import versions
from vlmprune.study.search.spaces import Choice, Range, Space
from vlmprune.study.stats import front

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

MARK = mark_of("search")
# The study that holds what the model does without pruning, the first of a journal.
UNPRUNED = "unpruned"
# Proposals that are drawn at random before a model of the trade-off is trusted.
STARTUP = 8
# Where a search begins, as far as a space allows it.
FIRST = {"keep": (0.5, 0.25, 0.1)}


@dataclass(frozen=True)
class Measured:
    """One way of answering a set of questions.

    Attributes:
        accuracy: mean score, 0 to 1.
        cost: relative to the model without pruning.
    """

    accuracy: float
    cost: float


@dataclass(frozen=True)
class Tried:
    """One trial.

    Attributes:
        settings: what was varied.
        accuracy: mean score.
        loss: how much less than the unpruned model's, as a share of it.
        cost: relative to the unpruned model.
        allowed: whether the loss is within the limit of the whole search.
    """

    settings: dict[str, Any]
    accuracy: float
    loss: float
    cost: float
    allowed: bool


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        full: the unpruned model's accuracy.
        max_loss: the limit.
        tried: all trials, in order.
    """

    full: float
    max_loss: float
    tried: list[Tried] = field(repr=False)

    @property
    def best(self) -> Tried | None:
        """The cheapest trial within the limit, of equals the more accurate; None for none."""
        allowed = [one for one in self.tried if one.allowed]
        return min(allowed, key=lambda one: (one.cost, one.loss), default=None)

    @property
    def nearest(self) -> Tried | None:
        """The trial with the least loss."""
        return min(self.tried, key=lambda one: (one.loss, one.cost), default=None)

    @property
    def front(self) -> list[Tried]:
        """The trials that no other beats in both cost and accuracy, of equals the first alone."""
        out: list[Tried] = []
        for i in front([(one.cost, -one.loss) for one in self.tried]):
            one = self.tried[i]
            if not out or (one.cost, one.loss) != (out[-1].cost, out[-1].loss):
                out.append(one)
        return out


@dataclass
class Search:
    """A search under way.

    Attributes:
        measure: answers the questions under a pruner, or without one for None.
        max_loss: the most that may be lost, as a share of the unpruned accuracy.
        trials: how many settings to try in all.
        journal: file of all trials, made if absent.
        about: what the trials depend on (model, task, method, …); a journal of anything else is
            refused.
        say: told after each trial how many there are.
        seed: of the proposals.
        then: settings that had another default up to version 0.2, for journals of that time.
    """

    measure: Callable[[Pruner | None], Measured]
    max_loss: float
    trials: int
    journal: Path
    about: Mapping[str, Any]
    say: Callable[[int], None] = lambda done: None
    seed: int = 0
    then: str = ""

    def __post_init__(self) -> None:
        self._studies: dict[str, Study] = {}
        self._open()

    def over(self, build: Callable[[dict[str, Any]], Pruner], space: Space) -> Found:
        """Vary the settings of a method.

        Args:
            build: makes the pruner of some settings; combinations that it refuses count as tried.
            space: what is varied.
        """
        with self._kept():
            self._over(build, space)
        return self._found()

    def _over(self, build: Callable[[dict[str, Any]], Pruner], space: Space) -> None:
        study, first = self._study("settings"), list(_begin(space))
        while (number := _done(study)) < self.trials:
            trial = self._ask(study, number, space, first)
            try:
                pruner = build(dict(trial.params))
            except VlmpruneError as error:
                trial.set_user_attr("refused", str(error))
                study.tell(trial, state=_state("PRUNED"))
            else:
                self._tell(study, trial, pruner, rounded(trial.params), self.max_loss)
            self.say(_done(study))

    def rates(
        self,
        build: Callable[[list[float]], Pruner],
        layers: int,
        group: int = 1,
        least: float = 0.02,
    ) -> Found:
        """Find each decoder layer's retention rate, greedily from shallow to deep (G-Search).

        Layer 0 is whole. Each later layer (or group of layers) is searched for a lower rate, which
        holds for all deeper ones too until their turn, as dropped tokens are gone. A layer at
        depth d of D may use up the share d / D of the loss, so that deeper ones have room.

        Args:
            build: makes the pruner of one rate a layer.
            layers: decoder layers.
            group: layers that share a rate.
            least: the lowest rate.
        """
        with self._kept():
            self._rates(build, layers, group, least)
        return self._found()

    def _rates(
        self, build: Callable[[list[float]], Pruner], layers: int, group: int, least: float
    ) -> None:
        rates = [1.0] * layers
        starts = list(range(1, layers, group))
        share = max(3, self.trials // max(1, len(starts)))
        before = 0
        for stage, start in enumerate(starts):
            room = self.max_loss * (stage + 1) / len(starts)
            study = self._study(f"layer {start}")
            space: Space = {"rate": Range(least, rates[start - 1], log=True)}
            first = [{"rate": rates[start - 1]}, {"rate": max(least, rates[start - 1] / 2)}]
            while (number := _done(study)) < share and rates[start - 1] > least:
                trial = self._ask(study, number, space, first)
                tried = rates[:start] + [round(trial.params["rate"], 4)] * (layers - start)
                self._tell(study, trial, build(tried), {"rates": tried}, room)
                self.say(before + _done(study))
            before += _done(study)
            within = [t for t in _complete(study) if t.user_attrs["loss"] <= room]
            if within:
                best = min(within, key=lambda t: (t.values[0], t.user_attrs["loss"]))
                rates = list(best.user_attrs["settings"]["rates"])

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Tell of a disk on which the journal has no room; Optuna leaves out whose file it was."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL and error.filename is None:
                raise refused(self.journal, error) from error
            raise

    def _open(self) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        Journal(self.journal, MARK).check()
        make_folder(self.journal.parent)
        try:
            self._storage = JournalStorage(JournalFileBackend(str(self.journal)))
            study = self._study(UNPRUNED)
        except (OSError, ValueError, KeyError) as error:
            raise VlmpruneError(
                f"{str(self.journal)!r} cannot be read or written as the journal of a search; give "
                "another --out, or --restart."
            ) from error
        about = json.loads(json.dumps(dict(self.about)))
        known = study.user_attrs.get("about")
        if known is None:
            study.set_user_attr("about", about)
        elif "version" in about and "version" not in known:
            settings = f"; {self.then} was the default then" if self.then else ""
            raise VlmpruneError(
                f"{str(self.journal)!r} holds a search by vlmprune 0.2 or earlier, and trials of "
                f"two versions are not mixed; give another --out, or --restart{settings}."
            )
        elif known != about:
            parts = [k for k in about if known.get(k) != about[k]] or ["settings"]
            raise VlmpruneError(
                f"{str(self.journal)!r} holds a search with another {' and '.join(parts)}; give "
                "another --out, or --restart."
            )
        if "accuracy" not in study.user_attrs:
            study.set_user_attr("accuracy", self.measure(None).accuracy)
        self.full: float = study.user_attrs["accuracy"]
        if self.full <= 0:
            raise VlmpruneError(
                "the model without pruning gets none of these questions right, so there is nothing "
                "to lose; give other questions."
            )

    def _study(self, name: str) -> Study:
        import optuna

        if name not in self._studies:
            study = optuna.create_study(
                storage=self._storage, study_name=name, direction="minimize", load_if_exists=True
            )
            for trial in study.get_trials(deepcopy=False):
                # It was killed: its place is proposed again.
                if trial.state.name == "RUNNING":
                    study.tell(trial.number, state=_state("FAIL"))
            self._studies[name] = study
        return self._studies[name]

    def _ask(self, study: Study, number: int, space: Space, first: list[dict[str, Any]]) -> Any:
        """A proposal that depends on the trials so far alone, interrupted or not.

        Args:
            study, number: the trials, and how many of them are done.
            space: what is varied.
            first: settings that the first trials are given.
        """
        import optuna

        # One at a time, so that those of a trial that was killed come again, and in their place.
        if number < len(first) and not any(one.state.name == "WAITING" for one in study.trials):
            study.enqueue_trial(first[number])

        # Later releases are told of each trial's excess by itself.
        old: dict[str, Any] = {}
        if "set_constraint" not in dir(optuna.Trial):
            old = {"constraints_func": _excess}
        study.sampler = optuna.samplers.TPESampler(
            seed=self.seed + number, n_startup_trials=STARTUP, **old
        )
        return study.ask({name: one.distribution() for name, one in space.items()})

    def _tell(
        self, study: Study, trial: Any, pruner: Pruner, settings: dict[str, Any], room: float
    ) -> None:
        found = self.measure(pruner)
        loss = 1 - found.accuracy / self.full
        for name, value in (
            ("settings", settings),
            ("accuracy", found.accuracy),
            ("loss", loss),
            ("excess", loss - room),
        ):
            trial.set_user_attr(name, value)
        if "set_constraint" in dir(trial):
            trial.set_constraint("loss", loss - room)
        study.tell(trial, found.cost)

    def _found(self) -> Found:
        trials: list[FrozenTrial] = []
        for name, study in self._studies.items():
            if name != UNPRUNED:
                trials += _complete(study)
        tried = [
            Tried(
                t.user_attrs["settings"],
                t.user_attrs["accuracy"],
                t.user_attrs["loss"],
                t.values[0],
                t.user_attrs["loss"] <= self.max_loss,
            )
            for t in trials
        ]
        return Found(self.full, self.max_loss, tried)


class Journal(Output):
    """The file of all trials, to which Optuna appends."""

    def ours(self) -> bool:
        """Whether it is a search's, and not another study's; an empty one is begun."""
        with self.path.open("rb") as file:
            line = file.readline()
        try:
            return not line or json.loads(line)["study_name"] == UNPRUNED
        except (ValueError, KeyError, TypeError):
            return False


def document(found: Found, method: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """What is written to the file of an outcome; JSON can hold it.

    Args:
        found: the outcome.
        method: the spec of the best setting, or "" where none is within the limit.
        about: what the search depended on.
    """
    return {
        "format": "vlmprune search 1",
        "method": method,
        "best": None if found.best is None else asdict(found.best),
        "accuracy without pruning": found.full,
        "max_loss": found.max_loss,
        "about": dict(about),
        "tried": [asdict(one) for one in found.tried],
        "versions": versions(),
    }


def builder(stage: spec.Stage) -> Callable[[dict[str, Any]], Pruner]:
    """Makes pruners of a spec's one method and of settings beside those that it gives."""

    def build(settings: dict[str, Any]) -> Pruner:
        return spec.Stage(stage.name, stage.settings | rounded(settings), stage.file).build()

    return build


def rounded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings to four digits: more say nothing, and would only make a spec long."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in settings.items()}


def _begin(space: Space) -> Iterator[dict[str, Any]]:
    for name, values in FIRST.items():
        one = space.get(name)
        if isinstance(one, Range) and not one.whole:
            yield from ({name: v} for v in values if one.low <= v <= one.high)
        elif isinstance(one, Choice):
            yield from ({name: v} for v in one.values[:1])


def _excess(trial: FrozenTrial) -> list[float]:
    """How far above its limit a trial's loss is; above 0 is not allowed."""
    return [trial.user_attrs.get("excess", 1.0)]


def _complete(study: Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]


def _done(study: Study) -> int:
    trials = study.get_trials(deepcopy=False)
    return sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in trials)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
