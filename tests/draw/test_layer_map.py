"""What a call kept layer by layer: worked out by hand, and drawn."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from vlmprune.draw import layer_map
from vlmprune.report import LayerReport, Report, RowsReport


def report(layers: list[Any], after: int, roles: Any = ()) -> Report:
    """Of a request with 8 visual tokens."""
    plain = Report("method", "original", "", [], 8, after, 0, 0.0, 0.0, 0, 0, 0.0)
    return replace(plain, layers=layers, roles=list(roles))


def cut(index: int, kept: list[str]) -> LayerReport:
    """A layer of which each head's cache keeps the tokens marked 1."""
    mask = torch.tensor([[[mark == "1" for mark in head] for head in kept]])
    return LayerReport(index, [0.5], [0.5], mask, torch.zeros(1, mask.shape[2]), 0, 0, 0)


def test_shares_are_of_all_tokens_that_there_were() -> None:
    # Six of eight tokens reached the language model; its layer 2 has no cache.
    layers = [cut(1, ["110000", "111100"]), cut(3, ["100000", "000000"])]
    assert layer_map.shares(report(layers, 6), [True, True, False, True]) == [
        [0.75, 0.75],
        [0.25, 0.5],
        [],
        [0.125, 0.0],
    ]
    assert layer_map.shares(report([], 6), [True] * 4) == []
    assert layer_map.shares(report([RowsReport(1, [torch.arange(2)], 0)], 2), [True] * 2) == []


def test_tokens_that_reach_each_layer() -> None:
    # Two pictures: of six tokens one and two went before layer 1, and two more before layer 2.
    rows = [
        RowsReport(1, [torch.arange(2), torch.arange(1)], 0),
        RowsReport(2, [torch.arange(1), torch.arange(0)], 0),
    ]
    gone = torch.tensor([True, True, False])
    roles = [
        {"left before layer 1": torch.tensor([True, False, False]), "left before layer 2": gone},
        {"left before layer 1": gone, "left before layer 2": torch.tensor([True, False, False])},
    ]
    assert layer_map.reached(report(rows, 1, roles), 4) == [6, 3, 1, 1]
    assert layer_map.reached(report([], 8), 4) == []
    assert layer_map.reached(report([cut(0, ["1" * 8])], 8), 4) == []


def test_colours_go_from_the_first_to_the_last() -> None:
    ramp = layer_map.RAMP
    assert [layer_map.colour(i / 4) for i in range(5)] == list(ramp)
    assert layer_map.colour(-1.0) == ramp[0] and layer_map.colour(1.5) == ramp[-1]
    halfway = tuple(round((a + b) / 2) for a, b in zip(ramp[0], ramp[1], strict=True))
    assert layer_map.colour(0.125) == halfway
    # The more is kept, the lighter.
    light = [sum(layer_map.colour(i / 20)) for i in range(21)]
    assert light == sorted(light)


def test_a_pixel_a_layer_and_head() -> None:
    with Image.open(io.BytesIO(layer_map.picture([[0.0], [0.25, 1.0], []]))) as one:
        assert one.format == "PNG" and one.size == (3, 2)
        grey = (128, 128, 128)
        assert [one.getpixel((x, 0)) for x in range(3)] == [*layer_map.RAMP[:2], grey]
        assert [one.getpixel((x, 1)) for x in range(3)] == [grey, layer_map.RAMP[-1], grey]
