"""The picture of kept tokens: what it darkens, what it leaves, and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmprune.draw import overlay


def grid(x0: float, y0: float, x1: float, y1: float, n: int) -> torch.Tensor:
    xs, ys = torch.linspace(x0, x1, n + 1), torch.linspace(y0, y1, n + 1)
    cells = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(n) for c in range(n)]
    return torch.tensor(cells)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(60, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def plain(image: Image.Image, boxes: torch.Tensor, roles: list[str], **options: Any) -> np.ndarray:
    """The overlay at the image's own scale, without legend, as numbers."""
    longest = max(image.size)
    sizes = {"legend": False, "min_side": longest, "max_side": longest}
    return np.asarray(overlay.draw(image, boxes, roles, **{**sizes, **options}), dtype=float)


def inside(picture: np.ndarray, box: torch.Tensor, margin: int = 6) -> np.ndarray:
    x0, y0, x1, y1 = (int(v) for v in box)
    return picture[y0 + margin : y1 - margin, x0 + margin : x1 - margin]


def test_dropped_is_darker_and_greyer_and_kept_is_unchanged() -> None:
    image, boxes = photo(400, 400), grid(0, 0, 400, 400, 4)
    roles = ["dropped"] * 16
    roles[5], roles[6], roles[9] = "important", "diverse", "kept"
    before, after = np.asarray(image, dtype=float), plain(image, boxes, roles)
    assert after.shape == before.shape
    for box, role in zip(boxes, roles, strict=True):
        old, new = inside(before, box), inside(after, box)
        if role == "dropped":
            assert (new.max(axis=2) < old.max(axis=2)).all()
            assert np.ptp(new, axis=2).mean() < 0.2 * np.ptp(old, axis=2).mean()
        else:
            assert (new == old).all()


def test_outlines_tell_the_roles_apart() -> None:
    image, boxes = photo(400, 400), grid(0, 0, 400, 400, 4)
    colours = {}
    for role in ("important", "diverse", "kept"):
        roles = ["dropped"] * 16
        roles[5] = role
        corner = plain(image, boxes, roles)[100, 100]
        colours[role] = tuple(int(v) for v in corner)
        assert colours[role] == overlay.COLOURS[role]
    assert len(set(colours.values())) == 3
    orange, blue = np.array(colours["important"]), np.array(colours["diverse"])
    assert orange[0] > orange[2] and blue[2] > blue[0]


def test_members_are_tinted_and_the_legend_says_so() -> None:
    image, boxes = photo(400, 400), grid(0, 0, 400, 400, 4)
    roles = ["dropped"] * 16
    roles[5], roles[6] = "important", "member"
    before, after = np.asarray(image, dtype=float), plain(image, boxes, roles)
    old, member, dropped = (inside(p, boxes[i]) for p, i in ((before, 6), (after, 6), (after, 9)))
    assert (inside(after, boxes[5]) == inside(before, boxes[5])).all()
    # Darker than a kept one, brighter than a dropped one, and greener than it was.
    assert old.mean() > member.mean() > 1.3 * dropped.mean()
    green = member[..., 1] - member[..., [0, 2]].mean(axis=-1)
    assert (green > 20).all() and abs(dropped[..., 1] - dropped[..., 0]).max() < 20
    # Kept patches alone are outlined.
    assert (after[102, 150] == overlay.COLOURS["important"]).all()
    assert tuple(after[198, 250]) != overlay.COLOURS["member"]
    # One that a kept patch overlaps, shows the kept patch.
    both = torch.cat((boxes, boxes[6:7]))
    shown = plain(image, both, [*roles, "kept"])
    assert (inside(shown, boxes[6]) == inside(before, boxes[6])).all()
    colour = np.array(overlay.COLOURS["member"])
    for role, count in (("member", True), ("dropped", False)):
        named = [*roles[:6], role, *roles[7:]]
        card = np.asarray(overlay.draw(image, boxes, named, min_side=400))[410:]
        assert (int((card == colour).all(axis=2).sum()) > 60) == count


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 63), st.integers(0, 63))
def test_the_bright_place_is_the_kept_box(kept: int, other: int) -> None:
    image, boxes = photo(160, 160), grid(0, 0, 160, 160, 8)
    roles = ["kept" if i == kept else "dropped" for i in range(64)]
    before, after = np.asarray(image, dtype=float), plain(image, boxes, roles)
    assert (inside(after, boxes[kept]) == inside(before, boxes[kept])).all()
    if other != kept:
        assert (inside(after, boxes[other]) != inside(before, boxes[other])).any()
    # The control: the same roles on boxes moved by one patch light up another place.
    moved = plain(image, boxes + torch.tensor([20.0, 0, 20, 0]), roles)
    assert (inside(moved, boxes[kept]) != inside(after, boxes[kept])).any()


def test_neighbouring_boxes_tile_without_gap_at_any_scale() -> None:
    white = Image.new("RGB", (225, 225), "white")
    boxes = grid(0, 0, 225, 225, 16)
    picture = plain(white, boxes, ["dropped"] * 256, min_side=701, max_side=701)
    assert len(np.unique(picture)) == 1
    seen = plain(white, boxes[:128], ["dropped"] * 128, min_side=701, max_side=701)
    assert set(np.unique(seen)) == {np.unique(picture)[0], np.unique(seen).min()}


def test_what_no_box_covers_is_darkest_and_boxes_are_clipped() -> None:
    image = Image.new("RGB", (200, 100), "white")
    boxes = torch.tensor([[-50.0, -20, 60, 50], [60, 0, 100, 50], [900, 900, 950, 950]])
    picture = plain(image, boxes, ["kept", "dropped", "kept"])
    assert picture.shape == (100, 200, 3)
    assert picture[10, 10].mean() > picture[10, 80].mean() > picture[80, 10].mean() > 0
    assert picture[80, 10].mean() == picture[10, 150].mean()


