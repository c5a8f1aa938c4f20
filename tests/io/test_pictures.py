"""One way to open a picture, beside what the installed Transformers makes of the same file."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version
from PIL import Image, PngImagePlugin
from transformers import __version__ as release
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmprune import VlmpruneError
from vlmprune.io import pictures
from vlmprune.io.pictures import as_seen, open_image, open_images, size_of, to_rgb

WIDTH, HEIGHT = 24, 16
# Whether the release's processors lay transparency on white, as those from 5.21 on do.
ON_WHITE = Version(release) >= Version("5.21")
Write = Callable[[Path], Any]


def photo(seed: int = 0) -> Image.Image:
    """No two places alike, so that a turn shows; wider than high."""
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def with_alpha(mode: str = "RGBA") -> Image.Image:
    """Every alpha there is; clear pixels are black underneath, as most programs leave them."""
    alpha = np.linspace(0, 255, WIDTH * HEIGHT).astype(np.uint8).reshape(HEIGHT, WIDTH)
    base = np.asarray(photo()) * (alpha > 0)[..., None].astype(np.uint8)
    return Image.fromarray(np.dstack((base, alpha))).convert(mode)


def palette(clear: int | bytes | None) -> Image.Image:
    made = photo().quantize(16)
    if clear is not None:
        made.info["transparency"] = clear
    return made


def turned(orientation: int) -> Write:
    def write(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo().save(path, exif=exif, quality=95)

    return write


def several(path: Path) -> None:
    photo().save(path, save_all=True, append_images=[photo(1), photo(2)], lossless=True)


# File name → what writes it. What Transformers makes of these is right.
ALIKE: dict[str, Write] = {
    "plain.png": lambda path: photo().save(path),
    "plain.jpg": lambda path: photo().save(path),
    "grey.png": lambda path: photo().convert("L").save(path),
    "two.png": lambda path: photo().convert("1").save(path),
    "palette.png": lambda path: palette(None).save(path),
    "cmyk.jpg": lambda path: photo().convert("CMYK").save(path),
    "cmyk.tif": lambda path: photo().convert("CMYK").save(path),
    "ycbcr.tif": lambda path: photo().convert("YCbCr").save(path),
    "tiny.png": lambda path: Image.new("RGB", (1, 1), (9, 8, 7)).save(path),
    "narrow.png": lambda path: photo().crop((0, 0, 1, HEIGHT)).save(path),
    "frames.gif": several,
    "frames.png": several,
    "frames.webp": several,
    "frames.tif": several,
    "ints.tif": lambda path: photo().convert("L").convert("I").save(path),
    "bytes.tif": lambda path: photo().convert("L").convert("F").save(path),
    **{f"turned-{n}.jpg": turned(n) for n in range(1, 9)},
    "turned-6.png": turned(6),
    "turned-8.webp": turned(8),
    "turned-5.tif": turned(5),
}
# Such as processors lay on white, and early releases do not.
CLEAR: dict[str, Write] = {
    "rgba.png": lambda path: with_alpha().save(path),
    "la.png": lambda path: with_alpha("LA").save(path),
    "rgba.webp": lambda path: with_alpha().save(path, lossless=True),
    "rgba.tif": lambda path: with_alpha().save(path),
    "shares.png": lambda path: palette(bytes(range(0, 256, 16))).save(path),
    "index.png": lambda path: palette(3).save(path),
    "index.gif": lambda path: palette(3).save(path, transparency=3),
    "colour.png": lambda path: photo().save(path, transparency=photo().getpixel((3, 4))),
    "level.png": lambda path: photo().convert("L").save(path, transparency=120),
}


def written(path: Path, write: Write) -> Path:
    write(path)
    return path


def processed(image: Image.Image) -> np.ndarray:
    """What a processor makes of a picture before it scales it."""
    processor = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False
    )
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    return np.moveaxis(pixels, 0, -1)


@pytest.mark.parametrize("name", [*ALIKE, *CLEAR])
def test_the_processor_gets_what_it_would_make_itself(name: str, tmp_path: Path) -> None:
    """A processor with our picture, and with the file as Pillow opens it, turned."""
    path = written(tmp_path / name, {**ALIKE, **CLEAR}[name])
    mine = open_image(path)
    assert mine.mode == "RGB" and size_of(path) == mine.size
    with Image.open(path) as raw:
        raw.load()
        upright = raw.transpose(Image.Transpose.ROTATE_270) if "-6" in name else raw
        if name in ALIKE:
            assert np.array_equal(np.asarray(mine), np.asarray(load_image(str(path))))
        if "turned" not in name or "-6" in name or "-1" in name:
            same = np.array_equal(processed(mine), processed(upright))
            assert same == (name in ALIKE or ON_WHITE)
    assert np.array_equal(processed(mine), np.asarray(mine))


@pytest.mark.parametrize("name", CLEAR)
def test_transparency_is_laid_on_white(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, CLEAR[name])
    mine = np.asarray(open_image(path), dtype=float)
    with Image.open(path) as raw:
        whole = np.asarray(raw.convert("RGBA"), dtype=float)
    share = whole[..., 3:] / 255
    assert np.abs(mine - (whole[..., :3] * share + 255 * (1 - share))).max() <= 1
    assert (share == 0).any() and (mine[share[..., 0] == 0] == 255).all()
    # Control: what dropping it would show.
    assert not np.array_equal(mine, whole[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", turned(orientation))
    mine = open_image(path)
    assert mine.size == ((HEIGHT, WIDTH) if orientation > 4 else (WIDTH, HEIGHT)) == size_of(path)
    assert np.array_equal(np.asarray(mine), np.asarray(load_image(str(path))))
    assert np.array_equal(np.asarray(mine), np.asarray(photo())) == (orientation == 1)
    # A picture in memory, as harnesses hand it over, too.
    with Image.open(path) as raw:
        assert np.array_equal(np.asarray(as_seen(raw)), np.asarray(mine))
        assert raw.size == (WIDTH, HEIGHT)


def test_broken_exif_leaves_a_picture_as_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    photo().save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f\x00")
    assert open_image(path).size == size_of(path) == (WIDTH, HEIGHT)


SIXTEEN = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)


def tiff(values: np.ndarray, **tags: Any) -> bytes:
    """A TIFF of one strip, in the byte order of the values."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape
    about = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 277: 1}
    about |= {
        273: 0,
        278: height,
        279: values.nbytes,
        339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind],
    }
    about[273] = 8 + 2 + 12 * len(about) + 4
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, about[tag]) for tag in sorted(about))
    head = (b"MM\x00*" if order == ">" else b"II*\x00") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(about)) + entries + bytes(4) + values.tobytes()


