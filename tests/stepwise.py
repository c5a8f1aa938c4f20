"""The reference for rows dropped between decoder layers: one sample, layer by layer, no cache.

Written apart from the library: the host's own layers are called one after the other on the rows
that are left, with a mask and positions made here, and attention weights read from eager attention.
New tokens are run along with the prompt, which they cannot change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tiny import IMAGE, Request


@dataclass
class Seen:
    """The prompt's rows at the input of a layer.

    Attributes:
        hidden: [R, D].
        images: image of each row, -1 for text.
        attention: [R, R] of the layer before, averaged over heads; None before any.
        own: [R, R] as this layer would attend.
        keys: [R, H · D] of the layer before, after rotary embedding.
        first: hidden and images at the input of layer 0.
        normed: [R, D] behind the norm that follows the last layer.
    """

    hidden: Tensor
    images: list[int]
    attention: Tensor | None
    own: Callable[[], Tensor]
    keys: Tensor | None
    first: tuple[Tensor, list[int]]
    normed: Tensor


# Rows that go on, as the places that they had, and their states; None lets all go on.
Decide = Callable[[int, Seen], tuple[list[int], Tensor] | None]


@dataclass
class Outcome:
    """Attributes:
    logits: [n, vocabulary] from the prompt's last token on.
    reached: by layer, for each image the numbers of the visual tokens that are left, in the
        order in which they stand.
    """

    logits: Tensor
    reached: dict[int, list[list[int]]]


@torch.no_grad()
def stepwise(
    built: Any, ids: Tensor, pixels: Tensor, prompt: int, decide: Decide, compact: bool
) -> Outcome:
    """Run a sample.

    Args:
        built: a LLaVA with eager attention.
        ids: [L] without padding, the prompt and what was generated.
        pixels: of its images.
        prompt: length of the prompt.
        decide: what goes on into each layer, among the prompt's rows.
        compact: whether rows that are left are renumbered.
    """
    decoder = built.get_decoder()
    hidden = built.get_input_embeddings()(ids).clone()
    found = (ids == IMAGE).nonzero()[:, 0].tolist()
    images, numbers = [-1] * len(ids), [-1] * len(ids)
    if found:
        features = [f.reshape(-1, hidden.shape[-1]) for f in _features(built, pixels)]
        hidden[found] = torch.cat(features)
        flat = [(i, n) for i, f in enumerate(features) for n in range(len(f))]
        for place, (image, number) in zip(found, flat, strict=True):
            images[place], numbers[place] = image, number
    first = (hidden[:prompt], images[:prompt])
    positions = list(range(len(ids)))
    attention = keys = None
    reached = {}
    for index, layer in enumerate(decoder.layers):
        count = sum(p < prompt for p in positions)
        at = range(len(positions)) if compact else positions
        seen = Seen(
            hidden[:count],
            images[:count],
            None if attention is None else attention[:count, :count],
            lambda layer=layer, hidden=hidden, at=at: _run(decoder, layer, hidden, at)[1],
            None if keys is None else keys[:count],
            first,
            decoder.norm(hidden[:count]),
        )
        decided = decide(index, seen) if index else None
        if decided is not None:
            rows = decided[0] + list(range(count, len(positions)))
            hidden = torch.cat((decided[1], hidden[count:]))
            # Places stay in order, whatever stands in them.
            positions = sorted(positions[r] for r in rows)
            images, numbers = [images[r] for r in rows], [numbers[r] for r in rows]
        pictures = range(max(images) + 1)
        reached[index] = [
            [n for n, one in zip(numbers, images, strict=True) if one == image]
            for image in pictures
        ]
        at = range(len(positions)) if compact else positions
        hidden, attention, keys = _run(decoder, layer, hidden, at)
    after = positions.index(prompt - 1)
    return Outcome(built.lm_head(decoder.norm(hidden[after:])), reached)


def _features(built: Any, pixels: Tensor) -> Any:
    return built.get_image_features(pixel_values=pixels).pooler_output


def _run(decoder: Any, layer: Any, hidden: Tensor, at: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output, its attention averaged over heads, and its keys."""
    states, positions = hidden[None], torch.tensor([list(at)])
    angles = decoder.rotary_emb(states, positions)
    count = len(hidden)
    mask = torch.full((count, count), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    weights: list[Tensor] = []
    hook = layer.self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
    try:
        out = layer(states, attention_mask=mask, position_embeddings=angles)
    finally:
        hook.remove()
    keys = layer.self_attn.k_proj(layer.input_layernorm(states))
    keys = keys.view(1, count, -1, layer.self_attn.head_dim).transpose(1, 2)
    keys = apply_rotary_pos_emb(keys, keys, *angles)[1]
    out = out[0] if isinstance(out, tuple) else out
    return out[0], weights[0][0].mean(dim=0), keys[0].transpose(0, 1).flatten(1)


def samples(req: Request, images: list[int], new: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """Each row's ids without padding (with those generated), its pixels, its prompt's length."""
    mask, out, start = req.inputs["attention_mask"].bool(), [], 0
    for row, count in enumerate(images):
        ids = req.inputs["input_ids"][row][mask[row]]
        pixels = req.inputs["pixel_values"][start : start + count]
        out.append((torch.cat((ids, new[row])), pixels, len(ids)))
        start += count
    return out
