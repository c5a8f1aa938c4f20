"""The base of every method: attach and detach, the context manager, `|`, the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmprune.budget import Budget, check_budget
from vlmprune.errors import VlmpruneError
from vlmprune.families import Positions
from vlmprune.handle import Handle, Latest
from vlmprune.merging import narrowed, seen_after
from vlmprune.report import Report
from vlmprune.taps import Score
from vlmprune.views import (
    Ask,
    EncoderView,
    Inside,
    LayerView,
    Probes,
    Reads,
    Retention,
    Rows,
    RowView,
    Selection,
)


class Pruner:
    """A method with its settings; holds no model and can be attached to any number of them.

    A subclass is a frozen dataclass that implements `select` (with `check`) or `retain`, and says
    in class variables what it is. Use one of

        with pruner(model) as handle: ...
        handle = pruner.attach(model); ...; handle.detach()
    """

    positions: Positions = "auto"
    score: Score = "auto"
    # Of methods that cut caches: how many of the prompt's last tokens are asked, and the
    # architecture that its thresholds are for.
    window: int = 1
    calibrated_on: str | None = None
    # Of methods that act inside the vision encoder: how, and what to do where they cannot.
    acts: Literal["merging", "scaling", ""] = ""
    instead: str = ""
    needs: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    text_agnostic: ClassVar[bool] = False
    # Of methods that choose before the language model: whether by the family's own score.
    attends: ClassVar[bool] = True
    # Whether kept tokens may be made of several (`Selection.merge`).
    merges: ClassVar[bool] = False
    # Of methods that drop rows inside the language model: what positions="auto" means.
    released: ClassVar[Literal["compact", "original"]] = "original"

    @property
    def shortens(self) -> bool:
        """Whether it chooses visual tokens before the language model."""
        return type(self).select is not Pruner.select

    @property
    def cuts(self) -> bool:
        """Whether it cuts the KV cache after prefill."""
        return type(self).retain is not Pruner.retain

    @property
    def drops(self) -> bool:
        """Whether it drops visual tokens between decoder layers."""
        return type(self).drop is not Pruner.drop

    @property
    def probes(self) -> Probes | None:
        """Of methods that act on prefill too: the rows that they look at before a layer attends.

        Such a layer attends among what `retain` keeps; None for methods that cut after prefill.
        """
        return None

    @property
    def dropper(self) -> Pruner:
        """The stage that drops visual tokens between decoder layers."""
        return self

    def reads(self, depth: int, feature: int) -> Reads:
        """What `select` wants to see beside the family's own score and features.

        Args:
            depth: number of encoder layers.
            feature: 0-based layer whose output the model takes as features.
        """
        return Reads()

    def inside(self, grid: tuple[int, int], layers: int) -> Inside:
        """What to do while the vision encoder runs, for methods that act inside it.

        Args:
            grid: (rows, columns) of patches of a crop.
            layers: encoder layers up to the one whose output the model takes as features.

        Raises:
            VlmpruneError: the settings are out of reach.
        """
        return Inside()

    def select(self, view: EncoderView) -> Selection:
        """Choose cells after the vision encoder."""
        raise NotImplementedError

    def asks(self, depth: int) -> Mapping[int, Ask]:
        """The decoder layers at whose input `drop` is asked, and what it wants to see there.

        Args:
            depth: number of decoder layers. Layer 0 cannot be asked.
        """
        return {}

    def raters(self, view: RowView) -> Tensor:
        """[B, X] bool; the text tokens whose attention counts, from the embedded prompt."""
        return view.text

    def drop(self, layer: int, view: RowView) -> Rows | None:
        """Choose the rows that go on into a decoder layer; None lets all go on."""
        raise NotImplementedError

    def retain(self, layer: int, view: LayerView) -> Retention | None:
        """Choose what a decoder layer's cache keeps of a prompt; None keeps everything."""
        raise NotImplementedError

    def check(self, counts: list[int]) -> None:
        """Refuse settings that do not fit, before anything is encoded.

        Args:
            counts: visual tokens of each unit of the method's budget.
        """

    def check_request(self, candidates: Tensor, images: tuple[int, ...], videos: bool) -> None:
        """Refuse a request that the settings do not fit, before anything is encoded.

        Args:
            candidates: [crops, N] bool, as in `EncoderView`.
            images: image of each crop.
            videos: whether any of the images is a video.
        """
        nothing = torch.empty(0)
        view = EncoderView(nothing, nothing, candidates, images)
        budget: Budget = getattr(self, "budget", "crop")
        check_budget(budget, videos)
        self.check(view.counts(budget))

    def check_prompt(self, others: int, images: int, heads: int, token_bytes: int) -> None:
        """Refuse a prompt whose cache the settings cannot hold, before it is run.

        Args:
            others: tokens of a sample that stay whatever is chosen, all KV heads together.
            images: the sample's images.
            heads: KV heads.
            token_bytes: bytes of one token's key and value in one KV head.
        """

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
    """Several pruners, left to right; each chooses among what the one before it keeps.

    One that cuts the KV cache comes last.
    """

    stages: tuple[Pruner, ...]

    def __post_init__(self) -> None:
        asked = {stage.positions for stage in self.stages} - {"auto"}
        if len(asked) > 1:
            raise VlmpruneError(
                f"the chained pruners ask for different positions ({', '.join(sorted(asked))}); "
                "give all of them the same."
            )
        object.__setattr__(self, "positions", asked.pop() if asked else "auto")
        scores = {stage.score for stage in self.stages if stage.shortens}
        if len(scores) > 1:
            raise VlmpruneError(
                f"the chained pruners ask for different scores ({', '.join(sorted(scores))}); "
                "give all of them the same."
            )
        object.__setattr__(self, "score", scores.pop() if scores else "auto")
        for stage in self.stages[1:]:
            if stage.acts:
                raise VlmpruneError(
                    f"{stage!r} acts inside the vision encoder and must come first in a chain."
                )
        object.__setattr__(self, "acts", self.stages[0].acts)
        object.__setattr__(self, "instead", self.stages[0].instead)
        choosing = [stage for stage in self.stages if stage.shortens]
        object.__setattr__(self, "attends", any(stage.attends for stage in choosing))
        object.__setattr__(self, "window", self.stages[-1].window)
        object.__setattr__(self, "calibrated_on", self.stages[-1].calibrated_on)
        cutting = [stage for stage in self.stages if stage.cuts]
        if len(cutting) > 1:
            raise VlmpruneError(
                f"{' and '.join(map(repr, cutting))} would both cut the KV cache; chain only one."
            )
        if cutting and cutting[0] is not self.stages[-1]:
            raise VlmpruneError(f"{cutting[0]!r} acts after prefill and must come last in a chain.")
        dropping = [stage for stage in self.stages if stage.drops]
        if len(dropping) > 1:
            raise VlmpruneError(
                f"{' and '.join(map(repr, dropping))} would both drop tokens between decoder "
                "layers; chain only one."
            )
        if dropping and cutting:
            raise VlmpruneError(
                f"{dropping[0]!r} drops tokens between decoder layers, whose caches "
                f"{cutting[0]!r} cannot cut; chain only one of them."
            )
        if dropping and dropping[0] is not self.stages[-1]:
            raise VlmpruneError(
                f"{dropping[0]!r} acts inside the language model and must come last in a chain."
            )
        merging = [stage for stage in self.stages if stage.merges]
        if len(merging) > 1:
            raise VlmpruneError(
                f"{' and '.join(map(repr, merging))} would both merge visual tokens; chain only "
                "one that does."
            )

    @property
    def shortens(self) -> bool:
        """Whether any stage chooses visual tokens before the language model."""
        return any(stage.shortens for stage in self.stages)

    @property
    def drops(self) -> bool:
        """Whether a stage drops visual tokens between decoder layers."""
        return any(stage.drops for stage in self.stages)

    @property
    def dropper(self) -> Pruner:
        """The stage that drops visual tokens between decoder layers; it comes last."""
        return self.stages[-1]

    @property
    def cuts(self) -> bool:
        """Whether any stage cuts the KV cache."""
        return any(stage.cuts for stage in self.stages)

    @property
    def probes(self) -> Probes | None:
        """Those of the stage that cuts the KV cache."""
        return self.stages[-1].probes

    def inside(self, grid: tuple[int, int], layers: int) -> Inside:
        """What the first stage does."""
        return self.stages[0].inside(grid, layers)

    def retain(self, layer: int, view: LayerView) -> Retention | None:
        """The choice of the stage that cuts the KV cache."""
        return self.stages[-1].retain(layer, view)

    def check_prompt(self, others: int, images: int, heads: int, token_bytes: int) -> None:
        """The check of the stage that cuts the KV cache."""
        self.stages[-1].check_prompt(others, images, heads, token_bytes)

    def check_request(self, candidates: Tensor, images: tuple[int, ...], videos: bool) -> None:
        """Check the first stage; the later ones see what it leaves."""
        self.stages[0].check_request(candidates, images, videos)
        for stage in self.stages[1:]:
            check_budget(getattr(stage, "budget", "crop"), videos)

    def reads(self, depth: int, feature: int) -> Reads:
        """All that any stage wants to see.

        Raises:
            VlmpruneError: two of them want what a view has but once.
        """
        wanted = [stage.reads(depth, feature) for stage in self.stages if stage.shortens]
        for what, values in (
            ("the relevance by another source", {one.relevance for one in wanted} - {""}),
            ("the keys of another layer", {one.keys for one in wanted} - {None}),
            ("the patches' attention in another layer", {one.patches for one in wanted} - {None}),
        ):
            if len(values) > 1:
                given = ", ".join(sorted(map(str, values)))
                raise VlmpruneError(
                    f"the stages of {self!r} each want {what} ({given}); give all the same."
                )
        return Reads(
            tuple(sorted({layer for one in wanted for layer in one.layers})),
            next((one.patches for one in wanted if one.patches is not None), None),
            next((one.keys for one in wanted if one.keys is not None), None),
            any(one.projected for one in wanted),
            next((one.relevance for one in wanted if one.relevance), ""),
        )

    def select(self, view: EncoderView) -> Selection:
        """Choose by each stage in turn, the later ones among merged features; roles of the last.

        Raises:
            VlmpruneError: two stages merge.
        """
        before: Selection | None = None
        for stage in self.stages:
            if stage.shortens:
                selection = stage.select(view)
                if selection.merge is not None:
                    if before is not None and before.merge is not None:
                        raise VlmpruneError(
                            f"{stage!r} is not the only stage of {self!r} that merges visual "
                            "tokens; chain only one that does."
                        )
                    view = seen_after(view, selection.merge)
                if before is not None:
                    selection = narrowed(selection, before)
                view = view.narrow(selection.kept)
                before = selection
        return selection

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.stages))


def _stages(pruner: Pruner) -> tuple[Pruner, ...]:
    return pruner.stages if isinstance(pruner, Chain) else (pruner,)
