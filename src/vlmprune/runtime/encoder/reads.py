"""What a method wants to read of a vision tower: collected, and refused where it cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.media import Encoder, Medium
from vlmprune.hosts.families.record import Family
from vlmprune.method import Method
from vlmprune.views import Reads

# Layers of a tower of which a method is asked what it would read of one.
_USUAL = 24


def check(model: nn.Module, family: Family, method: Method) -> None:
    """Refuse, at attach, a method that looks at attention which no tower of a family has.

    Raises:
        VlmpruneError: it does.
    """
    why = next((one.unattended for one in family.media if one.unattended), "")
    if not why or not method.shortens:
        return
    if not method.attends and not _looks(method.reads(_USUAL, _USUAL - 2)):
        return
    raise VlmpruneError(
        f"{type(model).__name__} {why}, and {method!r} chooses by what a vision encoder's layers "
        "do; use a method that chooses by the visual tokens themselves, such as DivPrune, or one "
        "that acts inside the language model, such as FastV."
    )


def _looks(reads: Reads) -> bool:
    """Whether something is read of an encoder's layers."""
    single = any(layer is not None for layer in reads.single)
    return bool(reads.layers or reads.states) or single or reads.semantic is not None


def wanted(
    model: nn.Module,
    media: Sequence[Medium],
    inputs: Sequence[Mapping[str, Any]],
    present: Sequence[bool],
    asked: Callable[[int, int], Reads] | None,
    who: str,
) -> Reads:
    """What a method wants to read of this request's towers.

    Args:
        model: the host.
        media: the family's modalities.
        inputs: for each of them the request's inputs.
        present: for each of them whether the request brings any.
        asked: `Pruner.reads`; None for nothing.
        who: the method, for error sentences.

    Raises:
        VlmpruneError: it asks for layers that there are not, or that see parts of an image alone.
    """
    found: Reads | None = None
    for number, medium in enumerate(media):
        if asked is None or not present[number]:
            continue
        encoder = medium.encoder(model, inputs[number])
        reads = asked(len(encoder.layers), encoder.feature)
        _check_reads(reads, encoder, type(model).__name__, who)
        if found is not None and reads != found:
            raise VlmpruneError(
                f"{who} reads other layers of images than of videos, whose towers differ in "
                f"{type(model).__name__}; send them in requests of their own."
            )
        found = reads
    return found or Reads()


def also(reads: Reads) -> list[str]:
    """What was read beside the family's own score, for people."""
    found = []
    if reads.layers:
        numbers = sorted(reads.layers)
        some = f"layers {numbers[0]} to {numbers[-1]}" if numbers[1:] else f"layer {numbers[0]}"
        found.append(f"attention of encoder {some}")
    if reads.patches is not None:
        found.append(f"attention among patches, encoder layer {reads.patches}")
    if reads.keys is not None:
        found.append(f"keys of encoder layer {reads.keys}")
    if reads.joined is not None:
        found.append(f"attention and keys of encoder layer {reads.joined}, all heads as one")
    if reads.states:
        numbers = sorted(reads.states)
        some = f"layers {', '.join(map(str, numbers))}" if numbers[1:] else f"layer {numbers[0]}"
        found.append(f"states behind encoder {some}")
    if reads.semantic is not None:
        found.append(f"{len(reads.semantic)} semantic tokens beside the patches")
    return found + ["projected features"] * reads.projected


def blank(calls: Sequence[Tensor]) -> list[Tensor]:
    """No attention to tokens [..., C], where nothing attends, or states were kept of before."""
    return [one.new_zeros(one.shape[:-1], dtype=torch.float32) for one in calls]


def _check_reads(reads: Reads, encoder: Encoder, cls: str, who: str) -> None:
    depth = len(encoder.layers)
    attended = {*reads.layers, *(n for n in (reads.patches, reads.joined) if n is not None)}
    every = {*attended, *reads.states, *([] if reads.keys is None else [reads.keys])}
    missing = sorted(layer for layer in every if not 0 <= layer < depth)
    if missing:
        raise VlmpruneError(
            f"{who} reads encoder layers {', '.join(map(str, missing))}, but the vision tower of "
            f"{cls} has layers 0 to {depth - 1}; change the method's settings."
        )
    narrow = sorted(attended - encoder.whole)
    if narrow:
        raise VlmpruneError(
            f"{who} reads the attention of encoder layers {', '.join(map(str, narrow))}, which "
            f"see windows alone in {cls}; set it to layers that see whole images "
            f"({', '.join(map(str, sorted(encoder.whole)))}) or use another method."
        )


def check_calls(calls: list[Tensor], attention: list[Tensor], name: str | int, who: str) -> None:
    """Refuse a layer that sees other tokens than the one whose attention scores.

    Args:
        calls: what was seen in it, call by call.
        attention: the scores, call by call.
        name: number of the layer, or what of it is wanted.
        who: the method.

    Raises:
        VlmpruneError: their numbers differ.
    """
    tokens = [sum(call.shape[0] * call.shape[1] for call in part) for part in (calls, attention)]
    if tokens[0] != tokens[1]:
        where = f"encoder layer {name}" if isinstance(name, int) else f"its {name} layer"
        raise VlmpruneError(
            f"{who} reads {where}, which sees {tokens[0]} tokens where {tokens[1]} are due, so "
            "vlmprune cannot follow it; set it to another layer or use another method."
        )
