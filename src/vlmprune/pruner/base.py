"""What users hold: `Pruner`, the base of every method, and `Chain`, several on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, wraps
from typing import Any, Self

from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.method import Attached, Method
from vlmprune.pruner.choosing import reads_of, select_in_turn
from vlmprune.pruner.handle import Handle
from vlmprune.pruner.slots import Slots, resolve
from vlmprune.report import Report
from vlmprune.runtime.attachment import Latest, Logits
from vlmprune.runtime.scope import reported
from vlmprune.select.budget import check_budget
from vlmprune.select.settings import plain
from vlmprune.views import EncoderView, Inside, LayerView, Probes, Reads, Retention, Selection


class Pruner(Method):
    """A method with its settings; holds no model and can be attached to any number of them.

    A subclass is a frozen dataclass that implements the choice of its stage, as the table of
    `Method` has it, and says in class variables what it is. Use one of

        with pruner(model) as handle: ...
        handle = pruner.attach(model); ...; handle.detach()
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls).get("__post_init__")
        if own is None:
            return

        @wraps(own)
        def checked(self: Pruner, *given: Any) -> None:
            _make_plain(self)
            own(self, *given)

        type.__setattr__(cls, "__post_init__", checked)

    def __post_init__(self) -> None:
        _make_plain(self)

    def attach(self, model: nn.Module, logits: Logits | None = None) -> Handle[Self]:
        """Prune every call of `model` until `detach`.

        If several pruners are attached to one model, the last one acts alone; to apply several
        together chain them with `|`.

        Args:
            model: the host.
            logits: the columns at which a plain forward of the model gives logits. "full": the
                [B, L, V] of `input_ids`, for whoever looks them up by its own columns (label
                smoothing, metrics, log-likelihoods); -inf where a visual token was dropped, and
                in the last column before one that is left what foretells that one. "short": the
                [B, S, V] that are left, as without the argument, but without the warning.
                `generate` pays for neither.

        Raises:
            VlmpruneError: the model is not supported.
        """
        return self._attached(model, logits)

    def _attached(
        self, model: nn.Module, logits: Logits | None, block: bool = False
    ) -> Handle[Self]:
        handle = Handle(self, model, block, logits)
        # Not the handle: a pruner that lives on must not keep the model alive.
        object.__setattr__(self, "_last", handle.attachment.latest)
        return handle

    @contextmanager
    def __call__(self, model: nn.Module, logits: Logits | None = None) -> Iterator[Handle[Self]]:
        """Prune the calls of `model` inside a `with` block.

        Several threads may each have a block of their own on one model. A thread that has none,
        as one that was started inside the block, goes by it as long as it is the only one.

        Args:
            model: the host.
            logits: as `attach` takes it.
        """
        handle = self._attached(model, logits, block=True)
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
        # Of a chain among the stages its own count.
        positions = _agreed("positions", {one.positions for one in self.links} - {"auto"})
        score = _agreed("scores", {one.score for one in self.links if one.shortens})
        # What a method says by plain attributes; what it says by calls is read from the slots.
        said = {
            "positions": positions,
            "score": score,
            # What one stage drops the others cannot have, wherever it stands.
            "newlines": "drop" if any(one.newlines == "drop" for one in self.links) else "keep",
            "acts": self.slots.encoder.acts,
            "instead": self.slots.encoder.instead,
            "attends": any(stage.attends for stage in self.slots.choosing),
            "window": self.slots.cache.window,
            "sketch": self.slots.cache.sketch,
            "store": self.slots.cache.store,
            "rest": self.slots.cache.rest,
            "watch": self.slots.cache.watch,
            "always": self.slots.cache.always,
            "calibrated_on": self.slots.inner.calibrated_on,
        }
        for name, value in said.items():
            object.__setattr__(self, name, value)

    @cached_property
    def slots(self) -> Slots:
        """Where each stage acts."""
        return resolve(self.links)

    @property
    def links(self) -> tuple[Method, ...]:
        """The stages, of a chain among them its own."""
        return tuple(link for stage in self.stages for link in stage.links)

    @property
    def shortens(self) -> bool:
        """Whether any stage chooses visual tokens before the language model."""
        return bool(self.slots.choosing)

    @property
    def drops(self) -> bool:
        """Whether a stage drops visual tokens between decoder layers."""
        return self.slots.decoder.drops

    @property
    def routes(self) -> bool:
        """Whether a stage lets visual tokens skip single decoder layers."""
        return self.slots.decoder.routes

    @property
    def dropper(self) -> Method:
        """The stage that acts between or around decoder layers."""
        return self.slots.decoder

    @property
    def cuts(self) -> bool:
        """Whether a stage acts on the KV cache."""
        return self.slots.cache.cuts

    @property
    def recalls(self) -> bool:
        """Whether a stage reads the KV cache in part."""
        return self.slots.cache.recalls

    @property
    def probes(self) -> Probes | None:
        """Those of the stage that cuts the KV cache."""
        return self.slots.cache.probes

    def joined(self, attachment: Attached) -> Callable[[], None] | None:
        """What all stages put on the model."""
        with ExitStack() as stack:
            for stage in self.links:
                leave = stage.joined(attachment)
                if leave is not None:
                    stack.callback(leave)
            return stack.pop_all().close

    def inside(self, grid: tuple[int, int], layers: int) -> Inside:
        """What the stage inside the vision encoder does."""
        return self.slots.encoder.inside(grid, layers)

    def retain(self, layer: int, view: LayerView) -> Retention | None:
        """The choice of the stage that cuts the KV cache."""
        return self.slots.cache.retain(layer, view)

    def leaves_whole(self, layer: int) -> bool:
        """Whether the stage that cuts the KV cache leaves a layer as it is."""
        return self.slots.cache.leaves_whole(layer)

    def retain_together(self, layers: Tensor, view: LayerView) -> Retention:
        """The choice of that stage, of several layers at once."""
        return self.slots.cache.retain_together(layers, view)

    @property
    def retains_together(self) -> bool:
        """Whether it chooses from several layers at once."""
        return self.slots.cache.retains_together

    def recall(self, layer: int, tokens: Tensor) -> Tensor | None:
        """What the stage reads that reads the KV cache in part."""
        return self.slots.cache.recall(layer, tokens)

    def check_prompt(self, others: int, images: int, heads: int, token_bytes: int) -> None:
        """The check of the stage that cuts the KV cache."""
        self.slots.cache.check_prompt(others, images, heads, token_bytes)

    def check_request(self, candidates: Tensor, images: tuple[int, ...], videos: bool) -> None:
        """Check the first stage; the later ones see what it leaves."""
        first, *later = self.links
        first.check_request(candidates, images, videos)
        for stage in later:
            check_budget(stage.unit, videos)

    def below_keep(self, candidates: Tensor, images: tuple[int, ...]) -> dict[str, int]:
        """Those of the first stage; the later ones see what it leaves."""
        return self.links[0].below_keep(candidates, images)

    def reads(self, depth: int, feature: int) -> Reads:
        """All that any stage wants to see.

        Raises:
            VlmpruneError: two of them want what a view has but once.
        """
        return reads_of(self.slots.choosing, depth, feature, repr(self))

    def select(self, view: EncoderView) -> Selection:
        """Choose by each stage in turn, the later ones among merged features; roles of the last.

        Raises:
            VlmpruneError: two stages merge.
        """
        return select_in_turn(self.slots.choosing, view, repr(self))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.stages))


def _make_plain(pruner: Pruner) -> None:
    """Have Python's own numbers where settings came as another library's, before any check."""
    for one in fields(pruner):  # type: ignore[arg-type]
        given = getattr(pruner, one.name)
        made = plain(given)
        if made is not given:
            object.__setattr__(pruner, one.name, made)


def _agreed(what: str, asked: set[Any]) -> str:
    """The one value that stages ask for, "auto" where none asks.

    Raises:
        VlmpruneError: they ask for several.
    """
    if len(asked) > 1:
        raise VlmpruneError(
            f"the chained pruners ask for different {what} ({', '.join(sorted(asked))}); "
            "give all of them the same."
        )
    return asked.pop() if asked else "auto"
