"""What `bench` gives all ways to do: a model that is loaded or made up, and prompts for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vlmprune import embedded, spec
from vlmprune.errors import VlmpruneError
from vlmprune.io import options, sources
from vlmprune.io.models import enough_memory, load, prepare_batch
from vlmprune.io.pictures import open_image, open_images
from vlmprune.pruner import Pruner
from vlmprune.study.bench import shapes

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
    batches: Sequence[int],
    images: int | list[Image.Image],
    visual_tokens: Sequence[int],
    text_tokens: int,
    new_tokens: int,
    say: Callable[[str], None] = lambda message: None,
    layers: int | None = None,
    tower_layers: int | None = None,
) -> Iterator[Work]:
    """Make a model of a known shape with random weights, and prompts for it.

    Args:
        name: one of `shapes.NAMES`.
        pruners: the methods, whose `keep` must not be above what there is.
        device: where to.
        dtype: of the weights; "auto" is bfloat16.
        batches: rows, one work for each.
        images: made-up pictures of each prompt.
        visual_tokens: instead of `images`, as many as have so many visual tokens, or one picture
            of so many of a model that takes any size; one work for each. Empty for `images`.
        text_tokens: words of each prompt.
        new_tokens: that are to be generated.
        say: told what happens, for a progress line.
        layers: only so many of the language model's layers.
        tower_layers: only so many of the vision tower's.

    Returns:
        The works, tokens by tokens and in each batch by batch, made as they are asked for; the
        model is the same.

    Raises:
        VlmpruneError: the shape is unknown or does not fit the memory, or real pictures were
            given; all of it before anything is made.
    """
    config = shapes.config_of(name, layers, tower_layers)
    if not isinstance(images, int):
        raise VlmpruneError("--shape makes its own pictures; give --images a number.")
    dtype = torch.bfloat16 if dtype == "auto" else dtype
    one = [shapes.tokens_per_image(config)] if not visual_tokens else list(visual_tokens)
    counts = [shapes.images_for(config, n) if visual_tokens else images for n in one]
    rows = [
        count * shapes.tokens_per_image(config, n) for count, n in zip(counts, one, strict=True)
    ]
    most = max(batches) * (max(rows) + text_tokens + new_tokens)
    shapes.check_memory(name, config, device, dtype, most)
    say(f"Making {name}…")
    with enough_memory(device):
        model = shapes.build(config, device, dtype)
    label = f"{name} shape, random weights"
    some = shapes.depths(config)
    if some != (all_of := shapes.depths(shapes.config_of(name))):
        label += f", {some[0]} of {all_of[0]} decoder and {some[1]} of {all_of[1]} vision layers"

    def made() -> Iterator[Work]:
        for count, n in zip(counts, one, strict=True):
            for batch in batches:
                with enough_memory(device):
                    inputs = shapes.prompt(model, batch, count, text_tokens, visual_tokens=n)
                yield Work(model, inputs, label, count)

    return made()


def from_model(
    source: sources.Source,
    device: torch.device,
    dtype: Any,
    batches: Sequence[int],
    images: int | list[Image.Image],
) -> Iterator[Work]:
    """Load a model and ask it about pictures.

    Args:
        source: from `sources.find_model`.
        device: where to.
        dtype: of the weights.
        batches: rows, one work for each.
        images: pictures of each prompt, or how many of the packaged scenes each prompt gets;
            scenes differ from row to row.

    Returns:
        The works, with the same model.

    Raises:
        VlmpruneError: the model cannot be loaded, or the scenes are not installed.
    """
    if isinstance(images, int):
        # So that it is told before any work.
        embedded.scenes()
    loaded = load(source, device, dtype)

    def made() -> Iterator[Work]:
        for batch in batches:
            if isinstance(images, int):
                pictures, questions = _scenes(batch, images)
            else:
                pictures, questions = [images] * batch, [_QUESTION] * batch
            inputs = prepare_batch(loaded, pictures, questions)
            yield Work(loaded.model, inputs, source.label, len(pictures[0]))

    return made()


def _scenes(batch: int, images: int) -> tuple[list[list[Image.Image]], list[str]]:
    """For each row the next few of the packaged scenes, and a question about the first of them."""
    folder = embedded.scenes()
    listed = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    rows = [
        [listed[(row * images + i) % len(listed)] for i in range(images)] for row in range(batch)
    ]
    files = {one["file"] for row in rows for one in row}
    opened = {file: open_image(folder / file) for file in files}
    pictures = [[opened[one["file"]] for one in row] for row in rows]
    return pictures, [row[0]["questions"][0]["question"] for row in rows]


def parse_images(given: list[str]) -> int | list[Image.Image]:
    """What `--images` means: one number of scenes, or the paths of pictures.

    Raises:
        VlmpruneError: a number below 1, or a path that holds no picture.
    """
    if len(given) == 1 and given[0].lstrip("+-").isdecimal():
        options.at_least_one(images=int(given[0]))
        return int(given[0])
    return open_images(given)


def parse_methods(specs: list[str]) -> dict[str, Pruner]:
    """The pruners by their specs.

    Raises:
        VlmpruneError: a spec is wrong, given twice, or of a method for videos.
    """
    pruners: dict[str, Pruner] = {}
    for text in specs:
        if text in pruners:
            raise VlmpruneError(f"--method {text} is given twice; give it once.")
        options.check_pictures(spec.read(text))
        pruners[text] = options.make_pruner(text, {})
    return pruners
