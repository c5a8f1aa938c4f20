"""The zoo is what the other tests stand on: its requests fit its models, and images matter."""

from __future__ import annotations

import importlib
import inspect
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmprune.runtime.family import family_of
from zoo import WINDOWED, ZOO, Modality, Request, crops, pixtral, placed, qwen, tiles

STEPS = 3

CASES = [
    (family, modality, side)
    for family, entry in ZOO.items()
    for modality, side in product(entry.modalities, ["left", "right"])
]


def rows_of(family: str, modality: Modality) -> list[list[Modality]]:
    """A padded batch: several images in a row, and a row without any where that is possible."""
    if ZOO[family].images_first:
        return [["image", "image"], ["image"], ["image"]]
    return [[modality, "image"], [modality], []]


def logits(model: Any, req: Request) -> torch.Tensor:
    """[steps, B, V] logits of the new tokens."""
    result = model.generate(
        **req.inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    length = req.inputs["input_ids"].shape[1]
    assert result.sequences.shape[1] == length + STEPS
    return torch.stack(result.logits)


@pytest.mark.parametrize(("family", "modality", "side"), CASES)
def test_each_image_matters_to_its_row_alone(family: str, modality: Any, side: str) -> None:
    entry = ZOO[family]
    model = entry.build()
    rows = rows_of(family, modality)
    req = entry.request(model, rows, text=[3, 5, 4], side=side)
    assert bool((req.inputs["attention_mask"] == 0).any())
    plain = logits(model, req)[0]
    for (name, where), row in zip(req.pixels, req.rows, strict=True):
        pixels = req.inputs[name].clone()
        pixels[where] = pixels[where].flip(0).neg()
        other = Request(**(vars(req) | {"inputs": req.inputs | {name: pixels}}))
        changed = (logits(model, other)[0] - plain).abs().amax(dim=1)
        assert float(changed[row]) > 1e-3
        changed[row] = 0
        assert float(changed.max()) < 1e-5


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_placeholder_gets_a_feature(family: str, attention: str) -> None:
    entry = ZOO[family]
    model = entry.build(attention)
    rows = rows_of(family, entry.modalities[-1])
    req = entry.request(model, rows)
    for modality in entry.modalities:
        if modality not in req.modalities:
            continue
        columns = int((req.inputs["input_ids"] == entry.placeholder(modality)).sum())
        lengths = [
            n for n, kind in zip(req.lengths, req.modalities, strict=True) if kind == modality
        ]
        assert columns == sum(lengths) > 0
        assert columns == features(model, req, modality)


def features(model: Any, req: Request, modality: str) -> int:
    """How many features a family makes of all images, or all videos, of a request."""
    method = getattr(model.base_model, f"get_{modality}_features")
    first, *takes = inspect.signature(method).parameters
    given = {k: v for k, v in req.inputs.items() if k in takes and "pixel_values" not in k}
    if "image_sizes" in req.inputs and modality == "image":
        given["image_sizes"] = req.inputs["image_sizes"]  # in LLaVA of early 5.x, not in `takes`
    if model.config.model_type == "llama4":
        given["vision_feature_select_strategy"] = "default"  # early 5.x insists on it
    # By place: early 5.x releases call a video's pixels pixel_values, too.
    name = next(
        n for (n, _), kind in zip(req.pixels, req.modalities, strict=True) if kind == modality
    )
    assert first.startswith("pixel_values")
    with torch.no_grad():
        output = method(req.inputs[name], **given, return_dict=True)
    # Llama 4 projects later, and has no pooled output until then.
    made = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    parts = [made] if isinstance(made, torch.Tensor) else made
    count = sum(part.shape[:-1].numel() for part in parts)
    early = "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters
    if modality == "video" and model.config.model_type == "llava_onevision" and early:
        # Early 5.x releases add each video's newline in the forward.
        count += req.modalities.count("video")
    return count


@pytest.mark.parametrize("family", ZOO)
def test_images_differ_in_size_where_the_family_allows_it(family: str) -> None:
    entry = ZOO[family]
    model = entry.build()
    req = entry.request(model, [["image"], ["image"], ["image"]])
    (images,) = (one for one in family_of(model).media if one.kind == "image")
    # An image that is resized, or cropped, to one square.
    assert (len(set(req.lengths)) == 1) == (images.overlay in ("whole", "square"))


@pytest.mark.parametrize("family", ZOO)
def test_decoders_share_keys_among_heads(family: str) -> None:
    config = ZOO[family].build().config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        # All heads share one latent.
        return
    # Where each layer has a number of its own, the config as a whole tells none.
    each = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
    assert all(one.num_key_value_heads < one.num_attention_heads for one in each)


@pytest.mark.parametrize("family", ZOO)
def test_a_seed_repeats(family: str) -> None:
    entry = ZOO[family]
    one, two, other = (entry.build(seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    first, second = (model.get_output_embeddings().weight for model in (one, other))
    assert not torch.equal(first, second)
    once, again = (entry.request(one, [["image"]]).inputs for _ in range(2))
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def processed(family: str) -> dict[str, torch.Tensor]:
    """What the family's own image processor makes of images of the zoo's sizes, one a row."""
    module, name, sizes, settings, given = PROCESSORS[family]
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    processor = cls(**settings)
    pictures = [Image.fromarray(np.full((h, w, 3), 99, dtype=np.uint8)) for h, w in sizes]
    if family not in ("idefics3", "smolvlm"):
        return dict(processor(pictures, **given, return_tensors="pt"))
    # A size of its own for each image, as the longest edge is what these resize to.
    each = [
        processor([[p]], size={"longest_edge": max(p.size)}, return_tensors="pt") for p in pictures
    ]
    counts = torch.tensor([one["pixel_values"].shape[1] for one in each])
    return {"tiles": counts, "pixel_values": each[2]["pixel_values"][0]}


ANY = {"image_grid_pinpoints": crops.PINPOINTS}
SQUARE = {"height": crops.SIDE, "width": crops.SIDE}
TILE = {"height": tiles.SIDE, "width": tiles.SIDE}
TILED = [(rows * tiles.SIDE, columns * tiles.SIDE) for rows, columns in tiles.GRIDS]
FLEXIBLE = [(h * qwen.PATCH, w * qwen.PATCH) for _, h, w in qwen.IMAGES]
_QWEN = (
    "qwen2_vl.image_processing_pil_qwen2_vl",
    "Qwen2VLImageProcessorPil",
    FLEXIBLE,
    {
        "patch_size": qwen.PATCH,
        "merge_size": qwen.MERGE,
        "size": {"shortest_edge": 64, "longest_edge": 10000},
    },
    {},
)
_GLM = ("glm4v.image_processing_pil_glm4v", "Glm4vImageProcessorPil", *_QWEN[2:])
_GOT = (
    "got_ocr2.image_processing_pil_got_ocr2",
    "GotOcr2ImageProcessorPil",
    TILED,
    {"size": TILE, "crop_to_patches": True, "min_patches": 1, "max_patches": 6},
    {},
)
_IDEFICS = (
    "idefics3.image_processing_pil_idefics3",
    "Idefics3ImageProcessorPil",
    TILED,
    {"max_image_size": {"longest_edge": tiles.SIDE}},
    {},
)


def _pixtral(step: int) -> tuple[Any, ...]:
    return (
        "pixtral.image_processing_pil_pixtral",
        "PixtralImageProcessorPil",
        [(rows * step, columns * step) for rows, columns in pixtral.OWN],
        {"size": {"longest_edge": 4 * step}},
        {"patch_size": step},
    )


_PLACED = (
    "gemma4.image_processing_pil_gemma4",
    "Gemma4ImageProcessorPil",
    [(rows * placed.PATCH, columns * placed.PATCH) for rows, columns in placed.IMAGES],
    {
        "patch_size": placed.PATCH,
        "pooling_kernel_size": placed.SIDE,
        "max_soft_tokens": placed.FEWEST,
        # To as many patches as fit, which are many.
        "do_resize": False,
    },
    {},
)
PROCESSORS: dict[str, tuple[Any, ...]] = {
    "llava_next": (
        "llava_next.image_processing_pil_llava_next",
        "LlavaNextImageProcessorPil",
        crops.SIZES[:4],
        {"size": {"shortest_edge": crops.SIDE}, "crop_size": SQUARE, **ANY},
        {},
    ),
    "llava_onevision": (
        "llava_onevision.image_processing_pil_llava_onevision",
        "LlavaOnevisionImageProcessorPil",
        crops.SIZES[:4],
        {"size": SQUARE, **ANY},
        {},
    ),
    "pixtral": _pixtral(8),
    "mistral3": _pixtral(16),
    "mistral_large4": _pixtral(16),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "cosmos3_omni": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": ("glm46v.image_processing_pil_glm46v", "Glm46VImageProcessorPil", *_QWEN[2:]),
    "glm_ocr": _GLM,
    "cohere_compass": (
        "cohere_compass.image_processing_pil_cohere_compass",
        "CohereCompassImageProcessorPil",
        *_QWEN[2:],
    ),
    "internvl": _GOT,
    "aya_vision": _GOT,
    "gemma4": _PLACED,
    "gemma4_small": _PLACED,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
}


@pytest.mark.parametrize("family", [name for name in PROCESSORS if name in ZOO])
def test_processors_make_the_same_inputs(family: str) -> None:
    entry = ZOO[family]
    made = entry.request(entry.build(), [["image"]] * 4).inputs
    expected = processed(family)
    if "tiles" in expected:
        per_row = made["pixel_attention_mask"].amax(dim=(2, 3)).sum(dim=1)
        assert torch.equal(per_row, expected.pop("tiles"))
        made["pixel_values"] = made["pixel_values"][2]  # the row with the most tiles
    for name in ("num_patches", "num_soft_tokens_per_image"):
        expected.pop(name, None)  # which go no further than the processor
    for name, value in expected.items():
        value = torch.as_tensor(value)
        assert made[name].shape == value.shape
        assert "pixel" in name or torch.equal(made[name], value)


@pytest.mark.parametrize("family", WINDOWED)
def test_short_windows_matter(family: str) -> None:
    far, near = ZOO[family], WINDOWED[family]
    model, other = far.build(), near.build()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    req = far.request(model, [["image", "image"]])
    assert float((logits(model, req) - logits(other, req)).abs().max()) > 1e-3