def as_file(kind: str, path: Path) -> Path:
    """16-bit grey from black to white in each form that Pillow reads."""
    if kind == "png":
        Image.fromarray(SIXTEEN).save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    if kind == "pgm":
        Image.fromarray(SIXTEEN).save(path.with_suffix(".pgm"))
        return path.with_suffix(".pgm")
    values = {
        "tiff": SIXTEEN.astype("<u2"),
        "tiff-motorola": SIXTEEN.astype(">u2"),
        "tiff-32": SIXTEEN.astype("<i4"),
        "tiff-32-motorola": SIXTEEN.astype(">i4"),
        "tiff-share": (SIXTEEN / 65535).astype("<f4"),
        "tiff-float": SIXTEEN.astype("<f4"),
        "tiff-spread": (SIXTEEN.astype(np.float64) * 1000 - 7e5).astype("<f4"),
    }[kind]
    path.with_suffix(".tif").write_bytes(tiff(values))
    return path.with_suffix(".tif")


@pytest.mark.parametrize(
    "kind",
    [
        *("png", "pgm", "tiff", "tiff-motorola", "tiff-32", "tiff-32-motorola"),
        *("tiff-share", "tiff-float", "tiff-spread"),
    ],
)
def test_16_bit_grey_is_grey(kind: str, tmp_path: Path) -> None:
    path = as_file(kind, tmp_path / "a")
    mine = np.asarray(open_image(path))
    assert mine.shape == (HEIGHT, WIDTH, 3) and (mine == mine[..., :1]).all()
    assert np.abs(mine[..., 0] - SIXTEEN / 257.0).max() <= 1
    if kind in ("png", "tiff", "tiff-motorola"):
        assert np.array_equal(mine[..., 0], SIXTEEN >> 8)
    # Control: Transformers clips it.
    theirs = np.asarray(load_image(str(path)), dtype=float)
    assert np.abs(theirs[..., 0] - SIXTEEN / 257.0).mean() > 40


def test_a_dark_16_bit_file_stays_dark(tmp_path: Path) -> None:
    """What it could hold counts, not what it happens to hold."""
    dark = np.full((4, 4), 200, np.uint16)
    for name in ("a.png", "a.pgm", "a.tif"):
        Image.fromarray(dark).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name)).max() == 0


def test_a_12_bit_file_reaches_white(tmp_path: Path) -> None:
    """Pillow hands its numbers over as they are."""
    image = Image.fromarray(np.array([[0, 2048, 4095]], np.uint16))
    assert np.asarray(to_rgb(image, white=4095))[0, :, 0].tolist() == [0, 128, 255]
    data = bytearray(tiff(np.zeros((1, 3), "<u2")))
    # Three numbers of 12 bits, packed.
    data[-6:] = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])
    at = data.index(struct.pack("<HHII", 258, 4, 1, 16))
    data[at : at + 12] = struct.pack("<HHII", 258, 4, 1, 12)
    (tmp_path / "a.tif").write_bytes(data)
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_numbers_without_a_range() -> None:
    def grey(values: list[float]) -> list[int]:
        image = Image.fromarray(np.array([values], np.float32))
        return np.asarray(to_rgb(image))[0, :, 0].tolist()  # type: ignore[no-any-return]

    assert grey([0, 0.5, 1]) == [0, 127, 255]
    assert grey([0, 100, 255]) == [0, 100, 255]
    assert grey([0, 32768, 65535]) == [0, 128, 255]
    assert grey([-1, 0, 1]) == [0, 127, 255]
    assert grey([float("nan"), 0, 1]) == [0, 0, 255]
    assert grey([float("-inf"), 0, float("inf")]) == [0, 0, 255]
    assert grey([-5, -5, -5]) == [0, 0, 0]
    assert grey([float("nan")] * 3) == [0, 0, 0]


