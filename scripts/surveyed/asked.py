"""A request for any class without its processor: pixels by the names that it takes, and ids.

How many placeholders an image has is what the model's own encoding method makes of it.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surveyed.sizes import BOS, PAD, PATCH, SIDE, VOCABULARY, WORDS
from surveyed.special import special_of

STEPS = 4
# What stands around an image where a config names it.
BEFORE = ("vision_start_token_id", "image_start_token_id", "image_begin_token_id")
BEHIND = ("vision_end_token_id", "image_end_token_id")
# Batches that are tried one after the other, images by row, until the model itself takes one.
BATCHES: Sequence[Sequence[int]] = ([2, 1], [2], [1])


class UnaskableError(Exception):
    """Why no request could be made."""


@dataclass
class Request:
    """What goes into `generate`.

    Attributes:
        inputs: all of it.
        images: (row, columns) of each image in prompt order.
        logits: of the model as it is, [rows, vocabulary] a step.
    """

    inputs: dict[str, Tensor]
    images: list[tuple[int, list[int]]]
    logits: list[Tensor]

    @property
    def words(self) -> str:
        """The batch in a few words."""
        rows, number = len(self.inputs["input_ids"]), len(self.images)
        batch = "a padded batch, " if rows > 1 else ""
        return f"{batch}{number} image{'s' if number > 1 else ''}"

    @property
    def visual(self) -> Tensor:
        """[B, L] bool; where visual tokens are."""
        out = torch.zeros_like(self.inputs["input_ids"], dtype=torch.bool)
        for row, columns in self.images:
            out[row, columns] = True
        return out


def generate(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The logits of each step of a short greedy answer."""
    torch.manual_seed(0)
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # Tokens that a class suppresses have the lowest number of all.
    return [one.float().masked_fill(one < -1e30, 0.0) for one in out.logits]


def request(model: Any, kind: str, field: str | None) -> Request:
    """The largest batch that the model itself takes.

    Raises:
        UnaskableError: it takes none.
    """
    if field is None:
        raise UnaskableError("its config names no image placeholder")
    why = ""
    for rows in special_of(kind).get("batches", BATCHES):
        try:
            inputs, images = batch(model, kind, field, rows)
            logits = generate(model, inputs)
            if not all(bool(one.isfinite().all()) for one in logits):
                raise UnaskableError("its own logits are not finite")
            if len(rows) > 1 and not padded_alike(model, kind, field, rows, logits):
                raise UnaskableError("a padded row is not what it is alone")
            return Request(inputs, images, logits)
        except Exception as error:
            why = said(error)
    raise UnaskableError(why)


