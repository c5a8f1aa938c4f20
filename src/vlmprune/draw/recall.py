"""A picture that lights up word by word: which visual tokens each step of an answer read.

For methods that keep every visual token and read a few at each step. Draws on the original image,
with boxes in its own pixels, so it knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vlmprune.costs.units import percent
from vlmprune.draw import panels
from vlmprune.draw.panels import SHARP, Floats, Ints, LegendEntry
from vlmprune.draw.style import CARD, CARD_FAINT, CARD_INK, CARD_UNSEEN, LIGHT_ORANGE
from vlmprune.io.pictures import to_rgb

ENDINGS = (".gif", ".webp", ".png")
"""Of files that a film is kept in: the first two move, the last is a sheet of stills."""
PACE, HOLD = 600, 2000
"""Milliseconds of a frame, and of the last one."""
MOST, SHEET = 256, 24
"""Steps that are drawn at most, of a film its first, of a sheet some in even distances."""
LEAST_SIDE, MOST_SIDE = 224, 448
"""Pixels of the picture's long side: between these, the fewer the more frames there are."""

# Of all frames together, so that a long answer makes no huge file.
_PIXELS = 12_000_000
_STILL = 224
_COLUMNS = 6
# Brightness of what no head reads and of what the model never saw; how much colour is left in it;
# how much of the light's colour lies over what is lit.
_DIM, _UNSEEN, _GREY, _TINT = 0.28, 0.1, 0.85, 0.3
# Lines and characters of the answer that are shown, its last ones; characters of a marked word.
_LINES, _SHOWN, _WORD = 3, 400, 24


