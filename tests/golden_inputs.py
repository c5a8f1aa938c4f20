"""Inputs and weights of the golden files, from seeds: the same here and where the releases run.

`numpy.random.RandomState` gives the same numbers in every version of NumPy. Nothing of a host is
named but parameters and sizes, whose names are those of Transformers' Llama and CLIP of all years.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# A decoder: width, heads, vocabulary, text before and behind an image.
WIDTH, HEADS, HIDDEN, VOCABULARY = 32, 4, 64, 40
BEFORE, BEHIND = 7, 14
# SparseVLM's code counts on LLaVA-1.5's prompt of 664 tokens.
SPARSE_BEFORE, SPARSE_BEHIND, SPARSE_IMAGE = 35, 53, 576
# A tower: 24 x 24 patches in 24 layers, as the releases' code counts on.
LAYERS, SIDE, PATCH, TOWER_HEADS = 24, 24, 2, 4
EPSILON = 1e-5
# The same by the names that configs of Llama and CLIP have for them; layers of a decoder vary.
DECODER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": EPSILON,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": TOWER_HEADS,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
}
# How sharp PruMerge's tower attends, so that there are outliers; (rows, columns) of crops.
PRUMERGE_PEAK, NEXT_GRID = 1.5, (2, 2)
# Tokens that ToMe's release merges in each of 23 layers, by how many of 576 are left.
TOME_MERGES = {
    144: [19] * 18 + [18] * 5,
    346: [10] * 23,
}


def _drawn(name: str, *shape: int) -> Any:
    """Normal numbers in float64, by name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def _single(values: Any) -> Tensor:
    """In float32. What is reckoned here is float64 before, so that machines agree in each bit."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def normal(name: str, *shape: int) -> Tensor:
    """Normal numbers in float32, by name."""
    return _single(_drawn(name, *shape))


def whole(name: str, count: int, below: int) -> Tensor:
    """[count] int64 numbers from 2 on, by name."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(state.randint(2, below, count))


@torch.no_grad()
def fill(module: nn.Module, seed: str, peak: float = 1.0) -> None:
    """Weights by the names of parameters, large enough that attention is far from even.

    Args:
        module: a decoder or a tower.
        seed: of all its weights.
        peak: factor of queries and keys.
    """
    for name, weight in module.named_parameters():
        plain = name.removeprefix("vision_model.")
        drawn = _drawn(f"{seed} {plain}", *weight.shape)
        if "norm" in plain or "layrnorm" in plain:
            drawn = np.exp(drawn * 0.3) if plain.endswith("weight") else drawn * 0.1
        elif weight.ndim == 1 and "embedding" not in plain:
            drawn = drawn * 0.1
        elif "embedding" not in plain and "embed_tokens" not in plain:
            drawn = drawn * 0.8 / weight[0].numel() ** 0.5
            if "q_proj" in plain or "k_proj" in plain:
                drawn = drawn * peak
        weight.copy_(_single(drawn))


def pixels(name: str, crops: int) -> Tensor:
    """[crops, 3, 48, 48] pixels that differ from place to place."""
    side = SIDE * PATCH
    coarse = _drawn(name, crops, 3, 4, 4).repeat(side // 4, axis=2).repeat(side // 4, axis=3)
    return _single(coarse + 0.5 * _drawn(f"{name} fine", crops, 3, side, side))


def projector() -> nn.Sequential:
    """LLaVA's two linear layers."""
    made = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    fill(made, "projector")
    return made.eval()


def visual(name: str, count: int) -> Tensor:
    """[count, WIDTH] embedded visual tokens: a few kinds, mixed."""
    kinds = _drawn(f"{name} kinds", 8, WIDTH)
    weights = np.exp(_drawn(f"{name} weights", count, 8) * 1.5)
    mixed = (weights / weights.sum(axis=1, keepdims=True)) @ kinds
    return _single((mixed + 0.4 * _drawn(f"{name} noise", count, WIDTH)) * 1.3)


def checksum(*tensors: Tensor) -> str:
    """A short word for what the inputs are, stored beside the outputs."""
    total = 0
    for one in tensors:
        total = zlib.crc32(one.contiguous().numpy().tobytes(), total)
    return f"{total:08x}"
