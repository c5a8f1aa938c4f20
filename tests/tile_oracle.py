"""Hosts of tiles and squares, told to overlook what pruning drops."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo import FILES, ZOO
from zoo.base import IMAGE

_FILES = ("internvl", "idefics3", "aya_vision", "llama4", "gemma3", "paligemma")
NAMES = [name for file in _FILES for name in FILES[file].FAMILIES if name in ZOO]
STEPS = 5


def generate(built: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    settings = {"max_new_tokens": STEPS, "do_sample": False, **more}
    return built.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


def dropped_columns(ids: Tensor, kept: list[Tensor], lengths: list[int]) -> Tensor:
    """[B, L] bool from what a report kept; items follow one another along the placeholders."""
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    rows, columns = (ids == IMAGE).nonzero(as_tuple=True)
    parts = zip(rows.split(lengths), columns.split(lengths), kept, strict=True)
    for row, places, stays in parts:
        goes = torch.ones(len(places), dtype=torch.bool)
        goes[stays] = False
        dropped[row[goes], places[goes]] = True
    return dropped


def dropped_by(handle: Any, ids: Tensor) -> Tensor:
    report = handle.report
    return dropped_columns(ids, report.kept, [len(one.labels) for one in report.layouts])


def masked_inputs(inputs: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """The full request told to overlook columns, at the positions that columns had."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs | {"attention_mask": mask * ~dropped, "position_ids": positions}


def rows_of(name: str) -> list[list[Any]]:
    return [["image", "image"], ["image"], ["image"] if ZOO[name].images_first else []]


@contextmanager
def moved_features(built: Any, order: Tensor) -> Iterator[None]:
    """The host's features in the order that its placeholders were moved to."""
    base = built.base_model
    original = base.get_image_features

    @functools.wraps(original)
    def moved(*args: Any, **kwargs: Any) -> Any:
        out = copy.copy(original(*args, **kwargs))
        name = "last_hidden_state" if out.pooler_output is None else "pooler_output"
        features = getattr(out, name)
        out[name] = features.reshape(-1, features.shape[-1])[order][None]
        return out

    base.get_image_features = moved
    try:
        yield
    finally:
        del base.get_image_features
