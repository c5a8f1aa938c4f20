"""Shortening prompts: properties over random masks, images and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmprune import VlmpruneError
from vlmprune.runtime.call.shorten import Prompt, dropped_columns, latest, shorten
from vlmprune.runtime.geometry import spans

PAD, IMAGE = 0, 9
Row = tuple[int, list[bool]]  # padding, and for each real column whether it is to be dropped

rows = st.lists(
    st.tuples(st.integers(0, 4), st.lists(st.booleans(), min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


def build(batch: list[Row], side: str) -> tuple[Prompt, torch.Tensor]:
    """Padded prompts with telling ids, and the columns to drop; each row keeps its last token."""
    length = max(pad + len(drops) for pad, drops in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask, dropped = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (_, drops) in enumerate(batch):
        n = len(drops)
        real = slice(length - n, length) if side == "left" else slice(0, n)
        ids[i, real] = 100 * (i + 1) + torch.arange(n)
        mask[i, real] = 1
        dropped[i, real] = torch.tensor([*drops[:-1], False])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Prompt(ids, mask, positions, {"labels": ids.clone()}), dropped


@given(rows, st.sampled_from(["left", "right"]), st.sampled_from(["compact", "original"]))
def test_what_stays_keeps_order_and_padding_its_side(batch: list[Row], side: str, how: str) -> None:
    prompt, dropped = build(batch, side)
    short, following = shorten(prompt, dropped, how, PAD)  # type: ignore[arg-type]
    common = int((prompt.mask == 0).sum(1).min())
    most = 0
    for i in range(len(batch)):
        stays = (prompt.mask[i] == 1) & ~dropped[i]
        most = max(most, int(stays.sum()))
        real = short.mask[i] == 1
        assert short.ids[i][real].tolist() == prompt.ids[i][stays].tolist()
        assert bool((short.ids[i][~real] == PAD).all())
        kept_positions = short.positions[i][real]
        if how == "original":
            assert kept_positions.tolist() == prompt.positions[i][stays].tolist()
            assert int(following[i]) == int(prompt.mask[i].sum())
        else:
            assert kept_positions.tolist() == list(range(int(stays.sum())))
            assert int(following[i]) == int(stays.sum())
        changes = int((real[1:] != real[:-1]).sum())
        assert changes <= 1, "padding stands on one side"
        right = side == "right" and bool((prompt.mask[:, -1] == 0).any())
        assert bool(real[0 if right else -1])
        labels = short.aligned["labels"][i][real].tolist()
        assert labels[1:] == short.ids[i][real].tolist()[1:]
    assert short.ids.shape[1] == most + common


@given(rows, st.sampled_from(["left", "right"]), st.sampled_from(["compact", "original"]))
def test_dropping_nothing_changes_nothing(batch: list[Row], side: str, how: str) -> None:
    prompt, dropped = build(batch, side)
    short, _ = shorten(prompt, torch.zeros_like(dropped), how, PAD)  # type: ignore[arg-type]
    assert torch.equal(short.ids, prompt.ids)
    assert torch.equal(short.mask, prompt.mask)
    assert torch.equal(short.positions, prompt.positions)


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_the_next_position_follows_the_largest_of_three(wide: int) -> None:
    """A picture at the end reaches furthest along its longer side, and not in time."""
    ids, mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    mask[1, 0] = 0
    positions = torch.zeros(3, 2, 7, dtype=torch.long)
    # A word, and a picture of 1 x 6 from position 1 on; in the second row behind padding.
    positions[:, 0, 1:] = positions[:, 1, 2:] = 1
    positions[wide, 0, 1:], positions[wide, 1, 2:] = torch.arange(1, 7), torch.arange(1, 6)
    prompt = Prompt(ids, mask, positions)
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    assert latest(prompt).tolist() == [6, 5]
    assert shorten(prompt, nothing, "original", PAD)[1].tolist() == [7, 6]
    some = nothing.clone()
    # What was furthest may go: the host counts on from where it was.
    some[:, -2:] = True
    assert shorten(prompt, some, "original", PAD)[1].tolist() == [7, 6]


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3), st.data())
def test_images_find_their_columns(batch: list[list[int]], data: st.DataObject) -> None:
    lengths = [n for row in batch for n in row]
    width = max(sum(n + 1 for n in row) for row in batch) + 1
    ids = torch.ones(len(batch), width, dtype=torch.long)
    places = []
    for i, row in enumerate(batch):
        at = 1
        for n in row:
            ids[i, at : at + n] = IMAGE
            places.append((i, at))
            at += n + 1
    kept = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in lengths
    ]
    found = spans(ids == IMAGE, lengths, "image")
    dropped = dropped_columns(ids, found, kept)
    assert [(span.row, int(span.columns[0])) for span in found] == places
    for (row, at), k in zip(places, kept, strict=True):
        assert torch.equal(dropped[row, at : at + len(k)], ~k)
    assert int(dropped.sum()) == sum(int((~k).sum()) for k in kept)


def test_placeholders_that_do_not_match_are_refused() -> None:
    visual = torch.tensor([[True, True, False], [True, True, True]])
    with pytest.raises(VlmpruneError, match="5 image placeholders but the images make 4"):
        spans(visual, [4], "image")
    with pytest.raises(VlmpruneError, match="do not match its images"):
        spans(visual, [3, 2], "image")
