"""Kinds of methods, each with the full model that is told to overlook what the method leaves out.

One method stands for its kind: what each family makes of it is proved in
`tests/hosts/families/test_every_family.py`, and what a method chooses beside the method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hidden import hiding
from masked import masking
from step_masks import exchanged, masking_steps, masks_of
from stock import cache_of
from vlmprune import PLPHP, DivPrune, FastV, RandomTokens, Recall, VisPruner, ZipVL
from zipvl_reference import reference
from zoo import Request
from zoo_oracle import columns_of, dropped_columns, others, overlooking

Where = Literal["before", "between", "cache", "steps", "inside"]


@dataclass(frozen=True)
class Kind:
    """A kind of method.

    Attributes:
        some: a method of it that leaves tokens out.
        all: the same, or its like, with a budget that keeps every token.
        where: tokens leave before the language model, between its layers, inside a layer while the
            prompt is read, from its cache after the prompt, or from what a step reads of that.
    """

    some: Any
    all: Any
    where: Where


KINDS: dict[str, Kind] = {
    "by attention": Kind(VisPruner(keep=0.4), VisPruner(keep=1.0), "before"),
    "by features": Kind(DivPrune(keep=0.4), DivPrune(keep=1.0), "before"),
    "blind": Kind(RandomTokens(keep=0.4), RandomTokens(keep=1.0), "before"),
    "rows": Kind(FastV(keep=0.4, layer=1), FastV(keep=1.0, layer=1), "between"),
    "layers": Kind(ZipVL(0.6), ZipVL(1.0), "inside"),
    "cut": Kind(PLPHP(alpha=0.8, beta=0.6, per_head="adaptive"), PLPHP(r=1.0, dr=0.0), "cache"),
    "read": Kind(Recall(read=0.2, floor=0, rest="none", watch="tokens"), Recall(read=1.0), "steps"),
}


@contextmanager
def overlooked(
    kind: Kind,
    built: Any,
    req: Request,
    report: Any,
    found: Any,
    other: bool = False,
    since: int = 0,
) -> Iterator[dict[str, Any]]:
    """Let the full model overlook what a call left out; gives the request to hand it.

    Args:
        kind: of the method that was called.
        built: the model, without it.
        req: the request.
        report: of the call.
        found: what it returned, with its cache.
        other: overlook as many other tokens instead.
        since: the step with which a call's own begin, as those of a later turn do.
    """
    if kind.where == "before":
        kept = others(report) if other else None
        yield overlooking(built, req, dropped_columns(req, report, kept), report.positions)
    elif kind.where == "between":
        gone = {one.index: dropped_columns(req, report, one.kept) for one in report.layers}
        with hiding(built, {n: one.flip(1) if other else one for n, one in gone.items()}):
            yield req.inputs
    elif kind.where == "steps":
        visual = visual_columns(req, report)
        masks = masks_of(report.reading, visual, cache_of(found))[since:]
        with masking_steps(built, exchanged(masks, visual) if other else masks):
            yield req.inputs
    else:
        keep = {one.index: stays(req, report, one.kept) for one in report.layers}
        if other:
            visual = visual_columns(req, report)[:, None]
            keep = {n: torch.where(visual, swapped(one, visual), one) for n, one in keep.items()}
        if kind.where == "cache":
            with masking(built, keep):
                yield req.inputs
        else:
            with reference(built, {n: one[:, 0] for n, one in keep.items()}):
                yield req.inputs


def visual_columns(req: Request, report: Any) -> Tensor:
    """[B, L] bool; the visual tokens of a request."""
    out = torch.zeros_like(req.inputs["input_ids"], dtype=torch.bool)
    for row, columns in columns_of(req, [len(one.labels) for one in report.layouts]):
        out[row, columns] = True
    return out


def stays(req: Request, report: Any, kept: Any) -> Tensor:
    """[B, H, L] bool from what a layer's heads keep of each row's visual tokens."""
    visual = visual_columns(req, report)
    out = (~visual)[:, None].repeat(1, len(kept), 1)
    for head, rows in enumerate(kept):
        for row, own in enumerate(rows):
            out[row, head, visual[row].nonzero()[:, 0][own]] = True
    return out


def swapped(keep: Tensor, visual: Tensor) -> Tensor:
    """As many of the visual columns, from the other end."""
    return (keep & visual).flip(2).roll(1, 2)
