"""Samples packed into rows of one forward, as collators without padding make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts.families import FAMILIES
from zoo import Entry, Request
from zoo.base import IMAGE, VIDEO

# Inputs with one value a column.
COLUMNS = ("input_ids", "labels", "token_type_ids", "mm_token_type_ids")
# Families whose pixels have a dimension for the rows before that of the images.
BY_ROW = ("Idefics3", "SmolVLM")


def samples(
    entry: Entry, built: Any, images: Sequence[int], text: Sequence[int] = (3, 4, 5)
) -> list[Request]:
    """One request a sample: how many images it holds, and words behind them."""
    return [
        entry.request(built, [["image"] * n], text=words, seed=20 + i)
        for i, (n, words) in enumerate(zip(images, text, strict=True))
    ]


def alone(built: Any, one: Request) -> dict[str, Any]:
    """A sample by itself, with positions and without a mask."""
    inputs = {k: v for k, v in one.inputs.items() if k != "attention_mask"}
    return inputs | {"position_ids": positions(built, one), "use_cache": False}


def packed(
    built: Any, requests: Sequence[Request], rows: Sequence[int], by_row: bool = False
) -> dict[str, Any]:
    """A forward of several samples in a row.

    Args:
        built: the model.
        requests: a sample each.
        rows: how many of them stand in each row, whose lengths must then be equal.
        by_row: whether pixels have a dimension for the rows.
    """
    every = [alone(built, one) for one in requests]
    out: dict[str, Any] = {"use_cache": False}
    for name in every[0].keys() - out.keys():
        parts = [one[name] for one in every]
        if name in COLUMNS or name == "position_ids":
            split, at = list[Tensor](), 0
            for count in rows:
                split.append(torch.cat(parts[at : at + count], dim=-1))
                at += count
            out[name] = torch.cat(split, dim=-2)
            continue
        # Pictures of a processor's batch are as large as its largest.
        most = [max(p.shape[d] for p in parts) for d in range(1, parts[0].ndim)]
        sizes = [
            [n for a, b in zip(most[::-1], p.shape[:0:-1], strict=True) for n in (0, a - b)]
            for p in parts
        ]
        if by_row:
            sizes = [[*size[:-2], 0, 0] for size in sizes]
        filled = [nn.functional.pad(p, size) for p, size in zip(parts, sizes, strict=True)]
        out[name] = torch.cat(filled, dim=int(by_row))
    return out


def positions(built: Any, one: Request) -> Tensor:
    """[1, L] positions of a sample, or [4, 1, L] where the model has three and one for packing."""
    ids = one.inputs["input_ids"]
    columns = torch.arange(ids.shape[1])[None]
    family = FAMILIES[built.config.model_type]
    if family.rope is None:
        return columns + family.first
    tokens = {"image": IMAGE, "video": VIDEO}
    visual = [ids == tokens[medium.kind] for medium in family.media]
    brought = [
        {k: v for k, v in one.inputs.items() if k in (*medium.inputs, "mm_token_type_ids")}
        if there.any()
        else {}
        for medium, there in zip(family.media, visual, strict=True)
    ]
    found = family.rope(built, ids, torch.ones_like(ids), brought, True)
    return torch.cat((columns[None], found))
