"""Layouts: labels sent through the host's packing say where every visual token came from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from vlmprune.hosts.families import FAMILIES
from vlmprune.select.budget import Budget
from vlmprune.views import EncoderView, layout
from vlmprune.views.layout import NO_PATCH, Layout, label_map, read_labels

SIDE, PATCH, WIDTH = 16, 4, 6
GRID = (SIDE // PATCH, SIDE // PATCH)


@jaxtyped(typechecker=beartype)
def numbered(crops: int, grid: tuple[int, int]) -> Float[Tensor, "{crops} {grid[0]*grid[1]} 1"]:
    return label_map(crops, grid)


@jaxtyped(typechecker=beartype)
def to_tokens(
    one: Layout, labels: Int[Tensor, " n"], kept: Bool[Tensor, "K N"]
) -> Bool[Tensor, " n"]:
    return one.to_tokens(kept)


@jaxtyped(typechecker=beartype)
def candidates(one: Layout) -> Bool[Tensor, "{one.crops} {one.patches}"]:
    return one.candidates()


def host() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=32,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=31,
        image_grid_pinpoints=[[SIDE, SIDE]],
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(config)


HOST = host()


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Grid pinpoints, and sizes (height, width) of images, some very narrow."""
    cells = st.tuples(st.integers(1, 4), st.integers(1, 4))
    shapes = draw(st.lists(cells, min_size=1, max_size=4, unique=True))
    length = st.integers(1, 5 * SIDE)
    sizes = draw(st.lists(st.tuples(length, length), min_size=1, max_size=3))
    return [[rows * SIDE, columns * SIDE] for rows, columns in shapes], sizes


def pack(inputs: dict[str, Any], maps: list[Tensor]) -> list[Tensor]:
    return FAMILIES["llava_next"].media[0].pack(HOST, inputs, maps)


@settings(max_examples=150, deadline=None)
@given(requests(), st.integers(0, 2**31))
def test_labels_follow_real_features(
    request_: tuple[list[list[int]], list[tuple[int, int]]], seed: int
) -> None:
    """The host packs random features; each token must hold those of the patch it is labelled."""
    pinpoints, sizes = request_
    HOST.config.image_grid_pinpoints = HOST.model.config.image_grid_pinpoints = pinpoints
    inputs = {"image_sizes": torch.tensor(sizes)}
    counts = FAMILIES["llava_next"].media[0].crops(HOST, inputs)
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, GRID[0] * GRID[1], WIDTH, generator=generator) for n in counts]
    newline = torch.randn(WIDTH, generator=generator)
    packed, lengths = HOST.model.pack_image_features(
        features, inputs["image_sizes"], "default", image_newline=newline
    )
    labelled = pack(inputs, [numbered(n, GRID) for n in counts])
    for real, one, n, tokens, length in zip(
        features, labelled, counts, packed, lengths, strict=True
    ):
        found = read_labels(one, n, GRID)
        assert len(found.labels) == len(tokens) == length
        is_newline = found.labels == NO_PATCH
        assert torch.equal(tokens[~is_newline], real.flatten(0, 1)[found.labels[~is_newline]])
        assert torch.equal(tokens[is_newline], newline.expand(found.newlines, -1))
        # A newline ends each row of the detailed view (a very narrow image may have no row left).
        rows = found.labels[found.patches :].view(max(found.newlines, 1), -1)
        assert bool((rows[:, -1:] == NO_PATCH).all())
        # Control: labels moved by one describe other features.
        wrong = (found.labels[~is_newline] + 1) % (n * found.patches)
        assert not torch.equal(tokens[~is_newline], real.flatten(0, 1)[wrong])

        seen = candidates(found)
        assert bool(seen[0].all()), "the view of the whole image is never cut"
        assert int(seen.sum()) == int((~is_newline).sum())
        kept = seen & (torch.rand(seen.shape, generator=generator) < 0.5)
        chosen = to_tokens(found, found.labels, kept)
        assert bool(chosen[is_newline].all())
        assert torch.equal(tokens[chosen & ~is_newline].sort(dim=0).values,
                           real[kept].sort(dim=0).values)  # fmt: skip
        assert int(chosen.sum()) == int(kept.sum()) + found.newlines


def test_known_picture() -> None:
    """An image of 2 × 1 crops that fills them: rows run over the crops, newline at each end."""
    HOST.config.image_grid_pinpoints = HOST.model.config.image_grid_pinpoints = [[32, 16]]
    inputs = {"image_sizes": torch.tensor([[32, 16]])}
    (packed,) = pack(inputs, [label_map(3, GRID)])
    found = read_labels(packed, 3, GRID)
    want = list(range(16))
    for start in range(16, 48, 4):
        want += [*range(start, start + 4), -1]
    assert found.labels.tolist() == want
    assert found.newlines == 8


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_crop_row_column_round_trip(crops: int, rows: int, columns: int, random: Any) -> None:
    labels = list(range(crops * rows * columns))
    random.shuffle(labels)
    labels = labels[: random.randint(0, len(labels))] + [NO_PATCH] * random.randint(0, 3)
    random.shuffle(labels)
    one = Layout(torch.tensor(labels, dtype=torch.long), crops, (rows, columns))
    places = zip(one.crop.tolist(), one.row.tolist(), one.column.tolist(), strict=True)
    for label, (crop, row, column) in zip(labels, places, strict=True):
        if label == NO_PATCH:
            assert (crop, row, column) == (-1, -1, -1)
        else:
            assert 0 <= crop < crops and 0 <= row < rows and 0 <= column < columns
            assert (crop * rows + row) * columns + column == label
    assert one.newlines == labels.count(NO_PATCH)
    # Through a packed map and back, and over to tokens.
    again = read_labels(one.labels.float()[:, None], crops, (rows, columns))
    assert torch.equal(again.labels, one.labels)
    kept = torch.rand(crops, rows * columns) < 0.5
    flat = kept.flatten().tolist()
    want = [label == NO_PATCH or flat[label] for label in labels]
    assert to_tokens(one, one.labels, kept).tolist() == want
    # Newlines may be dropped, CLS tokens never are.
    without = [label != NO_PATCH and flat[label] for label in labels]
    assert one.to_tokens(kept, "drop").tolist() == without
    assert replace(one, cls=True).to_tokens(kept, "drop").tolist() == want
    for cls, newlines, left in (
        (False, "keep", one.newlines),
        (False, "drop", 0),
        (True, "drop", one.newlines),
    ):
        assert replace(one, cls=cls).left_newlines(newlines) == left


