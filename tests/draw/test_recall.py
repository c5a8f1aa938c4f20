"""The picture that lights up word by word: what is lit, where, when, and the words below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vlmprune.draw import recall
from vlmprune.draw.recall import Film
from vlmprune.draw.style import LIGHT_ORANGE
from vlmprune.io.outputs import Output, maker

SIDE = 96
TEXTS = ["row", "row one", "row one col", "row one column"]


def grid(n: int, side: float = SIDE) -> torch.Tensor:
    """Boxes of n by n cells, row by row."""
    step = side / n
    return torch.tensor(
        [(c * step, r * step, (c + 1) * step, (r + 1) * step) for r in range(n) for c in range(n)]
    )


def photo(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(60, 200, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def shares(*lit: dict[int, float], count: int = 16) -> list[torch.Tensor]:
    out = []
    for one in lit:
        out.append(torch.zeros(count))
        for token, share in one.items():
            out[-1][token] = share
    return out


def drawn(lit: list[torch.Tensor], boxes: torch.Tensor | None = None, **how: Any) -> Film:
    given: dict[str, Any] = {"texts": TEXTS[: len(lit) + 1], "legend": False, "side": SIDE}
    return recall.film(photo(), grid(4) if boxes is None else boxes, lit, **given | how)


def numbers(frame: Image.Image) -> NDArray[np.float64]:
    return np.asarray(frame.convert("RGB"), dtype=float)


def cell(picture: NDArray[np.float64], token: int) -> NDArray[np.float64]:
    row, column = divmod(token, 4)
    step = SIDE // 4
    return picture[row * step : (row + 1) * step, column * step : (column + 1) * step]


def test_a_cell_is_lit_where_and_when_it_is_read_and_by_how_many() -> None:
    film = drawn(shares({6: 0.5}, {}, {6: 0.25, 9: 0.5}))
    assert len(film.frames) == len(film.durations) == 3 and film.top == 0.5
    one, none, two = map(numbers, film.frames)
    for token in range(16):
        dark = cell(none, token)
        assert (cell(one, token).sum(axis=2) > dark.sum(axis=2) + 60).all() == (token == 6)
        assert (cell(one, token) == dark).all() == (token != 6)
        assert (cell(two, token) == dark).all() == (token not in (6, 9))
        assert dark.mean() < 0.5 * cell(numbers(photo()), token).mean()
    # Half as many heads are half as bright, on one scale in all frames.
    full, half = cell(one, 6) - cell(none, 6), cell(two, 6) - cell(none, 6)
    assert np.abs(half - full / 2).max() <= 1
    assert film.frames[0].size == (SIDE, SIDE)


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_a_file_that_moves_holds_a_frame_a_step(tmp_path: Path, ending: str) -> None:
    lit = shares({0: 0.2}, {5: 0.4}, {10: 0.4})
    frames, durations = recall.pictures(ending, photo(), grid(4), lit, texts=TEXTS)
    target = tmp_path / f"answer{ending}"
    Output(target, "vlmprune run").write_picture(frames[0], frames[1:], durations)
    assert maker(target) == "vlmprune run"
    with Image.open(target) as image:
        assert getattr(image, "n_frames", 1) == 3 and image.info["loop"] == 0
        found, times = [], []
        for number in range(3):
            image.seek(number)
            image.load()
            times.append(image.info["duration"])
            found.append(numbers(image))
    assert times == [recall.PACE, recall.PACE, recall.HOLD]
    side, margin = recall.MOST_SIDE, 20
    assert found[0].shape[1] == side + 2 * margin
    for number, token in enumerate((0, 5, 10)):
        step = side // 4
        row, column = divmod(token, 4)
        top, left = (margin + at * step + 8 for at in (row, column))
        bright = [one[top : top + step - 16, left : left + step - 16].mean() for one in found]
        # Half as many heads read the first.
        assert min(np.delete(bright, number)) > 10
        assert bright[number] > (1.3 if token == 0 else 2) * max(np.delete(bright, number))


def test_a_still_holds_some_of_the_steps_side_by_side() -> None:
    lit = shares(*[{n % 16: 1.0} for n in range(40)])
    (sheet,), durations = recall.pictures(".png", photo(), grid(4), lit, texts=["a"] * 41)
    assert durations == []
    one = recall.film(photo(), grid(4), lit, ["a"] * 41, side=224, steps=[39])
    width, height = one.frames[0].size
    assert sheet.size == (5 * width, 5 * height)
    # 24 of 40 in five columns: the last is the fourth of the fifth row.
    last = sheet.crop((3 * width, 4 * height, 4 * width, 5 * height))
    assert last.tobytes() == one.frames[0].tobytes()
    assert recall.spread(40, 24)[0] == 0 and len(set(recall.spread(40, 24))) == 24
    assert recall.spread(3, 24) == [0, 1, 2] and recall.spread(9, 1) == [8]


def test_long_answers_make_no_huge_files() -> None:
    lit = shares(*[{n % 16: 1.0} for n in range(300)])
    film = recall.film(photo(), grid(4), lit, ["word"] * 301)
    assert len(film.frames) == recall.MOST and film.steps[-1] == recall.MOST - 1
    assert max(film.frames[0].size) < recall.LEAST_SIDE + 130
    assert recall.film(photo(), grid(4), lit[:2], TEXTS[:3]).frames[0].width > recall.MOST_SIDE


def test_crops_and_their_view_of_the_whole_are_two_panels() -> None:
    boxes = torch.cat((grid(1), grid(2)))
    crops = torch.tensor([0, 1, 2, 3, 4])
    lit = shares({0: 1.0}, {4: 1.0}, count=5)
    film = drawn(lit, boxes=boxes, crops=crops)
    whole, part = map(numbers, film.frames)
    assert film.frames[0].size == (2 * SIDE, SIDE)
    half = SIDE // 2
    assert (whole[:, :SIDE] > part[:, :SIDE] + 5).all()
    assert (part[half + 1 :, SIDE + half + 1 :] > whole[half + 1 :, SIDE + half + 1 :] + 5).all()
    assert (part[:half, SIDE : SIDE + half] == whole[:half, SIDE : SIDE + half]).all()
    # The crops come last where the view of the whole does.
    swapped = numbers(drawn(lit, boxes=boxes, crops=4 - crops, whole_crop=4).frames[0])
    assert (swapped[:, :SIDE] == whole[:, :SIDE]).all()


def test_what_has_no_box_is_darkest_and_a_newline_lights_nothing() -> None:
    boxes = torch.cat((grid(2, SIDE / 2), torch.zeros(1, 4)))
    dark, newline = (
        numbers(one) for one in drawn(shares({}, {4: 1.0}, count=5), boxes=boxes).frames
    )
    assert (dark == newline).all()
    half = SIDE // 2
    assert dark[half:, half:].mean() < 0.5 * dark[:half, :half].mean()


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("row", "row one", "one"),
        ("an umb", "an umbrella", "umbrella"),
        ("one", "one.", "."),
        ("one .", "one.", "."),
        ("one", "one", ""),
        ("one", "one ", ""),
        ("", "cat", "cat"),
        ("caf\ufffd", "caf\u00e9 au", "caf\u00e9 au"),
        ("\u732b" * 40, "\u732b" * 41, "\u732b"),
    ],
)
def test_the_current_word(before: str, after: str, word: str) -> None:
    assert recall.word_of(before, after) == word


def orange(frame: Image.Image) -> int:
    """Pixels of the light's colour among the words, the swatch of the legend left out."""
    height = frame.height
    words = numbers(frame)[height - 90 : height - 38]
    return int((np.abs(words - np.array(LIGHT_ORANGE)).max(axis=2) < 60).sum())


