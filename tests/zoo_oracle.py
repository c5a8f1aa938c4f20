"""The full model of any family of the zoo, told to overlook what pruning drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from answers import generate
from shortened import is_recurrent, shortened
from vlmprune.hosts.families import FAMILIES
from zoo import ZOO, Request
from zoo.base import IMAGE, VIDEO

KNOWN = {name: entry for name, entry in ZOO.items() if entry.make().config.model_type in FAMILIES}


def columns_of(req: Request, lengths: list[int]) -> list[tuple[int, list[int]]]:
    """Row and columns of each item of a report, by walking along the prompt."""
    ids = req.inputs["input_ids"]
    free = {
        (row, token): (ids[row] == token).nonzero()[:, 0].tolist()
        for row in range(len(ids))
        for token in (IMAGE, VIDEO)
    }
    out = []
    for length in lengths:
        row = min(row for (row, _), columns in free.items() if columns)
        first = {token: free[row, token][0] for token in (IMAGE, VIDEO) if free[row, token]}
        token = min(first, key=lambda t: first[t])
        out.append((row, free[row, token][:length]))
        free[row, token] = free[row, token][length:]
    assert not any(free.values())
    return out


def dropped_columns(req: Request, report: Any, kept: list[Tensor] | None = None) -> Tensor:
    """[B, L] columns of visual tokens that a call did not keep."""
    dropped = torch.zeros_like(req.inputs["input_ids"], dtype=torch.bool)
    lengths = [len(layout.labels) for layout in report.layouts]
    for (row, columns), keep in zip(columns_of(req, lengths), kept or report.kept, strict=True):
        dropped[row, columns] = True
        dropped[row, [columns[i] for i in keep.tolist()]] = False
    return dropped


def others(report: Any) -> list[Tensor]:
    """As many tokens of each item as were kept, but others; what belongs to no cell stays."""
    out = []
    for layout, kept in zip(report.layouts, report.kept, strict=True):
        always = (layout.labels < 0).nonzero()[:, 0].tolist()
        cells = [i for i in range(len(layout.labels)) if i not in always]
        count = len(set(kept.tolist()) - set(always))
        chosen = [i for i in cells if i not in kept.tolist()]
        chosen += [i for i in cells if i in kept.tolist()]
        out.append(torch.tensor(sorted(always + chosen[:count])))
    return out


def three_positions(built: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[3, B, L] of a whole request, by the host's own rule."""
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
    grids = {n: inputs[n] for n in names if n in inputs}
    three, _ = built.base_model.get_rope_index(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], **grids
    )
    return three


def masked(built: Any, req: Request, dropped: Tensor, policy: str) -> Any:
    """The full model, told to overlook the dropped columns; recurrent ones are not given them."""
    if FAMILIES[built.config.model_type].rope is not None and is_recurrent(built):
        return shortened(built, req.inputs, dropped, three_positions(built, req.inputs))
    return generate(built, overlooking(built, req, dropped, policy))


def overlooking(built: Any, req: Request, dropped: Tensor, policy: str) -> dict[str, Any]:
    """The request as the full model takes it, told to overlook the dropped columns."""
    given = req.inputs["attention_mask"]
    mask = given * ~dropped
    if FAMILIES[built.config.model_type].rope is not None:
        text = (given.cumsum(1) - 1).clamp(min=0)
        positions = torch.cat((text[None], three_positions(built, req.inputs)))
    else:
        counted = given.bool() if policy == "original" else mask.bool()
        positions = (counted.long().cumsum(1) - 1).clamp(min=0)
    return req.inputs | {"attention_mask": mask, "position_ids": positions}
