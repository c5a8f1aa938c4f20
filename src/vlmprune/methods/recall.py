"""Recall: a KV cache that keeps every visual token, of which each step reads the few it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.pruner import Pruner
from vlmprune.select import recall
from vlmprune.select.budget import check_keep
from vlmprune.select.settings import check_choice, check_whole
from vlmprune.select.sketch import Kind
from vlmprune.views.settings import Place, Rest, Watch


@dataclass(frozen=True)
class Recall(Pruner):
    """Keep every visual token, and read at each decode step the few that matter for it.

    Prefill is whole, so the first generated token is the unpruned model's. At each later step every
    KV head scores all visual keys for the query at hand, on a sketch of a few bits a value, reads
    the best of each image in full, and all text and later tokens. What one step does not read the
    next may: nothing is lost. A pass of several new tokens, such as a later turn, reads everything.

    Source: this project (docs/recall.md); SparseVILA (arXiv 2510.17777) and DSTP (arXiv
    2604.12358) describe relatives, neither with released code.

    Attributes:
        read: visual tokens that a KV head reads of each image at a step: an int is a number, a
            float a share, half rounded up; at least one.
        sketch: what keys are scored on. "int2", "int4" and "int8" have so many bits a value, of
            keys centred and scaled by channel, and one scale a token; "exact" scores the keys
            themselves, all of which are read then.
        store: "device" keeps keys and values where they are; "host" moves those of visual tokens
            to host memory (pinned for a GPU, a mapped file in the folder for temporary files on a
            CPU), from where a step fetches what it reads; the sketch stays on the device.
        first_layer: decoder layers before it are read whole.
        floor: images with fewer visual tokens are read whole.
        rest: what stands for the visual tokens that a step does not read: "none", nothing; "mean",
            one token with their share of attention, by the sketch, and the mean of their values.
        watch: what the report notes of each step beside bytes: "tokens", which were read; "mass",
            also the share of attention that falls on what was read, for which all keys are scored.
        always: read in part even where a CPU would be done sooner reading all, as with few tokens.
            Without it such a layer steps aside: it reads everything, and the report says so. With
            `watch`, with store="host" and on a GPU no layer does.

    A KV head's choice goes by the mean of its query heads' softmax weights, over text and visual
    keys together; ties go to the lower index. Attention is the softmax over what is read and, with
    rest="mean", the one that stands for the others.
    Sliding-window and linear-attention layers are left whole.

    Shapes: scores [B, Hq, V] → read [B, H, V].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    read: int | float = 0.0625
    sketch: Kind = "int4"
    store: Place = "device"
    first_layer: int = 0
    floor: int = 64
    rest: Rest = "mean"
    watch: Watch = ""
    always: bool = False

    needs: ClassVar[str] = "KV cache"
    stage: ClassVar[str] = "KV cache, at each decode step"
    paper: ClassVar[str] = "unpublished"
    text_agnostic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep(self.read, "read", "reads")
        check_choice("sketch", self.sketch, Kind)
        check_choice("store", self.store, Place)
        check_choice("rest", self.rest, Rest)
        check_choice("watch", self.watch, Watch)
        for name in ("first_layer", "floor"):
            check_whole(name, getattr(self, name), 0)
        if not isinstance(self.always, bool):
            raise VlmpruneError(f"always={self.always!r} is not known; use True or False.")
        if self.store == "host" and self.sketch == "exact":
            raise VlmpruneError(
                'sketch="exact" reads every key at each step, which store="host" would fetch; use '
                'sketch="int8", or store="device".'
            )

    def recall(self, layer: int, tokens: Tensor) -> Tensor | None:
        """How many tokens of each image the layer's KV heads read at a step; None for all."""
        if layer < self.first_layer:
            return None
        return recall.counts(self.read, tokens, self.floor)
