"""What a method may declare: the base of every method, without what attaches it to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from vlmprune.select.budget import Budget, Newlines, check_budget
from vlmprune.select.sketch import Kind
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
from vlmprune.views.settings import Place, Positions, Rest, Score, Watch


class Attached(Protocol):
    """What a method is told of an attachment.

    Attributes:
        method: the method, or the chain that it is a stage of.
        model: the host.
        family: the host's record (`hosts.families.Family`).
    """

    method: Any
    model: Any
    family: Any


class Method:
    """What a method declares: its settings, what it wants to see, and its choice.

    A method implements the choice of its stage; the rest is there for those that want it.

    | stage | it says before | it chooses |
    |---|---|---|
    | before or inside the vision encoder | `inside`, `reads`, `check`, `check_request` | `select` |
    | before the language model | `reads`, `check`, `check_request` | `select` |
    | between decoder layers: tokens leave | `asks` | `raters`, `drop` |
    | between decoder layers: tokens skip some | `skips` | `route` |
    | in a layer's KV cache, after prefill | `probes`, `check_prompt`, `leaves_whole` | `retain` |
    | in a layer's KV cache, at each step | `sketch`, `store`, `rest`, … | `recall` |
    | any, as it is attached to a model | `joined` | |

    Knows nothing of models and of how it is attached to one; `Pruner` adds that.
    """

    positions: Positions = "auto"
    score: Score = "auto"
    # Of methods that choose before the language model: what becomes of newline tokens.
    newlines: Newlines = "keep"
    # Of methods that cut caches: how many of the prompt's last tokens are asked, and the
    # architecture that its thresholds are for.
    window: int = 1
    calibrated_on: str | None = None
    # Of methods that read caches in part: what keys are scored on, where keys and values lie, what
    # stands for tokens that a step does not read, what is noted of each step, and whether they do
    # so even where reading all is faster.
    sketch: Kind = "exact"
    store: Place = "device"
    rest: Rest = "none"
    watch: Watch = ""
    always: bool = True
    # Of methods that act inside the vision encoder: how, and what to do where they cannot.
    acts: Literal["merging", "dropping", "scaling", ""] = ""
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
    # Of those: whether they need to know no more than how many visual tokens there are.
    blind: ClassVar[bool] = False
    # Whether kept tokens may be made of several (`Selection.merge`).
    merges: ClassVar[bool] = False
    # Settings whose default is another than up to version 0.2, with that one.
    former: ClassVar[Mapping[str, Any]] = {}
    # Settings that up to version 0.2 there were none of, with what stands for their absence.
    added: ClassVar[Mapping[str, Any]] = {}
    # Of methods that drop rows inside the language model: what positions="auto" means.
    released: ClassVar[Literal["compact", "original"]] = "original"

    @property
    def shortens(self) -> bool:
        """Whether it chooses visual tokens before the language model."""
        return type(self).select is not Method.select

    @property
    def cuts(self) -> bool:
        """Whether it acts on the KV cache as prefill leaves it: cuts it, or reads it in part."""
        return type(self).retain is not Method.retain or self.recalls

    @property
    def recalls(self) -> bool:
        """Whether it keeps the whole KV cache and reads a part of it at each step."""
        return type(self).recall is not Method.recall

    @property
    def drops(self) -> bool:
        """Whether it drops visual tokens between decoder layers."""
        return type(self).drop is not Method.drop

    @property
    def routes(self) -> bool:
        """Whether it lets visual tokens skip single decoder layers."""
        return type(self).route is not Method.route

    @property
    def probes(self) -> Probes | None:
        """Of methods that act on prefill too: the rows that they look at before a layer attends.

        Such a layer attends among what `retain` keeps; None for methods that cut after prefill.
        """
        return None

    @property
    def links(self) -> tuple[Method, ...]:
        """The methods that it is made of, left to right: of a chain its stages, else itself."""
        return (self,)

    @property
    def dropper(self) -> Method:
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

    def leaves_whole(self, layer: int) -> bool:
        """Whether `retain` keeps everything of a layer, whatever it would see there.

        Such a layer is not looked at, and has no report.
        """
        return False

    def retain_together(self, layers: Tensor, view: LayerView) -> Retention:
        """Choose what several layers keep at once, whose samples come one layer after the other.

        For methods whose choice in a layer hangs on no other layer: what it says is what `retain`
        says layer by layer, in fewer operations. A subclass that has a `retain` of its own is
        asked that, unless it has this one, too.

        Args:
            layers: [B] int64; number of the layer of each of the view's rows.
            view: of all of them, B samples times layers.
        """
        raise NotImplementedError

    @property
    def retains_together(self) -> bool:
        """Whether several layers may be chosen from at once."""
        for one in type(self).__mro__:
            if "retain_together" in vars(one):
                return one is not Method
            if "retain" in vars(one):
                return False
        return False

    def recall(self, layer: int, tokens: Tensor) -> Tensor | None:
        """How many visual tokens a decoder layer's KV heads read at a step; None for all.

        Args:
            layer: its number.
            tokens: [B, I] int64 visual tokens of each image; 0 where a sample has fewer images.

        Returns:
            [B, I] int64.
        """
        raise NotImplementedError

    def exceeds(self, available: int) -> bool:
        """Whether an int budget counts more tokens than a unit of it has, which then keeps all."""
        return False

    def below_keep(self, candidates: Tensor, images: tuple[int, ...]) -> dict[str, int]:
        """How many units of the budget have fewer tokens than it counts; by their name.

        Args:
            candidates: [crops, N] bool, as in `EncoderView`.
            images: image of each crop.

        Returns:
            None of them as an empty dict.
        """
        nothing = torch.empty(0)
        counts = EncoderView(nothing, nothing, candidates, images).counts(self.unit)
        below = sum(self.exceeds(n) for n in counts)
        return {self.unit: below} if below else {}

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

    def joined(self, attachment: Attached) -> Callable[[], None] | None:
        """Check a model before it is attached to, and put on it what else the method needs there.

        Args:
            attachment: it is not complete yet; its model and family are there.

        Returns:
            What takes it away again when the attachment ends; None for nothing.

        Raises:
            VlmpruneError: the method does not fit the model.
        """
        return None

    @property
    def unit(self) -> Budget:
        """What the method's setting `budget` counts by; crops where it has none."""
        found: Budget = getattr(self, "budget", "crop")
        return found


def name_then(stages: Sequence[Method]) -> str:
    """Methods as files of version 0.2 and before name them, without settings that came later.

    One whose later settings ask for something else has the name that it has now.
    """
    return " | ".join(map(_name_then, stages))


def by_default(stages: Sequence[Method]) -> tuple[Method, ...]:
    """The methods with the former defaults of settings whose default is another now."""
    out: list[Any] = list(stages)
    return tuple(replace(one, **one.former) if one.former else one for one in out)


def defaults_then(stages: Sequence[Method]) -> str:
    """Settings that had another default than these methods have values; "" for none."""
    told = []
    for one in stages:
        other = {k: v for k, v in one.former.items() if getattr(one, k) != v}
        if other:
            settings = " and ".join(f"{name}={value!r}" for name, value in other.items())
            told.append(f"{settings} for {type(one).__name__}")
    return ", ".join(told)


def _name_then(method: Any) -> str:
    if not method.added or any(getattr(method, k) != v for k, v in method.added.items()):
        return repr(method)
    shown = [one.name for one in fields(method) if one.repr and one.name not in method.added]
    told = ", ".join(f"{name}={getattr(method, name)!r}" for name in shown)
    return f"{type(method).__qualname__}({told})"
