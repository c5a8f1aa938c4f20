"""Which projectors work cell by cell, so that features of merged cells can be projected anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmprune.runtime.family import family_of
from zoo import ZOO

# Of each family the modalities; those of all others are given several cells at once, and what
# merges there adds up what the host has projected.
CELLWISE = {
    "gemma4": ("image", "video"),
    "gemma4_small": ("image", "video"),
    "internvl": ("image",),
    "llava": ("image",),
    "llava_next": ("image",),
    "llava_next_video": ("image", "video"),
    "llava_onevision": ("image",),
    "paligemma": ("image",),
    "paligemma2": ("image",),
    "pixtral": ("image",),
    "video_llava": ("image", "video"),
}


@pytest.mark.parametrize("family", ZOO)
@torch.no_grad()
def test_a_projector_that_works_cell_by_cell_is_asked(family: str) -> None:
    model = ZOO[family].build()
    asked = []
    for medium in family_of(model).media:
        if medium.unattended or not medium.cellwise:
            continue
        asked.append(medium.kind)
        layers = medium.projector(model).modules()
        width = next(one.in_features for one in layers if isinstance(one, nn.Linear))
        features = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
        every = medium.project(model, features)
        assert every is not None and every.shape[0] == 5
        alone = medium.project(model, features[3:4])
        assert alone is not None and torch.allclose(alone, every[3:4], atol=1e-5)
        assert not torch.allclose(alone, every[2:3], atol=1e-3)
    assert tuple(asked) == CELLWISE.get(family, ())
