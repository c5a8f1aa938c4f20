"""Several stages before the language model: what they want to see together, how they choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vlmprune.errors import VlmpruneError
from vlmprune.method import Method
from vlmprune.runtime.encoder.merging import narrowed, seen_after
from vlmprune.views import EncoderView, Reads, Selection


def reads_of(stages: Sequence[Method], depth: int, feature: int, who: str) -> Reads:
    """All that any stage wants to see.

    Args:
        stages: left to right.
        depth: number of encoder layers.
        feature: 0-based layer whose output the model takes as features.
        who: the chain, for error sentences.

    Raises:
        VlmpruneError: two of them want what a view has but once.
    """
    wanted = [stage.reads(depth, feature) for stage in stages]
    semantic = [one.semantic for one in wanted if one.semantic is not None]
    if len(semantic) > 1:
        raise VlmpruneError(
            f"the stages of {who} each send tokens of their own through the encoder; chain only "
            "one that does."
        )
    once: dict[str, Any] = {}
    for name, what in (
        ("relevance", "the relevance by another source"),
        ("asked", "the relevance to another text"),
        ("keys", "the keys of another layer"),
        ("patches", "the patches' attention in another layer"),
        ("joined", "the joined heads of another layer"),
    ):
        values = {getattr(one, name) for one in wanted} - {getattr(Reads(), name)}
        if len(values) > 1:
            given = ", ".join(sorted(map(str, values)))
            raise VlmpruneError(
                f"the stages of {who} each want {what} ({given}); give all the same."
            )
        if values:
            once[name] = values.pop()
    return Reads(
        layers=tuple(sorted({layer for one in wanted for layer in one.layers})),
        projected=any(one.projected for one in wanted),
        states=tuple(sorted({layer for one in wanted for layer in one.states})),
        question=any(one.question for one in wanted),
        semantic=semantic[0] if semantic else None,
        **once,
    )


def select_in_turn(stages: Sequence[Method], view: EncoderView, who: str) -> Selection:
    """Choose by each stage in turn, the later ones among merged features; roles of the last.

    Args:
        stages: left to right, one or more.
        view: what the first of them sees.
        who: the chain, for error sentences.

    Raises:
        VlmpruneError: two stages merge.
    """
    before: Selection | None = None
    for stage in stages:
        selection = stage.select(view)
        if selection.merge is not None:
            if before is not None and before.merge is not None:
                raise VlmpruneError(
                    f"{stage!r} is not the only stage of {who} that merges visual tokens; chain "
                    "only one that does."
                )
            view = seen_after(view, selection.merge)
        if selection.tokens is not None and view.projected is not None:
            made = selection.tokens.detach().to(view.projected)
            shown = torch.where(selection.kept[..., None], made, view.projected)
            view = replace(view, projected=shown)
        if before is not None:
            selection = narrowed(selection, before)
        view = view.narrow(selection.kept)
        before = selection
    return selection
