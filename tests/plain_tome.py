"""ToMe restated: its matching on lists, and a tower that merges by itself."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from plain_layers import begun, single, tower_of


def matched(keys: list[list[float]], merge: int, cls: bool) -> list[list[int]]:
    """Bipartite soft matching on lists: for each new token the old ones that it is made of."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    even, odd = list(range(0, len(keys), 2)), list(range(1, len(keys), 2))
    edges = []
    for token in even:
        likeness = [cosine(keys[token], keys[other]) for other in odd]
        best = max(likeness)
        partner = odd[likeness.index(best)]
        edges.append((-float("inf") if cls and token == 0 else best, token, partner))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    stays = [token for _, token, _ in edges[merge:]]
    groups = {token: [token] for token in odd}
    for _, token, partner in edges[:merge]:
        groups[partner].append(token)
    return [[token] for token in (sorted(stays) if cls else stays)] + [groups[t] for t in odd]


def plain_tower(
    built: Any,
    pixels: Tensor,
    merges: list[int],
    weigh: bool = True,
    cells: list[list[int]] | None = None,
) -> tuple[Tensor, list[list[list[int]]]]:
    """The tower up to its feature layer, token by token; groups of cells, and each patch's state.

    Written apart from the library: loops over tokens, attention by a softmax over all logits.

    Args:
        built: the host.
        pixels: of its crops.
        merges: cells that merge away in each layer.
        weigh: whether attention counts a token as often as it has patches.
        cells: the patches of each cell; every patch by itself where it is None.

    Returns:
        States [crops, patches (+ CLS), C], members of a group alike, patch by patch of a cell; for
        each crop the groups.
    """
    tower, layers, heads, cls = tower_of(built)
    results, found = [], []
    for crop in begun(tower, pixels):
        own = cells or single(len(crop) - cls)
        # A unit is the CLS token, or a cell; its tokens have a state each and one size.
        units = [[0]] * cls + [[patch + cls for patch in cell] for cell in own]
        groups = [[unit] for unit in range(len(units))]
        tokens = [crop[unit] for unit in units]
        for layer, merge in zip(layers, merges, strict=False):
            sizes = [len(group) for group, unit in zip(groups, tokens, strict=True) for _ in unit]
            bias = torch.tensor([log(size) for size in sizes]) if weigh else None
            lengths = [len(unit) for unit in tokens]
            states, _, keys = layer.attend(torch.cat(tokens), heads, bias)
            tokens = list(states.split(lengths))
            if merge:
                ends = keys.mean(dim=0).split(lengths)
                wide = max(lengths)
                flat = [(end.repeat(wide // len(end), 1)).flatten().tolist() for end in ends]
                made, joined = [], []
                for members in matched(flat, merge, cls):
                    size = sum(len(groups[i]) for i in members)
                    made.append(sum(tokens[i] * len(groups[i]) for i in members) / size)
                    joined.append([unit for i in members for unit in groups[i]])
                tokens, groups = made, joined
            lengths = [len(unit) for unit in tokens]
            tokens = list(layer.feed(torch.cat(tokens)).split(lengths))
        full = torch.empty_like(crop)
        for states, group in zip(tokens, groups, strict=True):
            for unit in group:
                full[units[unit]] = states
        results.append(full)
        found.append([[u - cls for u in group] for group in groups if group != [0] or not cls])
    return torch.stack(results), found
