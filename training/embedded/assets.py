"""Where the training pictures come from: emoji artwork and the photographs inside two packages.

Nothing of this is shipped but a few demonstration scenes. The emoji are Noto Color Emoji as
packaged in npm's `emoji-datasource-google`; the photographs lie inside the installed scikit-image
and scikit-learn.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"

SYMBOLS: dict[str, str] = {
    "dog": "1f436",
    "cat": "1f431",
    "car": "1f697",
    "apple": "1f34e",
    "tree": "1f333",
    "house": "1f3e0",
    "banana": "1f34c",
    "ball": "26bd",
    "fish": "1f41f",
    "lion": "1f981",
    "sunflower": "1f33b",
    "cake": "1f382",
    "rocket": "1f680",
    "key": "1f511",
    "burger": "1f354",
    "snake": "1f40d",
    "bird": "1f426",
    "gift": "1f381",
    "guitar": "1f3b8",
    "mushroom": "1f344",
    "star": "2b50",
    "heart": "2764-fe0f",
    "clock": "23f0",
    "bell": "1f514",
    "boat": "26f5",
    "crown": "1f451",
    "balloon": "1f388",
    "frog": "1f438",
    "robot": "1f916",
    "pizza": "1f355",
    "umbrella": "2602-fe0f",
    "train": "1f682",
}
"""Name of each symbol and the code point of its picture."""


@dataclass(frozen=True)
class Photo:
    """One photograph: the package it lies in, its path there, and its licence."""

    package: str
    file: str
    licence: str


TRAIN_PHOTOS: dict[str, Photo] = {
    "chelsea": Photo("skimage", "data/chelsea.png", "CC0, Stefan van der Walt"),
    "hubble": Photo("skimage", "data/hubble_deep_field.jpg", "public domain, NASA"),
    "retina": Photo("skimage", "data/retina.jpg", "CC0, Mikael Häggström"),
    "tissue": Photo("skimage", "data/ihc.png", "no known copyright restrictions"),
    "motorcycle": Photo("skimage", "data/motorcycle_left.png", "none stated, Middlebury 2014"),
    "brick": Photo("skimage", "data/brick.png", "CC0, CC0Textures"),
    "gravel": Photo("skimage", "data/gravel.png", "CC0, CC0Textures"),
    "camera": Photo("skimage", "data/camera.png", "CC0, Lav Varshney"),
    "coins": Photo("skimage", "data/coins.png", "no known copyright restrictions"),
    "moon": Photo("skimage", "data/moon.png", "none stated"),
    "page": Photo("skimage", "data/page.png", "none stated"),
    "clock": Photo("skimage", "data/clock_motion.png", "public domain, Stefan van der Walt"),
    "china": Photo("sklearn", "datasets/images/china.jpg", "CC BY 2.0, danielbuechele"),
    "flower": Photo("sklearn", "datasets/images/flower.jpg", "CC BY 2.0, vultilion"),
}
"""Backgrounds of the training scenes."""

CLUTTER_PHOTOS: dict[str, Photo] = TRAIN_PHOTOS | {
    "hopper": Photo("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "public domain, US Navy")
}
"""Backgrounds of the cluttered training scenes."""

HELD_OUT_PHOTOS: dict[str, Photo] = {
    "astronaut": Photo("skimage", "data/astronaut.png", "public domain, NASA"),
    "coffee": Photo("skimage", "data/coffee.png", "CC0, Rachel Michetti"),
    "rocket": Photo("skimage", "data/rocket.jpg", "public domain, SpaceX"),
    "grass": Photo("skimage", "data/grass.png", "CC0, linolafett"),
}
"""Backgrounds of the validation, test and demonstration scenes; never trained on."""


class Assets:
    """The pictures, read once and kept.

    Args:
        folder: where the emoji package is, or will be, unpacked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.emoji_folder = folder / "package" / "img" / "google" / "64"
        if not self.emoji_folder.is_dir():
            fetch_emoji(folder)

    @cache  # noqa: B019 - one instance lives as long as the process
    def symbol(self, name: str) -> Image.Image:
        """The symbol's picture, RGBA, 64 x 64, cropped to what is not transparent."""
        file = self.emoji_folder / f"{SYMBOLS[name]}.png"
        if not file.is_file():
            raise FileNotFoundError(f"{EMOJI_PACKAGE} has no picture {SYMBOLS[name]} ({name})")
        picture = Image.open(file).convert("RGBA")
        return picture.crop(picture.getchannel("A").getbbox())

    @cache  # noqa: B019
    def photo(self, name: str) -> Image.Image:
        """The photograph, RGB, in its own size."""
        return Image.open(photo_path({**CLUTTER_PHOTOS, **HELD_OUT_PHOTOS}[name])).convert("RGB")


def photo_path(photo: Photo) -> Path:
    """File of a photograph inside its installed package."""
    spec = importlib.util.find_spec(photo.package)
    name = {"skimage": "scikit-image", "sklearn": "scikit-learn"}.get(photo.package, photo.package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed: its photographs are the backgrounds")
    file = Path(spec.origin).parent / photo.file
    if not file.is_file():
        raise FileNotFoundError(f"the installed {name} lacks {photo.file}; install a newer release")
    return file


def fetch_emoji(folder: Path) -> None:
    """Download the emoji package with npm and unpack its 64-pixel pictures into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is not installed: unpack {EMOJI_PACKAGE} into {folder} yourself, "
            "so that package/img/google/64 lies there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [npm, "pack", EMOJI_PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"npm pack {EMOJI_PACKAGE} failed: {done.stderr.strip()[-500:]}")
    archive = folder / done.stdout.strip().splitlines()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
