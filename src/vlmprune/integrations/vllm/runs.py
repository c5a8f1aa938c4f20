"""Placeholders that stand in several runs, and prompts as they would be without pruning.

Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.integrations.vllm.host import Served
from vlmprune.pruner import Pruner
from vlmprune.select.budget import each_crop


@dataclass(frozen=True)
class Whole:
    """A prompt with all visual tokens.

    Attributes:
        tokens: its ids.
        features: its images and videos, at their new places.
        places: [n] int64; of each token of the pruned prompt its place here. The visual tokens of
            a run, whose own places are not known before they are encoded, all have that of its
            first.
    """

    tokens: list[int]
    features: list[Any]
    places: Tensor


def unpruned(
    tokens: list[int], features: Sequence[Any], counts: Sequence[tuple[int, int]]
) -> Whole:
    """Put the placeholders back that pruning takes out of a prompt.

    Args:
        tokens: ids of the pruned prompt.
        features: its images and videos in vLLM's form. Where placeholders stand in several runs,
            as those of a video's frames may, all runs are of one length.
        counts: for each of them its visual tokens without pruning and with it.
    """
    given = sorted(zip(features, counts, strict=True), key=lambda pair: pair[0].mm_position.offset)
    whole: list[int] = []
    places: list[int] = []
    found: list[Any] = []
    done = 0

    def copy(stop: int) -> None:
        nonlocal done
        places.extend(range(len(whole), len(whole) + stop - done))
        whole.extend(tokens[done:stop])
        done = stop

    for feature, (before, after) in given:
        place = feature.mm_position
        copy(place.offset)
        start = len(whole)
        mask = place.is_embed
        mask = torch.ones(place.length, dtype=torch.bool) if mask is None else mask
        edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        lengths = {stop - first for first, stop in runs}
        if int(mask.sum()) != after or len(lengths) > 1 or before % max(1, len(runs)):
            raise RuntimeError(
                f"one {feature.modality} has placeholders in runs of {sorted(lengths)} where "
                f"{after} of {before} visual tokens are due; please report this."
            )
        for first, stop in runs:
            copy(place.offset + first)
            places.extend([len(whole)] * (stop - first))
            whole.extend([tokens[done]] * (before // len(runs)))
            done = place.offset + stop
        copy(place.offset + place.length)
        wide = replace(place, offset=start, length=len(whole) - start, is_embed=None)
        found.append(replace(feature, mm_position=wide))
    copy(len(tokens))
    return Whole(whole, found, torch.tensor(places, dtype=torch.long))


def each_run(mask: Tensor, keep: int) -> Tensor:
    """[n] bool; places that are left, of placeholders in several runs as many of each.

    Args:
        mask: [n] bool; which are placeholders.
        keep: how many of them are left.
    """
    edges = torch.nn.functional.pad(mask.int(), (1, 0)).diff() > 0
    runs = int(edges.sum())
    if keep % max(1, runs):
        raise RuntimeError(f"{keep} visual tokens do not go into {runs} runs; please report this.")
    places = mask.int().cumsum(0)
    before = torch.where(edges, places - 1, 0).cummax(0).values
    return ~mask | (places - before <= keep // max(1, runs))


class Apart(Served):
    """Videos whose frames stand apart in the prompt, so that each has a number of its own."""

    def fits(self, method: Pruner | None) -> None:
        """Refuse budgets that let a frame have more than another.

        Raises:
            VlmpruneError: one sentence names the method and the way out.
        """
        for stage in () if method is None else method.links:
            if not each_crop(getattr(stage, "budget", "crop")):
                raise VlmpruneError(
                    f"{stage!r} has one budget for all frames of a video, which stand apart in "
                    "this model's prompt, so that the number of each must be known before; use a "
                    "method with budget='crop', or send no videos."
                )

    def placeholders(self, embeds: Tensor, after: int) -> Tensor:
        """As many of each frame."""
        return each_run(embeds, after)