def said(error: BaseException) -> str:
    """An error in one line, with the place of it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"


def padded_alike(
    model: Any, kind: str, field: str, rows: Sequence[int], logits: list[Tensor]
) -> bool:
    """Whether the last row, which is padded, answers as it does alone."""
    inputs, _ = batch(model, kind, field, rows, only=len(rows) - 1)
    alone = generate(model, inputs)
    return float((alone[0][0] - logits[0][-1]).abs().max()) < 1e-3


def batch(
    model: Any, kind: str, field: str, rows: Sequence[int], only: int | None = None
) -> tuple[dict[str, Tensor], list[tuple[int, list[int]]]]:
    """Inputs, and where images are, of a batch whose row r holds `rows[r]` images.

    Args:
        model: that is asked.
        kind: its type.
        field: of the config that names the placeholder.
        rows: images by row.
        only: of all rows this one alone, with the images that are its own in the batch.
    """
    special = special_of(kind)
    token = int(getattr(model.config, field))
    total = sum(rows)
    make: Callable[..., dict[str, Tensor]] = special.get("pixels", pixels)
    every = [make(model, number) for number in range(total)]
    first = [sum(rows[:r]) for r in range(len(rows))]
    wanted = range(len(rows)) if only is None else [only]
    generator = torch.Generator().manual_seed(7)
    around = [
        [int(getattr(model.config, name)) for name in names[:] if hasattr(model.config, name)][:1]
        for names in (BEFORE, BEHIND)
    ]
    words = [torch.randint(WORDS, VOCABULARY, (40,), generator=generator).tolist() for _ in rows]
    prompts, taken = [], []
    for r in wanted:
        own, left = every[first[r] : first[r] + rows[r]], iter(words[r])
        prompt = [BOS, next(left)]
        for image in own:
            count = special.get("count", tokens)(model, image)
            prompt += [*around[0], *[token] * count, *around[1], next(left), next(left)]
            taken.append((r if only is None else 0, count))
        prompts.append(prompt + [next(left) for _ in range(5 + 2 * r)])
    ids, mask = padded(prompts)
    chosen = [one for r in wanted for one in every[first[r] : first[r] + rows[r]]]
    join = special.get("join", joined)
    inputs = {"input_ids": ids, "attention_mask": mask, **join(chosen, [rows[r] for r in wanted])}
    takes = inspect.signature(type(model).forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            inputs[name] = (ids == token).long()
    inputs |= special.get("more", lambda *_: {})(model, ids, token)
    return inputs, places(ids, token, taken)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    return ids, mask


def places(
    ids: Tensor, token: int, taken: Sequence[tuple[int, int]]
) -> list[tuple[int, list[int]]]:
    """Row and columns of each image."""
    free = [(row == token).nonzero()[:, 0].tolist() for row in ids]
    out = []
    for row, count in taken:
        out.append((row, free[row][:count]))
        free[row] = free[row][count:]
    assert not any(free)
    return out


def pixels(model: Any, number: int) -> dict[str, Tensor]:
    """One image, as the names of what the model takes say that it is to be."""
    names = set(inspect.signature(type(model).forward).parameters)
    generator = torch.Generator().manual_seed(number + 1)
    vision = getattr(model.config, "vision_config", None) or model.config
    patch = first_of(vision, ("patch_size",)) or PATCH
    channels = first_of(vision, ("num_channels", "in_channels")) or 3

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if "image_grid_thw" in names:
        merge = first_of(vision, ("spatial_merge_size", "merge_size", "merge_kernel_size")) or 2
        rows, columns = 2 * merge, (3 if number % 2 else 2) * merge
        depth = first_of(vision, ("temporal_patch_size", "patch_temporal")) or 1
        return {
            "pixel_values": noise(rows * columns, channels * depth * patch * patch),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }
    side = getattr(vision, "image_size", None) or SIDE
    height, width = side if isinstance(side, list | tuple) else (side, side)
    inputs = {"pixel_values": noise(1, channels, height, width)}
    if "spatial_shapes" in names:
        grid = 8
        inputs = {
            "pixel_values": noise(1, grid * grid, channels * patch * patch),
            "spatial_shapes": torch.tensor([[grid, grid]]),
            "pixel_attention_mask": torch.ones(1, grid * grid, dtype=torch.long),
        }
    elif "pixel_attention_mask" in names:
        inputs["pixel_values"] = inputs["pixel_values"][None]
        inputs["pixel_attention_mask"] = torch.ones(1, 1, height, width, dtype=torch.long)
    elif "pixtral" in getattr(vision, "model_type", "") and "image_sizes" in names:
        inputs["image_sizes"] = torch.tensor([[height, width]])
    return inputs


def first_of(config: Any, names: Sequence[str]) -> int:
    """The first of some fields that a config has; of several numbers the first; else 0."""
    found = next((getattr(config, name) for name in names if getattr(config, name, None)), 0)
    return int(found[0] if isinstance(found, list | tuple) else found)


def joined(images: Sequence[dict[str, Tensor]], rows: Sequence[int]) -> dict[str, Tensor]:
    """The inputs of several images, behind one another; by row where each has a row of its own."""
    if "pixel_attention_mask" in images[0] and images[0]["pixel_values"].ndim == 5:
        most, out, start = max(rows), {}, 0
        for name in images[0]:
            parts = []
            start = 0
            for count in rows:
                own = torch.cat([one[name] for one in images[start : start + count]], dim=1)
                filled = own.new_zeros(1, most - count, *own.shape[2:])
                parts.append(torch.cat((own, filled), dim=1))
                start += count
            out[name] = torch.cat(parts)
        return out
    return {name: torch.cat([one[name] for one in images]) for name in images[0]}


def tokens(model: Any, image: dict[str, Tensor]) -> int:
    """Visual tokens of an image: rows of what the model's own encoding method returns."""
    encode = getattr(model.base_model, "get_image_features", None) or getattr(
        model, "get_image_features", None
    )
    if encode is None:
        raise UnaskableError("it has no get_image_features")
    takes = inspect.signature(encode).parameters
    free = any(one.kind is one.VAR_POSITIONAL for one in takes.values())
    given = {name: one for name, one in image.items() if free or name in takes}
    with torch.no_grad():
        return rows_of(encode(**given))


def rows_of(output: Any) -> int:
    """Rows of features in whatever an encoding method returns."""
    found = getattr(output, "pooler_output", None)
    if found is None and getattr(output, "deepstack_features", None):
        found = output.deepstack_features[0][1]
    if found is None:
        found = getattr(output, "last_hidden_state", None) if hasattr(output, "keys") else output
    if isinstance(found, Tensor):
        return found.numel() // found.shape[-1]
    if isinstance(found, list | tuple):
        return sum(rows_of(one) for one in found)
    raise UnaskableError(f"its get_image_features returns {type(output).__name__}")
