"""EViT restated: a tower in which tokens leave by loops over tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plain_layers import begun, single, tower_of


def left_each_time(tokens: int, keep: int, times: int) -> list[int]:
    """Tokens behind each drop: the share that comes to `keep` in so many times, rounded up."""
    found = []
    for time in range(1, times + 1):
        # The smallest number of which no fewer are left than the share asks for, in whole numbers.
        number = keep
        while number**times < tokens ** (times - time) * keep**time:
            number += 1
        found.append(number)
    return found


def plain_tower(
    built: Any,
    pixels: Tensor,
    left: dict[int, int],
    feature: int,
    fuse: bool = True,
    cells: list[list[int]] | None = None,
    lowest: bool = False,
) -> tuple[Tensor, list[list[int]], list[Tensor]]:
    """The tower up to its feature layer and one behind it, crop by crop.

    Args:
        built: the host.
        pixels: of its crops.
        left: by layer, how many cells are left behind its attention.
        feature: the layer whose output becomes features.
        fuse: whether those that leave become a token.
        cells: the patches of each cell; every patch by itself where it is None.
        lowest: keep the least attended instead.

    Returns:
        States [crops, patches (+ CLS), C] behind the feature layer, zeros where patches left; the
        cells of each crop that are left; and for each crop the scores [patches] of the layer that
        a later method reads, 0 where they left.
    """
    tower, layers, heads, cls = tower_of(built)
    scored = feature if cls else len(layers) - 1
    results, kept, scores = [], [], []
    for crop in begun(tower, pixels):
        patches = len(crop) - cls
        own = cells or single(patches)
        here = list(range(len(own)))
        prefix, extra = crop[:cls], crop[:0]
        states = {patch: crop[cls + patch] for patch in range(patches)}
        for number, layer in enumerate(layers[: scored + 1]):
            order = sorted(states)
            given = torch.cat((prefix, torch.stack([states[p] for p in order]), extra))
            given, weights, _ = layer.attend(given, heads)
            row = weights.mean(dim=0)
            row = row[0] if cls else row.mean(dim=0)
            attended = {p: float(row[cls + i]) for i, p in enumerate(order)}
            if number == scored:
                scores.append(torch.tensor([attended.get(p, 0.0) for p in range(patches)]))
            prefix, extra = given[:cls], given[cls + len(order) :]
            states = {p: given[cls + i] for i, p in enumerate(order)}
            if number in left and left[number] < len(here):
                mean = {c: sum(attended[p] for p in own[c]) / len(own[c]) for c in here}
                best = sorted(here, key=lambda c: (mean[c] if lowest else -mean[c], c))
                here = sorted(best[: left[number]])
                stay = {p for c in here for p in own[c]}
                others = [states[p] * attended[p] for p in order if p not in stay]
                others += [one * float(row[-1]) for one in extra]
                extra = torch.stack(others).sum(dim=0)[None] if fuse else crop[:0]
                states = {p: states[p] for p in order if p in stay}
            order = sorted(states)
            given = layer.feed(torch.cat((prefix, torch.stack([states[p] for p in order]), extra)))
            prefix, extra = given[:cls], given[cls + len(order) :]
            states = {p: given[cls + i] for i, p in enumerate(order)}
            if number == feature:
                full = torch.zeros_like(crop)
                full[:cls] = prefix
                for p, state in states.items():
                    full[cls + p] = state
                results.append(full)
                kept.append(here)
    return torch.stack(results), kept, scores
