"""Encoder layers that a method reads and that do not see what the scored one sees."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch

from answers import generate
from tiny import model, request
from vlmprune import VisionZip, VlmpruneError, VtcCls
from vlmprune.hosts.families import FAMILIES, register
from zoo import ZOO


def test_a_layer_that_sees_another_number_of_tokens_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One token more in the first layer, as a register that the next one lacks."""
    built = model()
    inputs = request(built, [1]).inputs
    first = built.model.vision_tower.encoder.layers[0]
    own = type(first).forward

    @wraps(own)
    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not first:
            return own(self, hidden_states, *args, **kwargs)
        longer = torch.cat((hidden_states, hidden_states[:, -1:]), dim=1)
        return own(self, longer, *args, **kwargs)[:, :-1]

    monkeypatch.setattr(type(first), "forward", forward)
    said = (
        r"^VtcCls\(.* reads encoder layer 0, which sees 18 tokens where 17 are due, so vlmprune can"
    )
    with VtcCls(keep=4, first_layer=0)(built), pytest.raises(VlmpruneError, match=said):
        generate(built, inputs)


def test_towers_that_differ_are_not_read_in_one_request(own_records: None) -> None:
    """A record from outside, of a host that takes videos' features of another layer."""
    family = FAMILIES["llava_next_video"]
    images, videos = family.media

    class Shallow(type(videos)):  # type: ignore[misc]
        def feature_layer(self, model: Any, inputs: Any) -> int:
            return 0

    register("llava_next_video", replace(family, media=(images, Shallow())), replace=True)
    built = ZOO["llava_next_video"].build()
    inputs = ZOO["llava_next_video"].request(built, [["image", "video"]]).inputs
    said = (
        r"^VisionZip\(.* reads other layers of images than of videos, whose towers differ in "
        f"{type(built).__name__}; send them in requests of their own"
    )
    with VisionZip(keep=4)(built), pytest.raises(VlmpruneError, match=said):
        generate(built, inputs)
