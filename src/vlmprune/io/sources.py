"""What the command line was given, checked before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from vlmprune import embedded, spec
from vlmprune.costs import plan
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config as fields
from vlmprune.hosts.families import FAMILIES, TOWERS, generic, towers
from vlmprune.pruner import Pruner
from vlmprune.select.budget import Budget

DTYPES = ("float32", "float16", "bfloat16")

# Visual tokens to keep where nobody says how many.
KEEP = 64


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: what `from_pretrained` takes.
        folder: the local folder; None for a model of the Hub.
        model_type: of its config.
        label: as people call it.
    """

    name: str
    folder: Path | None
    model_type: str
    label: str


def find_model(model: str | None) -> Source:
    """The model asked for; by default the embedded one.

    Raises:
        VlmpruneError: there is no such model, or it is not of a supported family.
    """
    if model is None:
        folder = embedded.path()
        return Source(str(folder), folder, _supported(_local_config(folder)), "embedded model")
    folder = Path(model).expanduser()
    if folder.exists():
        return Source(str(folder), folder, _supported(_local_config(folder)), model)
    if model in plan.KNOWN:
        raise VlmpruneError(
            f"model {model!r} is an architecture for `vlmprune plan` and `bench --shape`, without "
            "weights; give a model folder or an id of the Hub."
        )
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise VlmpruneError(
            f"model path {model!r} does not exist; give a model folder, an id of the Hub such as "
            "owner/name, or no --model for the embedded model."
        )
    return Source(model, None, _supported(_hub_config(model)), model)


def _local_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise VlmpruneError(
            f"model path {str(folder)!r} has no config.json; give a folder as save_pretrained "
            "writes it."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VlmpruneError(f"{path} cannot be read as JSON ({reason(error)}).") from error
    return content if isinstance(content, dict) else {}


def _hub_config(name: str) -> dict[str, Any]:
    from vlmprune.hosts import pretrained

    try:
        return pretrained.config_of(name, local=False).to_dict()
    # Network, cache and config fail in many ways, none of which the user could treat apart.
    except Exception as error:
        raise VlmpruneError(
            f"model {name!r} is no local path, and could not be had from the local cache or the "
            f"Hub ({reason(error)})."
        ) from error


def _supported(config: dict[str, Any]) -> str:
    kind, tower, classes = fields.described(config)
    if kind not in FAMILIES and any(name.endswith(generic.SUFFIX) for name in classes):
        # Whether its layout can be followed is seen when the pruner attaches.
        return str(kind)
    if kind not in FAMILIES:
        known = ", ".join(family.cls for family in FAMILIES.values())
        raise VlmpruneError(
            f"vlmprune does not support models of type {kind!r} yet; supported: {known}."
        )
    family = FAMILIES.get(f"{kind}:{tower}") or FAMILIES[str(kind)]
    if tower is not None and tower not in TOWERS and any(map(towers.is_open, family.media)):
        raise VlmpruneError(
            f"vlmprune does not support the vision tower {tower!r} yet; supported towers: "
            f"{', '.join(TOWERS)}."
        )
    return str(kind)


def open_images(paths: Sequence[str]) -> list[Image.Image]:
    """Open pictures as people see them: turned as their EXIF says, in RGB.

    Raises:
        VlmpruneError: a path does not exist or is no picture.
    """
    images = []
    for path in paths:
        if not Path(path).exists():
            raise VlmpruneError(f"image {path!r} does not exist; give the path of a picture.")
        try:
            with Image.open(path) as image:
                images.append(ImageOps.exif_transpose(image).convert("RGB"))
        # Broken files make Pillow's decoders fail in many ways.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VlmpruneError(
                f"image {path!r} cannot be opened as a picture; give a PNG, JPEG or other file "
                "that Pillow reads."
            ) from error
    return images


def overlay_paths(target: str, images: Sequence[str]) -> list[Path]:
    """Where the pictures go: `target`, or `target`-1, -2, … for several images.

    Makes the folder, so that a path that cannot be written is found before any work.

    Raises:
        VlmpruneError: the suffix is unknown, the place cannot be written, or a picture that was
            given would be overwritten.
    """
    path = Path(target).expanduser()
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise VlmpruneError(
            f"overlay {target!r} has no suffix of a picture; use a name such as overlay.png."
        )
    names = [path]
    if len(images) > 1:
        names = [path.with_stem(f"{path.stem}-{i}") for i in range(1, len(images) + 1)]
    if not _writable(names):
        raise VlmpruneError(f"overlay {target!r} cannot be written; choose another path.")
    for name in names:
        if any(name.exists() and name.samefile(image) for image in images):
            raise VlmpruneError(f"overlay {str(name)!r} is one of the images; choose another path.")
    return names