def test_the_answer_so_far_is_below_with_its_current_word_marked() -> None:
    lit = shares({}, {}, {})
    film = recall.film(photo(), grid(4), lit, TEXTS)
    assert film.words == ["one", "col", "column"]
    assert len({one.size for one in film.frames}) == 1
    assert all(orange(one) > 20 for one in film.frames)
    ended = recall.film(photo(), grid(4), lit, ["row", "row one", "row one", "row one"])
    assert orange(ended.frames[0]) > 20 and orange(ended.frames[2]) == 0
    # Frames differ by the number of the step alone, so none is lost in a file.
    assert ended.frames[1].tobytes() != ended.frames[2].tobytes()


@pytest.mark.parametrize(
    "text", ["word " * 500, "w" * 2000, "a\x1b[31m\n\tb\x00", "\u202e abc", ""]
)
def test_any_text_has_its_room(text: str) -> None:
    film = recall.film(photo(), grid(4), shares({3: 1.0}), ["", text])
    short = recall.film(photo(), grid(4), shares({3: 1.0}), ["", "a"])
    more = film.frames[0].height - short.frames[0].height
    assert 0 <= more <= 90 and film.frames[0].width == short.frames[0].width


def test_control_characters_are_spaces() -> None:
    lit = shares({3: 1.0})
    pair = [recall.film(photo(), grid(4), lit, ["", text]) for text in ("a\x1b\nb", "a b")]
    assert pair[0].frames[0].tobytes() == pair[1].frames[0].tobytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lit": []}, "no step"),
        ({"texts": ["a"]}, "give one text more"),
        ({"lit": [torch.zeros(15)]}, "give one share a box"),
        ({"lit": [torch.full((16,), 2.0)]}, "from 0 to 1"),
        ({"lit": [torch.full((16,), float("nan"))]}, "from 0 to 1"),
        ({"boxes": torch.zeros(16, 3)}, r"must be \[n, 4\]"),
        ({"crops": torch.zeros(3, dtype=torch.int64)}, "one a box"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"boxes": grid(4), "lit": shares({}), "texts": ["a", "b"]}
    with pytest.raises(ValueError, match=said):
        recall.film(photo(), **given | changes)