@dataclass(frozen=True)
class Film:
    """The frames of an answer.

    Attributes:
        frames: RGB pictures of one size, one a step.
        durations: milliseconds that each is shown.
        words: the word that each step ended or went on with; "" where it added no text.
        steps: their numbers.
        top: share of KV heads that reads the brightest cell.
    """

    frames: list[Image.Image] = field(repr=False)
    durations: list[int]
    words: list[str]
    steps: list[int]
    top: float

    def paletted(self) -> list[Image.Image]:
        """The frames in one palette of 256 colours, so that what stays stays to the pixel."""
        some = self.frames[:: max(1, len(self.frames) // 6)]
        small = [one.reduce(2) if min(one.size) > 1 else one for one in some]
        fixed = [one for colour in (CARD, CARD_INK, CARD_FAINT, LIGHT_ORANGE) for one in colour]
        colours = 256 - len(fixed) // 3
        found = panels.beside(small, 0).quantize(colours, dither=Image.Dither.NONE).getpalette()
        assert found is not None
        shared = Image.new("P", (1, 1))
        # The card's own colours cover too little to be found.
        shared.putpalette([*found[: 3 * colours], *fixed])
        return [one.quantize(palette=shared, dither=Image.Dither.NONE) for one in self.frames]

    def sheet(self) -> Image.Image:
        """All frames on one still, row by row."""
        columns = min(_COLUMNS, ceil(sqrt(len(self.frames))))
        width, height = self.frames[0].size
        out = Image.new("RGB", (columns * width, ceil(len(self.frames) / columns) * height), CARD)
        for number, frame in enumerate(self.frames):
            row, column = divmod(number, columns)
            out.paste(frame, (column * width, row * height))
        return out


def film(
    image: Image.Image,
    boxes: torch.Tensor,
    lit: Sequence[torch.Tensor],
    texts: Sequence[str],
    *,
    crops: torch.Tensor | None = None,
    whole_crop: int = 0,
    legend: bool = True,
    side: int | None = None,
    steps: Sequence[int] | None = None,
) -> Film:
    """Draw what each step read of an image.

    The image is dimmed and loses its colour; a cell is lit by how many KV heads read it, on one
    scale in all frames, whose upper end is the most that any cell was read at any step.
    Where boxes overlap, the brighter shows. What no box covers, the model never saw, and is
    darkest.

    With tokens of a view of the whole and of high-resolution crops, a frame has two panels, as
    `overlay.draw` has them.

    Args:
        image: the original image, any mode and size; it is not changed.
        boxes: float [n, 4] as in `overlay.draw`; a token with an empty box is not drawn.
        lit: for each step [n], the share of KV heads that read each token, 0 to 1.
        texts: the decoded answer up to each of its tokens: one more than steps, since the first
            token comes of prefill. Control characters are shown as spaces.
        crops: int [n], the crop of every token; None is one view of all.
        whole_crop: which of the crops is the view of the whole image.
        legend: whether to put the scale and the answer, with its current word marked, below.
        side: pixels of the image's long side; by default as `LEAST_SIDE` and `MOST_SIDE` say.
        steps: numbers of those to draw; by default the first `MOST`.

    Raises:
        ValueError: no step, lengths that differ, or boxes, crops or shares that are none.
    """
    table = panels.checked_boxes(boxes)
    shares = [one.detach().to("cpu", torch.float64).numpy() for one in lit]
    _check(shares, len(table), texts)
    views = panels.views_of(crops, whole_crop, len(table))
    numbers = list(range(min(len(shares), MOST)) if steps is None else steps)
    if side is None:
        room = sqrt(_PIXELS / len(numbers) / len(views))
        side = int(np.clip(room, LEAST_SIDE, MOST_SIDE))
    photo = panels.scaled(to_rgb(image), side, side)
    table = table * np.tile(np.divide(photo.size, image.size), 2)
    top = float(max(one.max(initial=0.0) for one in shares))
    lamps = [_Lamp(photo, table, groups) for _, groups in views]
    titles: list[list[LegendEntry]] = [[(name, None)] for name, _ in views]
    width = sum(lamp.size[0] for lamp in lamps) + panels.MARGIN * (len(lamps) - 1)
    lines = len(_lines(*_marked(texts[-1], ""), width))
    frames, words = list[Image.Image](), list[str]()
    for number in numbers:
        level = shares[number] / top if top else shares[number]
        shown = [lamp.lit(level) for lamp in lamps]
        word = word_of(texts[number], texts[number + 1])
        words.append(word)
        if not legend:
            frames.append(panels.beside(shown, gap=0))
            continue
        entries: list[LegendEntry] = [
            (f"step {number + 1} of {len(shares)}", None),
            (f"brightest: {percent(top)} of KV heads", LIGHT_ORANGE),
        ]
        if any(lamp.some_unseen for lamp in lamps):
            entries.append(("not seen", CARD_UNSEEN))
        head = panels.strip_of(entries, width, panels.text_size(width), CARD_INK)
        told = _told(texts[number + 1], word, width, lines)
        below = Image.new("RGB", (width, head.height + told.height), CARD)
        below.paste(told, (0, 0))
        below.paste(head, (0, told.height))
        frames.append(panels.card(shown, titles if len(views) > 1 else [], below))
    durations = [PACE] * (len(frames) - 1) + [HOLD]
    return Film(frames, durations, words, numbers, top)


def pictures(
    ending: str, image: Image.Image, boxes: torch.Tensor, lit: Sequence[torch.Tensor], **how: object
) -> tuple[list[Image.Image], list[int]]:
    """The pictures of a file with one of `ENDINGS`, and how long each is shown.

    A GIF or a WebP is the film; a PNG is one still of up to `SHEET` steps.

    Args:
        ending: of the file.
        image: as in `film`, as the others are.
        boxes: likewise.
        lit: likewise.
        how: `texts`, `crops` and `whole_crop`, likewise.
    """
    if ending == ".png":
        some = spread(len(lit), SHEET)
        made = film(image, boxes, lit, side=_STILL, steps=some, **how)  # type: ignore[arg-type]
        return [made.sheet()], []
    made = film(image, boxes, lit, **how)  # type: ignore[arg-type]
    return made.paletted() if ending == ".gif" else made.frames, made.durations


def spread(count: int, most: int) -> list[int]:
    """Some of `count` numbers, `most` at most, in even distances: the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(one) for one in np.linspace(0, count - 1, most)] if most > 1 else [count - 1]


def word_of(before: str, after: str) -> str:
    """The word that a text ends in now; "" where no text has come since `before`.

    A word that came in pieces is given whole as far as it is there.
    """
    start = 0
    for one, other in zip(before, after, strict=False):
        if one != other:
            break
        start += 1
    new = after[start:]
    if not new.strip():
        return ""
    start += len(new) - len(new.lstrip())
    back = start
    while back > 0 and after[back].isalnum() and after[back - 1].isalnum():
        back -= 1
    # Scripts that part no words by spaces would be marked whole.
    return after[back if start - back <= _WORD else start :].rstrip()


def _check(shares: Sequence[Floats], count: int, texts: Sequence[str]) -> None:
    if not shares:
        raise ValueError("there is no step to draw.")
    if len(texts) != len(shares) + 1:
        raise ValueError(f"{len(shares)} steps have {len(texts)} texts; give one text more.")
    for one in shares:
        if one.shape != (count,):
            raise ValueError(f"{count} boxes have shares {list(one.shape)}; give one share a box.")
        if not ((one >= 0) & (one <= 1 + 1e-6)).all():
            raise ValueError("every share must be a number from 0 to 1.")


class _Lamp:
    """A view of the image whose cells can be lit.

    Attributes:
        size: width and height in pixels.
        some_unseen: whether the model never saw a part of it.
    """

    def __init__(self, photo: Image.Image, boxes: Floats, groups: list[Ints]) -> None:
        self.size = photo.size
        self._tokens = np.concatenate(groups)
        self._where = {n: panels.pixels_of(boxes[n], photo.size) for n in self._tokens}
        seen = np.zeros(photo.size[::-1], dtype=bool)
        for where in self._where.values():
            seen[where] = True
        self.some_unseen = not bool(seen.all())
        colours = np.asarray(photo, dtype=np.float64)
        grey = colours @ np.array([0.299, 0.587, 0.114])
        dull = colours + _GREY * (grey[..., None] - colours)
        self._dark = dull * np.where(seen, _DIM, _UNSEEN)[..., None]
        if len(groups) > 1:
            frame = panels.crop_frames(photo.size, boxes, groups)
            self._dark[frame] += 0.3 * (np.array(CARD_INK) - self._dark[frame])
        self._more = colours + _TINT * (np.array(LIGHT_ORANGE) - colours) - self._dark

    def lit(self, level: Floats) -> Image.Image:
        """The view with each token's cell lit up to its level, 0 to 1."""
        light = np.zeros((self.size[1], self.size[0], 1))
        own = self._tokens[level[self._tokens] > 0]
        for token in own[np.argsort(level[own], kind="stable")]:
            light[self._where[token]] = level[token]
        return Image.fromarray(np.rint(self._dark + light * self._more).astype(np.uint8))


def _plain(text: str) -> str:
    """A text in one line, without what would move a cursor."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def _marked(text: str, word: str) -> tuple[str, str]:
    """The last part of a text as it is shown: what stands before its current word, and the word."""
    said, last = _plain(text), _plain(word)
    before = said[: len(said) - len(last)]
    if len(before) > _SHOWN:
        before = f"… {before[-_SHOWN:]}"
    return before, last[-_SHOWN:]


def _font(width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(SHARP * round(1.15 * panels.text_size(width)))


def _lines(before: str, word: str, width: int) -> list[list[tuple[str, bool]]]:
    """Pieces of text, and whether each is of the current word, in lines of so many pixels."""
    font, room = _font(width), width * SHARP
    found: list[list[tuple[str, bool]]] = [[]]
    used = 0.0
    for text, current in ((before, False), (word, True)):
        for piece in re.findall(r"\s*\S+|\s+$", text):
            wide = font.getlength(piece)
            if used + wide > room and found[-1]:
                found.append([])
                used, piece = 0.0, piece.lstrip()
                wide = font.getlength(piece)
            while wide > room and len(piece) > 1:
                fits = next(
                    n
                    for n in range(len(piece) - 1, 0, -1)
                    if n == 1 or (font.getlength(piece[:n]) <= room)
                )
                found[-1].append((piece[:fits], current))
                found.append([])
                piece = piece[fits:]
                wide = font.getlength(piece)
            found[-1].append((piece, current))
            used += wide
    return found


def _told(text: str, word: str, width: int, lines: int) -> Image.Image:
    """The answer so far, its last lines, with the current word marked."""
    font = _font(width)
    high = round(SHARP * 1.15 * panels.text_size(width) * 1.5)
    before, last = _marked(text, word)
    shown = _lines(before, last, width)[-min(lines, _LINES) :]
    canvas = Image.new("RGB", (width * SHARP, high * max(1, min(lines, _LINES))), CARD)
    pen = ImageDraw.Draw(canvas)
    for row, pieces in enumerate(shown):
        left = 0.0
        for piece, current in pieces:
            colour = LIGHT_ORANGE if current else CARD_FAINT
            pen.text((left, row * high + high // 2), piece, fill=colour, font=font, anchor="lm")
            left += font.getlength(piece)
    size = (width, canvas.height // SHARP)
    return canvas.resize(size, Image.Resampling.LANCZOS)
