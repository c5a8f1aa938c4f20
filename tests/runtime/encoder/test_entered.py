"""What a method sees that knows placeholders alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vlmprune.runtime.encoder.entered import view_of


def test_runs_of_placeholders_are_crops_of_one_size() -> None:
    """Each run's embeddings are a crop's features, filled up to the longest with zeros."""
    embedded = torch.arange(1.0, 61).view(2, 10, 3)
    spans = [(0, slice(1, 4)), (0, slice(5, 9)), (1, slice(2, 3))]
    geometry: Any = SimpleNamespace(
        items=[
            SimpleNamespace(span=SimpleNamespace(row=row, columns=columns))
            for row, columns in spans
        ],
        cells=4,
        candidates=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool(),
        images=(0, 1, 2),
        layouts=[SimpleNamespace(grid=(1, n), kind="image") for n in (3, 4, 1)],
    )
    found: Any = SimpleNamespace(embedded=embedded)
    view = view_of(found, geometry).view
    assert view.features.shape == (3, 4, 3) and view.attention.shape == view.candidates.shape
    for features, real, (row, columns) in zip(view.features, view.candidates, spans, strict=True):
        assert torch.equal(features[real], embedded[row, columns])
        assert not features[~real].any()
    assert view.images == (0, 1, 2) and view.grids == ((1, 3), (1, 4), (1, 1))