def test_kept_shows_where_it_overlaps_dropped() -> None:
    image = photo(100, 100)
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 100]])
    for roles in (["kept", "dropped"], ["dropped", "kept"]):
        assert (plain(image, boxes, roles)[20:80, 20:80] == np.asarray(image)[20:80, 20:80]).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), (672, 672)),
        ((112, 224), (336, 672)),
        ((700, 500), (700, 500)),
        ((4032, 3024), (1344, 1008)),
        ((1, 3000), (1, 1344)),
    ],
)
def test_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    boxes = grid(0, 0, *size, 2)
    picture = overlay.draw(Image.new("RGB", size), boxes, ["kept"] * 4, legend=False)
    assert picture.size == expected
    assert picture.mode == "RGB"


def test_the_legend_only_adds_around_the_picture() -> None:
    image, boxes = photo(224, 224), grid(0, 0, 224, 224, 4)
    roles = ["important"] * 3 + ["diverse"] * 2 + ["dropped"] * 11
    bare = np.asarray(overlay.draw(image, boxes, roles, legend=False))
    card = np.asarray(overlay.draw(image, boxes, roles))
    assert (card[20 : 20 + 672, 20 : 20 + 672] == bare).all()
    strip = card[20 + 672 :]
    for role, shown in (("important", True), ("diverse", True), ("dropped", True), ("kept", False)):
        # The swatch is solid; letters have fewer pixels of any one colour.
        pixels = int((strip == np.array(overlay.COLOURS[role])).all(axis=2).sum())
        assert (pixels > 60) == shown, role


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_mode_and_the_input_stays_as_it_was(mode: str) -> None:
    image = photo(64, 48).convert(mode)
    before = image.tobytes()
    picture = overlay.draw(image, grid(0, 0, 64, 48, 2), ["kept", "dropped"] * 2)
    assert picture.mode == "RGB"
    assert (image.mode, image.size, image.tobytes()) == (mode, (64, 48), before)


def crops_of(width: int, height: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    w, h = width / 2, height / 2
    tiles = [grid(w * x, h * y, w * x + w, h * y + h, n) for y in (0, 1) for x in (0, 1)]
    boxes = torch.cat([grid(0, 0, width, height, n), *tiles])
    return boxes, torch.arange(5).repeat_interleave(n * n)


def test_base_view_left_and_high_resolution_right() -> None:
    image = photo(400, 200)
    boxes, crops = crops_of(400, 200, 2)
    before = np.asarray(image, dtype=float)
    for kept in range(len(boxes)):
        roles = ["important" if i == kept else "dropped" for i in range(len(boxes))]
        picture = plain(image, boxes, roles, crops=crops)
        assert picture.shape == (200, 800, 3)
        panels = {"base": picture[:, :400], "high": picture[:, 400:]}
        name, other = ("base", "high") if crops[kept] == 0 else ("high", "base")
        same = inside(panels[name], boxes[kept]) == inside(before, boxes[kept])
        assert same.all()
        assert (inside(panels[other], boxes[kept]) != inside(before, boxes[kept])).any()


def test_one_panel_where_there_is_one_view() -> None:
    image = photo(100, 100)
    boxes, crops = crops_of(100, 100, 2)
    base, high = crops == 0, crops > 0
    for chosen in (base, high):
        count = int(chosen.sum())
        picture = plain(image, boxes[chosen], ["dropped"] * count, crops=crops[chosen])
        assert picture.shape == (100, 100, 3)
    alone = plain(image, boxes[base], ["kept"] * 4)
    assert (alone == plain(image, boxes[base], ["kept"] * 4, crops=crops[base])).all()


def test_a_token_without_a_place_is_counted_and_not_drawn() -> None:
    image = photo(100, 100)
    boxes, crops = crops_of(100, 100, 2)
    roles = ["dropped"] * 20
    newline = torch.zeros(1, 4)
    with_newline = plain(
        image,
        torch.cat([boxes, newline]),
        [*roles, "kept"],
        crops=torch.cat([crops, torch.tensor([4])]),
    )
    assert (with_newline == plain(image, boxes, roles, crops=crops)).all()


def test_a_narrow_picture_still_has_its_legend() -> None:
    boxes, crops = crops_of(60, 600, 2)
    card = overlay.draw(photo(60, 600), boxes, ["important"] * 20, crops=crops)
    assert card.width == 2 * 67 + 3 * 20
    assert card.height > 672 + 60


def test_no_tokens_at_all() -> None:
    card = overlay.draw(photo(50, 50), torch.zeros(0, 4), [], crops=torch.zeros(0, dtype=torch.int))
    assert card.width == 672 + 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"roles": ["kept"] * 3}, "4 boxes have 3 roles"),
        ({"roles": ["kept"] * 3 + ["melted"]}, "unknown roles"),
        ({"boxes": torch.zeros(4, 3)}, r"must be \[n, 4\]"),
        ({"boxes": torch.full((4, 4), float("nan"))}, "finite"),
        ({"boxes": torch.tensor([[9.0, 0, 1, 1]] * 4)}, "x0 <= x1"),
        ({"crops": torch.zeros(3, dtype=torch.int)}, "crops must be 4"),
        ({"crops": torch.full((4,), -1)}, "0 or more"),
        ({"min_side": 0}, "min_side"),
        ({"min_side": 900, "max_side": 800}, "min_side"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"boxes": grid(0, 0, 64, 64, 2), "roles": ["kept"] * 4}
    with pytest.raises(ValueError, match=words):
        overlay.draw(photo(64, 64), **{**arguments, **changes})
