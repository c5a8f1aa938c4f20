"""The base of every method: attach and detach, the context manager, `|`, the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmprune.hosts.families import Positions
from vlmprune.pruner.handle import Handle, Latest
from vlmprune.report import Report
from vlmprune.runtime.attention.taps import Score
from vlmprune.select.budget import Budget, check_budget
from vlmprune.views import (
    Ask,
    EncoderView,
    FrameView,
    Inside,
    LayerView,
    Probes,
    Reads,
    Retention,
    Routed,
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
    # Of methods that send tokens of their own through the encoder: how many beside each crop.
    beside: int = 0
    needs: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    text_agnostic: ClassVar[bool] = False
    # What of it is trained, for people.
    training: ClassVar[str] = "none"
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
    def routes(self) -> bool:
        """Whether it lets visual tokens skip single decoder layers."""
        return type(self).route is not Pruner.route

    @property
    def probes(self) -> Probes | None:
        """Of methods that act on prefill too: the rows that they look at before a layer attends.

        Such a layer attends among what `retain` keeps; None for methods that cut after prefill.
        """
        return None

    @property
    def dropper(self) -> Pruner:
        """The stage that drops visual tokens between decoder layers, or lets them skip some."""
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

    def skips(self, depth: int) -> tuple[int, ...]:
        """The decoder layers that visual tokens may skip, ascending.

        Args:
            depth: number of decoder layers. Layer 0 cannot be skipped.
        """
        return ()

    def route(self, layer: int, view: FrameView) -> Routed:
        """Choose the visual tokens that a decoder layer works on."""
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
        check_budget(self.unit, videos)
        self.check(view.counts(self.unit))

    def check_prompt(self, others: int, images: int, heads: int, token_bytes: int) -> None:
        """Refuse a prompt whose cache the settings cannot hold, before it is run.

        Args:
            others: tokens of a sample that stay whatever is chosen, all KV heads together.
            images: the sample's images.
            heads: KV heads.
            token_bytes: bytes of one token's key and value in one KV head.
        """

    def joined(self, handle: Handle) -> Callable[[], None] | None:
        """Check a model before it is attached to, and put on it what else the method needs there.

        Args:
            handle: the attachment, which is not complete yet; its model and family are there.

        Returns:
            What takes it away again when the attachment ends; None for nothing.

        Raises:
            VlmpruneError: the method does not fit the model.
        """
        return None

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
        # A chain is a pruner itself.
        from vlmprune.pruner.chain import Chain, stages_of

        return Chain((*stages_of(self), *stages_of(other)))

    @property
    def unit(self) -> Budget:
        """What the method's setting `budget` counts by; crops where it has none."""
        found: Budget = getattr(self, "budget", "crop")
        return found

    @property
    def report(self) -> Report | None:
        """What the last call under this pruner's latest attachment kept and saved."""
        latest: Latest | None = getattr(self, "_last", None)
        return None if latest is None else latest.report
