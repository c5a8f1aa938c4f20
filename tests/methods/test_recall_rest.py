"""Recall with the mean of what a step does not read, in whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, distance, generate
from stock import cache_of
from tiny import model, request
from vlmprune import Recall, VisPruner, VlmpruneError

FEW: dict[str, Any] = {"read": 3, "floor": 0, "rest": "mean", "always": True}


def logits(out: Any, row: int) -> Tensor:
    return torch.stack([step[row] for step in out.logits])


def test_it_comes_nearer_to_the_unpruned_model() -> None:
    built = model()
    req = request(built, [1, 2, 1])
    bare = generate(built, req.inputs)
    with Recall(**FEW)(built):
        mean = generate(built, req.inputs)
    with Recall(**FEW | {"rest": "none"})(built):
        none = generate(built, req.inputs)
    assert torch.equal(mean.logits[0], bare.logits[0])
    assert DIFFERENT < distance(mean, bare) < distance(none, bare)
    with Recall(**FEW | {"read": 1.0})(built):
        assert distance(generate(built, req.inputs), bare) == 0


@pytest.mark.parametrize("store", ["device", "host"])
def test_a_padded_batch_is_as_its_samples(store: Any) -> None:
    built = model()
    images, text = [1, 2, 1], [9, 5, 7]
    batch = request(built, images, text=text)
    with Recall(**FEW, store=store, sketch="int8")(built):
        together = generate(built, batch.inputs)
        for row, count in enumerate(images):
            seen = batch.inputs["attention_mask"][row].bool()
            first = sum(images[:row])
            alone = {
                "input_ids": batch.inputs["input_ids"][row][seen][None],
                "attention_mask": torch.ones(1, int(seen.sum()), dtype=torch.long),
                "pixel_values": batch.inputs["pixel_values"][first : first + count],
            }
            apart = (logits(generate(built, alone), 0) - logits(together, row)).abs().max()
            assert apart < 1e-5


def test_behind_another_method_and_among_beams() -> None:
    built = model()
    req = request(built, [1, 2])
    for more in ({}, {"num_beams": 2, "do_sample": False}):
        found = {}
        for rest in ("none", "mean"):
            chain = VisPruner(keep=8) | Recall(**FEW | {"rest": rest})
            with chain(built) as handle:
                found[rest] = generate(built, req.inputs, **more)
            layer = cache_of(found[rest]).layers[0]
            assert (layer.prefix.total is None) == (rest == "none")
            assert handle.report.reading.share_read < 1
        assert distance(found["none"], found["mean"]) > DIFFERENT


def test_settings_that_are_none_are_refused() -> None:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "rest": ({"rest": "median"}, "^rest='median' is not known"),
        "always": ({"always": 1}, "^always=1 is not known; use True or False"),
        "sketch": (
            {"sketch": "exact", "store": "host"},
            '^sketch="exact" reads every key at each step, which store="host" would fetch; use ',
        ),
    }
    for settings, said in wrong.values():
        with pytest.raises(VlmpruneError, match=said):
            Recall(**settings)
    Recall(rest="none", always=True, sketch="exact", store="device")
