"""Fields of what a host returns: one that is missing is told by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from tiny import model, request
from vlmprune import VisPruner, VlmpruneError


@dataclass
class Renamed(ModelOutput):
    """An encoder's output whose visual tokens have another name."""

    image_tokens: Tensor | None = None


def test_an_encoder_output_without_its_tokens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    inputs = request(built, [1]).inputs
    plain = type(built.model).get_image_features

    def features(self: Any, pixel_values: Tensor, **rest: Any) -> Renamed:
        return Renamed(image_tokens=plain(self, pixel_values, **rest).pooler_output)

    monkeypatch.setattr(type(built.model), "get_image_features", features)
    said = r"^Renamed of transformers \S+ has no pooler_output, which vlmprune reads; install "
    with VisPruner(keep=4)(built), torch.no_grad(), pytest.raises(VlmpruneError, match=said):
        built(**inputs)
