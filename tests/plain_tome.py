"""ToMe restated: its matching on lists, and a tower that merges by itself."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from zoo.base import scale_of


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


def linear(module: Any, *names: str) -> Any:
    """A projection by the name that a release gives it."""
    for name in names:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise AssertionError(names)


def plain_tower(
    built: Any, pixels: Tensor, merges: list[int], weigh: bool = True
) -> tuple[Tensor, list[list[list[int]]]]:
    """The tower up to its feature layer, token by token; groups of patches, and each one's state.

    Written apart from the library: loops over tokens, attention by a softmax over all logits.

    Returns:
        States [crops, patches (+ CLS), C], members of a group alike; for each crop the groups.
    """
    tower = built.model.vision_tower
    kind = built.config.vision_config.model_type
    cls = kind != "siglip_vision_model"
    embedded = tower.embeddings(pixels)
    embedded = tower.pre_layrnorm(embedded) if kind == "clip_vision_model" else embedded
    layers = tower.encoder.layer if kind == "dinov2" else tower.encoder.layers
    heads = built.config.vision_config.num_attention_heads
    results, found = [], []
    for states in embedded:
        groups = [[token] for token in range(len(states))]
        for layer, merge in zip(layers, merges, strict=False):
            if kind == "dinov2":
                norms, attention = (layer.norm1, layer.norm2), layer.attention
                after, behind = layer.layer_scale1, layer.layer_scale2
            else:
                norms, attention = (layer.layer_norm1, layer.layer_norm2), layer.self_attn
                after = behind = torch.nn.Identity()
            given = norms[0](states)
            q, k, v = (
                linear(attention, f"{short}_proj", f"attention.{long}")(given)
                .view(len(given), heads, -1)
                .transpose(0, 1)
                for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
            )
            logits = q @ k.transpose(1, 2) * scale_of(attention)
            if weigh:
                logits = logits + torch.tensor([log(len(group)) for group in groups])
            mixed = (logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)
            out = linear(attention, "out_proj", "o_proj", "output.dense")(mixed)
            states = states + after(out)
            if merge:
                tokens = matched(k.mean(dim=0).tolist(), merge, cls)
                merged = []
                for members in tokens:
                    size = sum(len(groups[i]) for i in members)
                    merged.append(sum(states[i] * len(groups[i]) for i in members) / size)
                states = torch.stack(merged)
                groups = [[p for i in members for p in groups[i]] for members in tokens]
            states = states + behind(layer.mlp(norms[1](states)))
        full = torch.empty_like(embedded[0])
        for state, group in zip(states, groups, strict=True):
            full[group] = state
        results.append(full)
        found.append([[p - cls for p in group] for group in groups if group != [0] or not cls])
    return torch.stack(results), found


def given_to_projector(built: Any, pruner: Any, inputs: Any) -> tuple[Tensor, Any]:
    """What the projector gets while a request is pruned, and the report."""
    seen: list[Tensor] = []
    hook = built.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad(), pruner(built) as handle:
        built(**inputs)
    hook.remove()
    # The contract proves the tower before anything merges in it.
    return seen[-1], handle.report
