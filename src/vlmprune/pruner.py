"""The base of every method: attach and detach, the context manager, `|`, the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune import families, host
from vlmprune.errors import VlmpruneError
from vlmprune.families import Positions
from vlmprune.report import Report, make
from vlmprune.views import EncoderView, Selection


class Pruner:
    """A method with its settings; holds no model and can be attached to any number of them.

    A subclass is a frozen dataclass that implements `select` and `check`, and says in class
    variables what it is. Use one of

        with pruner(model) as handle: ...
        handle = pruner.attach(model); ...; handle.detach()
    """

    positions: Positions = "auto"
    needs: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    text_agnostic: ClassVar[bool] = False

    def select(self, view: EncoderView) -> Selection:
        """Choose cells after the vision encoder."""
        raise NotImplementedError

    def check(self, counts: list[int]) -> None:
        """Refuse settings that do not fit, before anything is encoded.

        Args:
            counts: visual tokens of each unit of the method's budget.
        """

    def check_request(self, candidates: Tensor, images: tuple[int, ...]) -> None:
        """Refuse a request that the settings do not fit, before anything is encoded.

        Args:
            candidates: [crops, N] bool, as in `EncoderView`.
            images: image of each crop.
        """
        nothing = torch.empty(0)
        view = EncoderView(nothing, nothing, candidates, images)
        self.check(view.counts(getattr(self, "budget", "crop")))

    def attach(self, model: nn.Module) -> Handle:
        """Prune every call of `model` until `detach`.

        If several pruners are attached to one model, the last one acts alone; to apply several
        together chain them with `|`.

        Raises:
            VlmpruneError: the model is not supported.
        """
        handle = Handle(self, model)
        # Not the handle: a pruner that lives on must not keep the model alive.
        object.__setattr__(self, "_last", handle.latest)
        return handle

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Handle]:
        """Prune the calls of `model` inside a `with` block."""
        handle = self.attach(model)
        try:
            yield handle
        finally:
            handle.detach()

    def __or__(self, other: Pruner) -> Pruner:
        """Chain: `other` chooses among what this one keeps."""
        if not isinstance(other, Pruner):
            return NotImplemented
        return Chain((*_stages(self), *_stages(other)))

    @property
    def report(self) -> Report | None:
        """What the last call under this pruner's latest attachment kept and saved."""
        latest: Latest | None = getattr(self, "_last", None)
        return None if latest is None else latest.report


@dataclass(frozen=True)
class Chain(Pruner):
    """Several pruners, left to right; each chooses among what the one before it keeps."""

    stages: tuple[Pruner, ...]

    def __post_init__(self) -> None:
        asked = {stage.positions for stage in self.stages} - {"auto"}
        if len(asked) > 1:
            raise VlmpruneError(
                f"the chained pruners ask for different positions ({', '.join(sorted(asked))}); "
                "give all of them the same."
            )
        object.__setattr__(self, "positions", asked.pop() if asked else "auto")

    def check_request(self, candidates: Tensor, images: tuple[int, ...]) -> None:
        """Check the first stage; the later ones see what it leaves."""
        self.stages[0].check_request(candidates, images)

    def select(self, view: EncoderView) -> Selection:
        """Choose by each stage in turn; the roles are the last one's."""
        for stage in self.stages:
            selection = stage.select(view)
            view = view.narrow(selection.kept)
        return selection

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.stages))


def _stages(pruner: Pruner) -> tuple[Pruner, ...]:
    return pruner.stages if isinstance(pruner, Chain) else (pruner,)


@dataclass
class Latest:
    """Holds the report of an attachment's last call."""

    report: Report | None = None


class Handle:
    """A pruner on a model.

    Attributes:
        pruner: the method.
        model: the host.
        family: the host's record.
        positions: the position policy in use.
        latest: holds the report of the last call.
    """

    def __init__(self, pruner: Pruner, model: nn.Module) -> None:
        self.family = families.family_of(model)
        self.pruner = pruner
        self.model: Any = model
        self.positions = families.resolve_positions(model, pruner.positions)
        self.latest = Latest()
        config: Any = model.config
        self.image_token_id: int = config.image_token_id
        pad = getattr(config.get_text_config(), "pad_token_id", None)
        self.pad_id: int = pad if isinstance(pad, int) and pad >= 0 else 0
        self.host = host.join(model, self)

    @property
    def report(self) -> Report | None:
        """What the last call kept and saved; None before the first."""
        return self.latest.report

    @report.setter
    def report(self, report: Report | None) -> None:
        self.latest.report = report

    def detach(self) -> None:
        """Give the model back exactly as it was. May be called again."""
        host.leave(self.model, self)

    def report_nothing(self) -> None:
        """Report a call that held no image."""
        self.report = make(
            config=self.model.config,
            method=repr(self.pruner),
            positions=self.positions,
            score="",
            layouts=[],
            kept=[],
            roles=[],
            rows=[],
            pixels=None,
            dtype=self.model.dtype,
            seconds=0.0,
        )
