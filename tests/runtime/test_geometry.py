"""Where visual tokens lie in what the language model gets, worked out by hand."""

from __future__ import annotations

import torch

from vlmprune.runtime.geometry import VisualColumns, frames_of
from vlmprune.views.layout import Layout

LABELS = torch.tensor([0, 1, -1, 4, 5, -1, 8, -1])
VIDEO, IMAGE = Layout(LABELS, 3, (2, 2), kind="video"), Layout(torch.arange(4), 1, (2, 2))


def test_frames_of_a_layout() -> None:
    assert frames_of(VIDEO, torch.arange(8)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    some = torch.tensor([1, 3, 7])
    assert frames_of(VIDEO, some).tolist() == [0, 1, 2]
    assert frames_of(Layout(LABELS, 3, (2, 2)), some).tolist() == [0, 0, 0]


def test_columns_of_a_batch() -> None:
    """A video and an image in one row, the image's tokens in another order; one; and none."""
    visual = torch.tensor(
        [[0, 1, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    ).bool()
    numbers = [torch.tensor([1, 3, 4]), torch.tensor([3, 0]), torch.tensor([2])]
    columns = VisualColumns(visual, [[3, 2], [1], []], numbers, [VIDEO, IMAGE, IMAGE])
    assert columns.longest == 5
    assert columns.counts.tolist() == [[3, 2], [1, 0], [0, 0]]
    assert columns.images.tolist() == [
        [-1, 0, 0, 0, -1, 1, 1, -1],
        [-1, -1, -1, 0, -1, -1, -1, -1],
        [-1] * 8,
    ]
    # The image is the frame behind the last of which the video has a token.
    assert columns.frames[0].tolist() == [-1, 0, 1, 1, -1, 2, 2, -1]
    assert columns.frames[1:].amax(dim=1).tolist() == [0, -1]
    assert [row.tolist() for row in columns.row_numbers] == [[1, 3, 4, 11, 8], [2], []]
    at = torch.arange(8).expand(3, 8)
    assert [one.tolist() for one in columns.of_images(at, -1)] == [
        [-1, 1, -1, 2, 3, -1, -1, -1],
        [6, -1, -1, 5],
        [-1, -1, 3, -1],
    ]
    parts = at[visual].split([3, 2, 1])
    assert torch.equal(columns.placed(parts), torch.where(visual, at, -1))


def test_columns_of_no_image() -> None:
    columns = VisualColumns(torch.zeros(2, 4, dtype=torch.bool), [[], []], [], [])
    assert columns.longest == 0 and columns.counts.shape == (2, 0)
    assert columns.images.tolist() == columns.frames.tolist() == [[-1] * 4] * 2
    assert [len(row) for row in columns.row_numbers] == [0, 0]
