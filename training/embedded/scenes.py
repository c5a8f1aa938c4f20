"""Scenes: a crop of a photograph with symbols and numbered signs on an invisible 4 x 4 grid.

Everything follows from `(seed, index)`: the same pair gives the same picture on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from assets import SYMBOLS, Assets
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

SIDE = 224
GRID = 4
CELL = SIDE // GRID
PATCH = 14
PATCHES = SIDE // PATCH
SIGN = "sign"
NAMES: tuple[str, ...] = (*SYMBOLS, SIGN)
"""What a cell can hold; in labels, name `i` is `i + 1` and 0 is an empty cell."""

SIGN_COLOURS = (("white", "black"), ("gold", "black"))
SMALL_SIGN_COLOURS = (*SIGN_COLOURS, ("navy", "white"), ("darkgreen", "white"))
STYLES = ("plain", "small signs", "many signs", "clutter")
"""Kinds of scenes. Small signs lie at jittered places and are never read; see `small_sign`."""


@dataclass(frozen=True)
class Placed:
    """One symbol: its cell (row and column from 0), its name, and the number if it is a sign."""

    row: int
    column: int
    name: str
    number: int | None = None


@dataclass
class Scene:
    """A picture and what is in it.

    Attributes:
        image: RGB, 224 x 224 pixels.
        placed: the symbols in reading order, at most one a cell.
        cover: `[16, 16]` int8; per patch the label of the name that covers a good part of it, or 0.
        half: `[16, 16]` int8; for signs, 1 where the tens digit is and 2 where the unit is.
    """

    image: Image.Image
    placed: list[Placed]
    cover: np.ndarray = field(repr=False)
    half: np.ndarray = field(repr=False)

    def cells(self) -> np.ndarray:
        """Labels by cell, `[4, 4]` int64: 0 empty, else 1 + index in `NAMES`."""
        grid = np.zeros((GRID, GRID), dtype=np.int64)
        for thing in self.placed:
            grid[thing.row, thing.column] = 1 + NAMES.index(thing.name)
        return grid


def contents(rng: np.random.Generator, style: str = "plain") -> list[Placed]:
    """Draw what a scene holds: 4 to 9 things, repeats likely, at most two signs (or many)."""
    amount = int(rng.integers(4, 10))
    pool = list(SYMBOLS)
    rng.shuffle(pool)
    names: list[str] = []
    signs = int(rng.choice([0, 1, 2], p=[0.2, 0.6, 0.2]))
    if style == "many signs":
        signs, amount = int(rng.integers(5, 9)), 10
    while len(names) < amount - signs:
        repeat = int(rng.choice([1, 2, 3, 4], p=[0.62, 0.14, 0.12, 0.12]))
        names += [pool.pop()] * repeat
    names = names[: amount - signs] + [SIGN] * signs
    cells = sorted(zip(rng.permutation(GRID * GRID)[:amount].tolist(), names, strict=True))
    return [
        Placed(c // GRID, c % GRID, n, int(rng.integers(20, 100)) if n == SIGN else None)
        for c, n in cells
    ]


def background(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random square crop of the photograph, mirrored, brightened and coloured by chance."""
    short = min(photo.size)
    side = int(short * rng.uniform(0.4, 1.0))
    x = int(rng.integers(0, photo.width - side + 1))
    y = int(rng.integers(0, photo.height - side + 1))
    crop = photo.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        crop = enhance(crop).enhance(float(rng.uniform(0.7, 1.25)))
    return crop


def clutter(assets: Assets, photos: Sequence[str], rng: np.random.Generator) -> Image.Image:
    """A busy background: recoloured photographs, and shapes over them that are no symbols."""

    def photo() -> Image.Image:
        made = background(assets.photo(photos[int(rng.integers(len(photos)))]), rng)
        if rng.random() < 0.5:
            hue, *others = made.convert("HSV").split()
            shift = int(rng.integers(256))
            hue = hue.point(lambda value: (value + shift) % 256)
            made = Image.merge("HSV", (hue, *others)).convert("RGB")
        return made

    image = photo()
    for _ in range(int(rng.integers(6, 19))):
        width, height = (int(v) for v in rng.integers(8, 60, size=2))
        mask = Image.new("L", (width, height), 0)
        pen, box, kind = ImageDraw.Draw(mask), (0, 0, width - 1, height - 1), int(rng.integers(4))
        if kind == 0:
            pen.ellipse(box, fill=255)
        elif kind == 1:
            pen.rounded_rectangle(box, radius=int(rng.integers(12)), fill=255)
        elif kind == 2:
            corners = rng.integers(0, (width, height), size=(int(rng.integers(3, 7)), 2))
            pen.polygon([(int(x), int(y)) for x, y in corners], fill=255)
        else:
            letters = "".join(rng.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), size=2))
            pen.text((0, 0), letters, fill=255, font=ImageFont.load_default(size=height))
        colour = tuple(int(v) for v in rng.integers(256, size=3))
        flat = rng.random() < 0.5
        fill = Image.new("RGB", mask.size, colour) if flat else photo().resize(mask.size)
        turn = float(rng.uniform(0, 360))
        mask, fill = mask.rotate(turn, expand=True), fill.rotate(turn, expand=True)
        x, y = int(rng.integers(-20, SIDE - 10)), int(rng.integers(-20, SIDE - 10))
        image.paste(fill, (x, y), mask)
    return image