def result_path(target: str, option: str = "--out", ending: str = ".json") -> Path:
    """Where results go; makes the folder.

    Args:
        target: as it was given.
        option: that gave it, for error sentences.
        ending: that it must have.

    Raises:
        VlmpruneError: the suffix is another, or the place cannot be written.
    """
    path = Path(target).expanduser()
    if path.suffix.lower() != ending:
        raise VlmpruneError(
            f"{option} {target!r} does not end in {ending}; use a name such as out{ending}."
        )
    if not _writable([path]):
        raise VlmpruneError(f"{option} {target!r} cannot be written; choose another path.")
    return path


def _writable(names: Sequence[Path]) -> bool:
    """Whether files of one folder can be written; makes the folder."""
    folder = names[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK) and all(
            os.access(name, os.W_OK) and not name.is_dir() for name in names if name.exists()
        )
    except OSError:
        return False


def make_pruner(method: str, settings: Mapping[str, Any]) -> Pruner:
    """The methods of a spec, its gaps filled by the command line's options.

    An option sets that setting of every method that has it and that the spec leaves open. Without
    one, a method that needs `keep` gets the default.

    Args:
        method: a spec, see `vlmprune.spec`.
        settings: values of the options by their settings' names; None where one was not given.

    Raises:
        VlmpruneError: the method, a setting of it or a value is unknown; or an option changes
            nothing.
    """
    stages = spec.read(method)
    for name, value in settings.items():
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        having = [stage for stage in stages if name in stage.names]
        unset = [stage for stage in having if name not in stage.settings]
        if not having:
            raise VlmpruneError(
                f"{option} is no setting of {', '.join(stage.name for stage in stages)}; leave it "
                "out."
            )
        if not unset:
            raise VlmpruneError(
                f"{name} is given twice, in --method {method} and by {option}; give it once."
            )
        for stage in unset:
            stage.settings[name] = value
    for stage in stages:
        if "keep" in stage.missing:
            stage.settings["keep"] = KEEP
    return spec.build(stages)


def check_budget(source: Source, pruner: Pruner) -> None:
    """Refuse a `keep` above what a crop has, where that is known without the model.

    Raises:
        VlmpruneError: there are fewer visual tokens than `keep`.
    """
    keep, budget = budget_of(pruner)
    if keep is None or source.folder is None or source.model_type not in plan.CROPS:
        return
    if budget == "crop" or source.model_type == "llava":
        plan.plan(str(source.folder), keep, budget)


def budget_of(pruner: Pruner) -> tuple[int | float | None, Budget]:
    """`keep` and `budget` of the method that sees all visual tokens; keep is None without one."""
    # Of several methods that choose, that is the first.
    stage: Any = next((one for one in pruner.links if "keep" in dir(one)), None)
    return (None, "crop") if stage is None else (stage.keep, stage.unit)


def at_least_one(**counts: int) -> None:
    """Refuse options that are below 1.

    Raises:
        VlmpruneError: one of them is.
    """
    for name, value in counts.items():
        if value < 1:
            raise VlmpruneError(f"--{name.replace('_', '-')} {value} is too few; use 1 or more.")


def check_decode(tokens: int) -> None:
    """Refuse a number of tokens that leaves no step to measure; 0 measures none.

    Raises:
        VlmpruneError: it does.
    """
    if tokens < 0 or tokens == 1:
        raise VlmpruneError(
            f"--decode-tokens {tokens} leaves no step after the first token; use 2 or more, or 0 "
            "to skip it."
        )


def choose_device(name: str | None) -> torch.device:
    """The device asked for; by default the GPU where there is one.

    Raises:
        VlmpruneError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # An absent backend fails as RuntimeError, AssertionError or NotImplementedError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise VlmpruneError(f"device {name!r} is not available here; use --device cpu.") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> Any:
    """The type of the weights; by default float32 on a CPU, else what the checkpoint says.

    Raises:
        VlmpruneError: the type is unknown.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise VlmpruneError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPES)}.")
    return getattr(torch, name)


def reason(error: Exception) -> str:
    """The first sentence of an error, for use in brackets."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def save(pictures: Sequence[Image.Image], paths: Sequence[Path]) -> None:
    """Write pictures.

    Raises:
        VlmpruneError: the disk or the format refuses.
    """
    for picture, path in zip(pictures, paths, strict=True):
        try:
            picture.save(path)
        except (OSError, ValueError) as error:
            raise VlmpruneError(
                f"overlay {str(path)!r} cannot be written ({reason(error)})."
            ) from error
