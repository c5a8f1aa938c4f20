"""The page on training has the figures that were measured, and a step's bytes are counted right."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import render
import training_steps
from page_parts import DOCS, RESULTS


def test_the_page_shows_what_was_measured() -> None:
    page = (DOCS / "training-with-pruning.md").read_text("utf-8")
    assert render.render(page, render.training_page(RESULTS)) == page
    found = json.loads((RESULTS / "training.json").read_text("utf-8"))
    assert training_steps.lines(found) in page
    held = found["bytes_held"]
    assert all(held[name] < held["unpruned"] for name in held if name != "unpruned")


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_held_is_counted_once_and_without_weights(shared: bool) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8, 8))

        def forward(self, states: torch.Tensor) -> Any:
            # Each product holds its factors: 16 x 8 float32, once where they are the same.
            other = states if shared else states.clone()
            return (states @ self.weight).sum() + (other.T @ other).sum()

    module = Two()
    held = training_steps.Held(module)
    states = torch.ones(16, 8, requires_grad=True)
    with training_steps._noting(held):
        module(states)
    assert held.bytes == (1 if shared else 2) * 16 * 8 * 4