def sign(number: int, rng: np.random.Generator, scale: int = 1) -> Image.Image:
    """A board with a two-digit number that fills its cell, RGBA, 56 pixels a side times `scale`.

    Each digit covers two patches by four. Signs that are smaller or lie at jittered places are
    beyond what a linear reading of the vision features can tell apart.
    """
    ground, ink = SIGN_COLOURS[int(rng.integers(len(SIGN_COLOURS)))]
    board = Image.new("RGBA", (CELL * scale, CELL * scale), (0, 0, 0, 0))
    draw = ImageDraw.Draw(board)
    corners = (2 * scale, 2 * scale, (CELL - 2) * scale - 1, (CELL - 2) * scale - 1)
    draw.rounded_rectangle(corners, radius=6 * scale, fill=ground, outline=ink, width=2 * scale)
    font = ImageFont.load_default(size=64 * scale)
    for place, digit in enumerate(str(number)):
        glyph = Image.new("L", (100 * scale, 100 * scale), 0)
        middle = (50 * scale, 50 * scale)
        bold = {"fill": 255, "anchor": "mm", "stroke_width": 2 * scale}
        ImageDraw.Draw(glyph).text(middle, digit, font=font, **bold)
        size = ((12 if digit == "1" else 20) * scale, 40 * scale)
        glyph = glyph.crop(glyph.getbbox()).resize(size, Image.Resampling.LANCZOS)
        left = (16 if place == 0 else 40) * scale - glyph.width // 2
        board.paste(Image.new("RGBA", glyph.size, ink), (left, 8 * scale), glyph)
    return board


def small_sign(number: int, rng: np.random.Generator, scale: int = 1) -> Image.Image:
    """A board of about 50 x 40 pixels: named like any symbol, its number too small to be read."""
    width, height = int(rng.integers(46, 54)) * scale, int(rng.integers(36, 46)) * scale
    ground, ink = SMALL_SIGN_COLOURS[int(rng.integers(len(SMALL_SIGN_COLOURS)))]
    board = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(board)
    frame = {"radius": 6 * scale, "fill": ground, "outline": ink, "width": 2 * scale}
    draw.rounded_rectangle((0, 0, width - 1, height - 1), **frame)
    font = ImageFont.load_default(size=int(rng.integers(32, 37)) * scale)
    bold = {"fill": ink, "stroke_width": scale, "stroke_fill": ink}
    draw.text((width / 2, height / 2), str(number), font=font, anchor="mm", **bold)
    return board


def symbol(picture: Image.Image, rng: np.random.Generator, scale: int = 1) -> Image.Image:
    """The symbol, 38 to 52 pixels (times `scale`) on its longer side, turned a little."""
    zoom = int(rng.integers(38, 53)) * scale / max(picture.size)
    size = (max(8, round(picture.width * zoom)), max(8, round(picture.height * zoom)))
    turned = picture.resize(size, Image.Resampling.LANCZOS).rotate(
        float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC, expand=True
    )
    turned = turned.crop(turned.getchannel("A").getbbox())
    if max(turned.size) > CELL * scale:
        turned.thumbnail((CELL * scale, CELL * scale))
    return turned


def compose(
    base: Image.Image,
    placed: Sequence[Placed],
    assets: Assets,
    rng: np.random.Generator,
    scale: int = 1,
    draw_sign: Callable = sign,
) -> Scene:
    """Draw the things onto `base` (224 pixels a side, times `scale`), jittered in their cells."""
    image, cell, side, patch = base.copy(), CELL * scale, SIDE * scale, PATCH * scale
    cover = np.zeros((PATCHES, PATCHES), dtype=np.int8)
    half = np.zeros((PATCHES, PATCHES), dtype=np.int8)
    for thing in placed:
        number = thing.number
        if number is None:
            part = symbol(assets.symbol(thing.name), rng, scale)
        else:
            part = draw_sign(number, rng, scale)
        x = thing.column * cell + int(rng.integers(0, cell - part.width + 1))
        y = thing.row * cell + int(rng.integers(0, cell - part.height + 1))
        image.paste(part, (x, y), part)
        alpha = np.zeros((side, side))
        alpha[y : y + part.height, x : x + part.width] = np.asarray(part.getchannel("A")) / 255
        share = alpha.reshape(PATCHES, patch, PATCHES, patch).mean((1, 3))
        covered = share > 0.3
        cover[covered] = 1 + NAMES.index(thing.name)
        if number is not None:
            middle = (x + part.width / 2) / patch
            left = np.arange(PATCHES)[None, :] + 0.5 < middle
            half[covered & left] = 1
            half[covered & ~left] = 2
    return Scene(image, list(placed), cover, half)


def scene(
    index: int, seed: int, photos: Sequence[str], assets: Assets, style: str = "plain"
) -> Scene:
    """Scene number `index` of the set `seed`, on one of the named photographs."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: one of {', '.join(STYLES)}")
    rng = np.random.default_rng([seed, index])
    if style == "clutter":
        base = clutter(assets, photos, rng)
    else:
        base = background(assets.photo(photos[int(rng.integers(len(photos)))]), rng)
    things = contents(rng, style)
    draw_sign = small_sign if style == "small signs" else sign
    return compose(base, things, assets, rng, draw_sign=draw_sign)