def test_transparency_of_16_bit_grey(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add(b"tRNS", struct.pack(">H", 300))
    image = Image.fromarray(np.array([[300, 301, 65535]], np.uint16))
    image.save(tmp_path / "a.png", transparency=300)
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 1, 255]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_any_mode_in_memory_and_the_picture_stays_as_it_was(mode: str) -> None:
    image = Image.new(mode, (4, 3))
    before = image.tobytes()
    assert (to_rgb(image).mode, to_rgb(image).size) == ("RGB", (4, 3))
    assert (image.mode, image.tobytes()) == (mode, before)


def png(width: int, height: int) -> bytes:
    """The head of a PNG that claims so many pixels."""
    target = io.BytesIO()
    Image.new("L", (1, 1)).save(target, "PNG")
    data = bytearray(target.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", __import__("zlib").crc32(data[12:29]))
    return bytes(data)


def cut(form: str, share: float = 0.5) -> bytes:
    target = io.BytesIO()
    photo().resize((64, 64)).save(target, form)
    return target.getvalue()[: int(share * len(target.getvalue()))]


BAD: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "is empty"),
    "words.png": (b"no picture at all", "cannot be opened as a picture; give a PNG"),
    "head.png": (b"\x89PNG\r\n\x1a\n", "cannot be opened as a picture"),
    "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be opened as a picture"),
    "bomb.png": (png(60000, 60000), "more than the 178956970 pixels that Pillow takes"),
    **{
        f"cut.{form}": (cut(form), "cannot be opened as a picture")
        for form in ("png", "jpeg", "bmp")
    },
    "cut.tiff": (cut("tiff", 0.9), "cannot be opened as a picture"),
    "cut.webp": (cut("webp"), "cannot be opened as a picture"),
}


def refused(path: Any) -> str:
    """The sentence; it says which file, and nothing else is said."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(VlmpruneError) as told:
            open_images([str(path)])
    assert heard == []
    text = str(told.value)
    assert repr(str(path)) in text and "\n" not in text and text.endswith(".")
    return text


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_told_in_one_sentence(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_paths_that_hold_no_file(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "nowhere.png")
    (tmp_path / "file").write_bytes(b"x")
    assert "does not exist" in refused(tmp_path / "file" / "a.png")
    assert "cannot be looked at" in refused("a\0b.png")
    assert "cannot be looked at" in refused("a" * 5000)
    os.mkfifo(tmp_path / "pipe.png")
    assert "is no file" in refused(tmp_path / "pipe.png")
    with pytest.raises(VlmpruneError, match="is a folder"):
        size_of(tmp_path)


def test_a_large_picture_is_opened_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.png", ALIKE["plain.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(path):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).size == size_of(path) == (WIDTH, HEIGHT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    assert f"more than the {WIDTH * HEIGHT - 2} pixels" in refused(path)


def test_what_pillow_warns_of_is_not_told(tmp_path: Path) -> None:
    """A palette with shares of transparency, which Pillow has a word on."""
    path = written(tmp_path / "a.png", CLEAR["shares.png"])
    with Image.open(path) as raw, pytest.warns(UserWarning, match="Transparency"):
        raw.convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(path)


def test_a_picture_in_memory_whose_file_is_broken_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BAD["cut.png"][0])
    with (
        Image.open(tmp_path / "a.png") as raw,
        pytest.raises(VlmpruneError, match=r"^a request's picture cannot be opened"),
    ):
        as_seen(raw, "a request's picture")


def test_any_broken_file_is_a_picture_or_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes changed at random; nothing else comes out than one of the two."""
    chance, outcomes = np.random.default_rng(0), {True: 0, False: 0}
    for form in ("png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm"):
        target = io.BytesIO()
        photo().save(target, form, **({"exif": Image.Exif()} if form == "jpeg" else {}))
        for number in range(40):
            data = np.frombuffer(target.getvalue(), np.uint8).copy()
            places = chance.integers(0, min(len(data), 300), 6)
            data[places] = chance.integers(0, 256, 6)
            path = tmp_path / f"{number}.{form}"
            path.write_bytes(data.tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    found = pictures.open_image(path).mode == "RGB"
                except VlmpruneError as error:
                    found, text = False, str(error)
                    assert "\n" not in text and text.endswith(".")
            outcomes[found] += 1
    assert min(outcomes.values()) > 20
    assert capfd.readouterr() == ("", "")
