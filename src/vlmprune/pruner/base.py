"""What users hold: `Pruner`, the base of every method, and `Chain`, several on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.method import Attached, Method
from vlmprune.pruner.handle import Handle
from vlmprune.report import Report
from vlmprune.runtime.attachment import Latest
from vlmprune.runtime.encoder.merging import narrowed, seen_after
from vlmprune.runtime.scope import reported
from vlmprune.select.budget import check_budget
from vlmprune.views import EncoderView, Inside, LayerView, Probes, Reads, Retention, Selection


class Pruner(Method):
    """A method with its settings; holds no model and can be attached to any number of them.

    A subclass is a frozen dataclass that implements the choice of its stage, as the table of
    `Method` has it, and says in class variables what it is. Use one of

        with pruner(model) as handle: ...
        handle = pruner.attach(model); ...; handle.detach()
    """

    def attach(self, model: nn.Module) -> Handle[Self]:
        """Prune every call of `model` until `detach`.

        If several pruners are attached to one model, the last one acts alone; to apply several
        together chain them with `|`.

        Raises:
            VlmpruneError: the model is not supported.
        """
        return self._attached(model)

    def _attached(self, model: nn.Module, block: bool = False) -> Handle[Self]:
        handle = Handle(self, model, block)
        # Not the handle: a pruner that lives on must not keep the model alive.
        object.__setattr__(self, "_last", handle.attachment.latest)
        return handle

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Handle[Self]]:
        """Prune the calls of `model` inside a `with` block.

        Several threads may each have a block of their own on one model. A thread that has none,
        as one that was started inside the block, goes by it as long as it is the only one.
        """
        handle = self._attached(model, block=True)
        try:
            yield handle
        finally:
            handle.detach()

    def __or__(self, other: Pruner) -> Pruner:
        """Chain: `other` chooses among what this one keeps."""
        if not isinstance(other, Pruner):
            return NotImplemented
        links = (*self.links, *other.links)
        return Chain(tuple(one for one in links if isinstance(one, Pruner)))

    @property
    def report(self) -> Report | None:
        """What the last call under this pruner's latest attachment kept and saved."""
        latest: Latest | None = getattr(self, "_last", None)
        return None if latest is None else reported(latest) or latest.report


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
        dropping = [stage for stage in self.stages if stage.drops or stage.routes]
        if len(dropping) > 1:
            does = "skip" if any(stage.routes for stage in dropping) else "drop tokens between"
            raise VlmpruneError(
                f"{' and '.join(map(repr, dropping))} would both {does} decoder layers; chain only "
                "one."
            )
        if dropping and cutting:
            does = "lets tokens skip" if dropping[0].routes else "drops tokens between"
            raise VlmpruneError(
                f"{dropping[0]!r} {does} decoder layers, whose caches {cutting[0]!r} cannot cut; "
                "chain only one of them."
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
    def links(self) -> tuple[Method, ...]:
        """The stages, of a chain among them its own."""
        return tuple(link for stage in self.stages for link in stage.links)

    @property
    def shortens(self) -> bool:
        """Whether any stage chooses visual tokens before the language model."""
        return any(stage.shortens for stage in self.stages)

    @property
    def drops(self) -> bool:
        """Whether a stage drops visual tokens between decoder layers."""
        return any(stage.drops for stage in self.stages)

    @property
    def routes(self) -> bool:
        """Whether a stage lets visual tokens skip single decoder layers."""
        return any(stage.routes for stage in self.stages)

    @property
    def dropper(self) -> Pruner:
        """The stage that acts between or around decoder layers; it comes last."""
        return self.stages[-1]

    @property
    def cuts(self) -> bool:
        """Whether any stage cuts the KV cache."""
        return any(stage.cuts for stage in self.stages)

    @property
    def probes(self) -> Probes | None:
        """Those of the stage that cuts the KV cache."""
        return self.stages[-1].probes

    def joined(self, attachment: Attached) -> Callable[[], None] | None:
        """What all stages put on the model."""
        with ExitStack() as stack:
            for stage in self.stages:
                leave = stage.joined(attachment)
                if leave is not None:
                    stack.callback(leave)
            return stack.pop_all().close

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
            check_budget(stage.unit, videos)

    def reads(self, depth: int, feature: int) -> Reads:
        """All that any stage wants to see.

        Raises:
            VlmpruneError: two of them want what a view has but once.
        """
        wanted = [stage.reads(depth, feature) for stage in self.stages if stage.shortens]
        semantic = [one.semantic for one in wanted if one.semantic is not None]
        if len(semantic) > 1:
            raise VlmpruneError(
                f"the stages of {self!r} each send tokens of their own through the encoder; chain "
                "only one that does."
            )
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
            tuple(sorted({layer for one in wanted for layer in one.states})),
            any(one.question for one in wanted),
            semantic[0] if semantic else None,
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
                if selection.tokens is not None and view.projected is not None:
                    made = selection.tokens.detach().to(view.projected)
                    view = replace(
                        view,
                        projected=torch.where(selection.kept[..., None], made, view.projected),
                    )
                if before is not None:
                    selection = narrowed(selection, before)
                view = view.narrow(selection.kept)
                before = selection
        return selection

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.stages))