def test_plain_layout() -> None:
    one = layout.plain(2, (3, 4))
    assert one.labels.tolist() == list(range(24)) and one.newlines == 0
    assert bool(candidates(one).all())
    assert torch.equal(
        read_labels(label_map(2, (3, 4)).flatten(0, 1), 2, (3, 4)).labels, one.labels
    )


def test_maps_that_cannot_be_followed_are_refused() -> None:
    good = label_map(1, (4, 4)).flatten(0, 1)
    read_labels(good, 1, (4, 4))
    read_labels(good.flip(0), 1, (4, 4))
    pooled = good.view(8, 2).mean(dim=1, keepdim=True)
    square = torch.nn.functional.avg_pool2d(good.view(1, 1, 4, 4), 2).flatten()[:, None]
    refused = {
        "averaged pairs": pooled,
        "averaged blocks": square,
        "twice": torch.cat((good, good[:1])),
        "too large": good + 1,
        "below the newline": torch.cat((good[1:], torch.tensor([[-2.0]]))),
        "almost whole": good + 0.01,
    }
    for name, packed in refused.items():
        with pytest.raises(ValueError, match="mixes patches"):
            read_labels(packed, 1, (4, 4))
            pytest.fail(name)


def test_newlines_alone_and_nothing_at_all() -> None:
    assert read_labels(torch.full((3, 1), -1.0), 1, (4, 4)).newlines == 3
    assert read_labels(torch.zeros(0, 1), 1, (4, 4)).labels.tolist() == []


@st.composite
def views(draw: st.DrawFn) -> EncoderView:
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    images = tuple(i for i, n in enumerate(counts) for _ in range(n))
    N = draw(st.integers(1, 9))
    share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    seen = torch.rand(len(images), N, generator=generator) < share
    attention = torch.rand(len(images), N, generator=generator)
    return EncoderView(attention, torch.zeros(len(images), N, 2), seen, images)


@settings(max_examples=200, deadline=None)
@given(views(), st.sampled_from(["crop", "image"]))
def test_every_candidate_stands_in_one_group(view: EncoderView, budget: Budget) -> None:
    N = view.candidates.shape[1]
    groups = view.groups(budget)
    cells = torch.cat([g.flatten() for g in groups]) if groups else torch.zeros(0, dtype=torch.long)
    assert sorted(cells.tolist()) == view.candidates.flatten().nonzero()[:, 0].tolist()
    assert len({g.shape[1] for g in groups}) == len(groups), "equal sizes stand together"
    sizes = []
    for group in groups:
        assert bool((group.diff(dim=1) > 0).all())
        for unit in group.tolist():
            crops = {cell // N for cell in unit}
            owners = crops if budget == "crop" else {view.images[c] for c in crops}
            assert len(owners) == 1, "a unit lies in one crop, or one image"
            sizes.append(len(unit))
    # One unit an owner: no crop or image is split.
    counts = view.counts(budget)
    assert sorted(sizes) == sorted(n for n in counts if n)
    owners_of = range(len(view.images)) if budget == "crop" else range(max(view.images) + 1)
    assert len(counts) == len(owners_of)
    assert sum(counts) == int(view.candidates.sum())


@settings(max_examples=50, deadline=None)
@given(views(), st.integers(0, 2**31))
def test_narrow_only_rules_out(view: EncoderView, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(view.candidates.shape, generator=generator) < 0.5
    narrowed = view.narrow(kept)
    assert torch.equal(narrowed.candidates, view.candidates & kept)
    assert narrowed.attention is view.attention and narrowed.features is view.features
    assert narrowed.images == view.images
    twice = narrowed.narrow(torch.ones_like(kept))
    assert torch.equal(twice.candidates, narrowed.candidates)


def test_a_packing_that_moves_patches_is_refused() -> None:
    """A token that says it comes from beyond the plane of the crops."""
    whole = Layout(torch.tensor([*range(4), 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]), 3, (2, 2))
    rest = torch.tensor([[0.0, 0.0], [0.0, 1.0], [NO_PATCH] * 2])
    packed = torch.cat((torch.zeros(4, 2), rest))
    found = layout.read_places(packed, whole)
    assert found.labels.tolist()[4:] == [4, 5, NO_PATCH]
    for place in ([0.0, 4.0], [2.0, 0.0], [-2.0, 0.0]):
        packed[5] = torch.tensor(place)
        with pytest.raises(ValueError, match="moves patches, so its tokens cannot be followed"):
            layout.read_places(packed, whole)
