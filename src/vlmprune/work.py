"""What `bench` gives all ways to do: a model that is loaded or made up, and prompts for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vlmprune import embedded, shapes, sources
from vlmprune.budget import resolve_keep
from vlmprune.errors import VlmpruneError
from vlmprune.loading import enough_memory, load, prepare_batch
from vlmprune.pruner import Pruner

# What is asked about pictures that were given; the packaged scenes bring their own questions.
_QUESTION = "what is in the picture?"


@dataclass(frozen=True)
class Work:
    """What every way has to do.

    Attributes:
        model: the host, in eval mode.
        inputs: from its processor, with `input_ids` [B, L].
        label: of the model, as people call it.
        images: pictures of each prompt.
    """

    model: Any
    inputs: Any
    label: str
    images: int


def from_shape(
    name: str,
    pruners: Mapping[str, Pruner],
    device: torch.device,
    dtype: Any,
    batch: int,
    images: int | list[Image.Image],
    visual_tokens: int | None,
    text_tokens: int,
    new_tokens: int,
    say: Callable[[str], None] = lambda message: None,
) -> Work:
    """Make a model of a known shape with random weights, and prompts for it.

    Args:
        name: one of `shapes.NAMES`.
        pruners: the methods, whose `keep` must not be above what there is.
        device: where to.
        dtype: of the weights; "auto" is bfloat16.
        batch: rows.
        images: made-up pictures of each prompt.
        visual_tokens: instead of `images`, as many as have this many visual tokens.
        text_tokens: words of each prompt.
        new_tokens: that are to be generated.
        say: told what happens, for a progress line.

    Raises:
        VlmpruneError: the shape is unknown or does not fit the memory, a `keep` is too high, or
            real pictures were given; all of it before anything is made.
    """
    config = shapes.config_of(name)
    if not isinstance(images, int):
        raise VlmpruneError("--shape makes its own pictures; give --images a number.")
    if visual_tokens is not None:
        images = shapes.images_for(config, visual_tokens)
    dtype = torch.bfloat16 if dtype == "auto" else dtype
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    for pruner in pruners.values():
        keep, budget = sources.budget_of(pruner)
        if keep is not None:
            crops = shapes.crops_of(config) if budget == "image" else 1
            resolve_keep(keep, crops * patches, budget)
    row = images * shapes.tokens_per_image(config) + text_tokens + new_tokens
    shapes.check_memory(name, config, device, dtype, batch * row)
    say(f"Making {name}…")
    with enough_memory(device):
        model = shapes.build(config, device, dtype)
        inputs = shapes.prompt(model, batch, images, text_tokens)
    return Work(model, inputs, f"{name} shape, random weights", images)


def from_model(
    source: sources.Source,
    device: torch.device,
    dtype: Any,
    batch: int,
    images: int | list[Image.Image],
) -> Work:
    """Load a model and ask it about pictures.

    Args:
        source: from `sources.find_model`.
        device: where to.
        dtype: of the weights.
        batch: rows.
        images: pictures of each prompt, or how many of the packaged scenes each prompt gets;
            scenes differ from row to row.

    Raises:
        VlmpruneError: the model cannot be loaded.
    """
    loaded = load(source, device, dtype)
    if isinstance(images, int):
        pictures, questions = _scenes(batch, images)
    else:
        pictures, questions = [images] * batch, [_QUESTION] * batch
    inputs = prepare_batch(loaded, pictures, questions)
    return Work(loaded.model, inputs, source.label, len(pictures[0]))


def _scenes(batch: int, images: int) -> tuple[list[list[Image.Image]], list[str]]:
    """For each row the next few of the packaged scenes, and a question about the first of them."""
    folder = embedded.scenes()
    listed = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    rows = [
        [listed[(row * images + i) % len(listed)] for i in range(images)] for row in range(batch)
    ]
    files = {one["file"] for row in rows for one in row}
    opened = {file: sources.open_images([str(folder / file)])[0] for file in files}
    pictures = [[opened[one["file"]] for one in row] for row in rows]
    return pictures, [row[0]["questions"][0]["question"] for row in rows]


def parse_images(given: list[str]) -> int | list[Image.Image]:
    """What `--images` means: one number of scenes, or the paths of pictures.

    Raises:
        VlmpruneError: a number below 1, or a path that holds no picture.
    """
    if len(given) == 1 and given[0].lstrip("+-").isdecimal():
        sources.at_least_one(images=int(given[0]))
        return int(given[0])
    return sources.open_images(given)


def parse_methods(specs: list[str]) -> dict[str, Pruner]:
    """The pruners by their specs.

    Raises:
        VlmpruneError: a spec is wrong or given twice.
    """
    pruners: dict[str, Pruner] = {}
    for text in specs:
        if text in pruners:
            raise VlmpruneError(f"--method {text} is given twice; give it once.")
        pruners[text] = sources.make_pruner(text, {})
    return pruners
