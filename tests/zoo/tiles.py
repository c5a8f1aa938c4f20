"""Families that cut images into square tiles, and those that take one square an image."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from zoo.base import (
    ALTERNATING,
    END,
    FAR,
    GLOBAL,
    IMAGE,
    NEAR,
    NEWLINE,
    PAD,
    SEPARATOR,
    START,
    TEXT,
    TILES,
    VISION,
    Entry,
    Media,
    Modality,
    Place,
    flat,
    noise,
    one_each,
    ranges,
)
from zoo.mended import runs, with_image_outputs

SIDE, PATCH = 48, 8  # a tile of 6 x 6 patches, 3 x 3 visual tokens once merged
TOKENS = 9
# (rows, columns) of tiles of the images of a batch; (1, 1) is an image that is not cut.
GRIDS = [(1, 2), (1, 1), (2, 2), (3, 1)]
SQUARE = {**VISION, "image_size": SIDE, "patch_size": PATCH}


def internvl() -> Any:
    """InternVL: a CLS token that is dropped, pixel shuffle."""
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def idefics3() -> Any:
    """Idefics3: its own SigLIP, pixel shuffle."""
    config = Idefics3Config(
        vision_config=SQUARE,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return Idefics3ForConditionalGeneration(config)


def smolvlm() -> Any:
    """SmolVLM: as Idefics3."""
    config = SmolVLMConfig(
        vision_config=SQUARE,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return SmolVLMForConditionalGeneration(config)


def aya_vision(window: int = FAR) -> Any:
    """Aya Vision: SigLIP, pixel shuffle, a decoder with sliding windows."""
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config=Cohere2Config(**TEXT, sliding_window=window, layer_types=ALTERNATING),
        image_token_index=IMAGE,
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    return AyaVisionForConditionalGeneration(config)


def llama4(window: int = FAR) -> Any:
    """Llama 4: a CLS token at the end, pixel shuffle inside the tower, chunked attention."""
    vision = {
        **SQUARE,
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    text = {
        **TEXT,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1],
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": window,
        "floor_scale": window,
    }
    config = Llama4Config(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    model = Llama4ForConditionalGeneration(config)
    if runs(model):
        return model
    return with_image_outputs(Llama4ForConditionalGeneration)(config)


def gemma3(window: int = FAR) -> Any:
    """Gemma 3: SigLIP, average pooling, sees an image's tokens both ways, sliding windows."""
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": window}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config={**text, "layer_types": ALTERNATING},
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration(config)


def _paligemma(text: Any) -> Any:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**{**SQUARE, "image_size": 32}, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=TEXT["vocab_size"],
        tie_word_embeddings=False,
    )
    return PaliGemmaForConditionalGeneration(config)


def paligemma() -> Any:
    """PaliGemma: SigLIP, no merging, the whole prompt seen both ways."""
    return _paligemma(GemmaConfig(**TEXT, head_dim=8))


def paligemma2(window: int = FAR) -> Any:
    """PaliGemma 2: the same on Gemma 2, which has sliding windows."""
    more = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": window}
    return _paligemma(Gemma2Config(**TEXT, **more, layer_types=ALTERNATING))


def _grids(rows: list[list[Modality]]) -> list[tuple[int, int]]:
    return [GRIDS[i % len(GRIDS)] for i in range(flat(rows, "image"))]


def _tiles(grid: tuple[int, int]) -> int:
    """Tiles of an image, with the view of the whole that comes with a cut one."""
    return grid[0] * grid[1] + (grid != (1, 1))


def _internvl(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    grids = _grids(rows)
    pieces = [[START, *[IMAGE] * TOKENS * _tiles(grid), END] for grid in grids]
    return Media(_stacked(grids, generator), pieces, ranges("pixel_values", map(_tiles, grids)))


def _aya_vision(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    grids, pieces = _grids(rows), []
    for grid in grids:
        ids = [START]
        for number in range(1, _tiles(grid)):
            ids += [TILES + number, *[IMAGE] * TOKENS]
        pieces.append([*ids, GLOBAL, *[IMAGE] * TOKENS, END])
    return Media(_stacked(grids, generator), pieces, ranges("pixel_values", map(_tiles, grids)))


def _llama4(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    grids, pieces = _grids(rows), []
    for grid in grids:
        ids = [START]
        for _ in range(grid[0] if grid != (1, 1) else 0):
            for column in range(grid[1]):
                ids += [SEPARATOR] * (column > 0) + [IMAGE] * TOKENS
            ids.append(NEWLINE)
        pieces.append([*ids, GLOBAL, *[IMAGE] * TOKENS, END])
    return Media(_stacked(grids, generator), pieces, ranges("pixel_values", map(_tiles, grids)))


def _stacked(grids: list[tuple[int, int]], generator: torch.Generator) -> dict[str, Tensor]:
    """The tiles of all images in one stack; nothing says where an image begins."""
    count = sum(map(_tiles, grids))
    return {"pixel_values": noise(generator, count, 3, SIDE, SIDE)} if count else {}


def _idefics3(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    """Tiles by row of the batch, padded with empty ones."""
    grids, pieces = _grids(rows), []
    for lines, columns in grids:
        ids: list[int] = []
        for line in range(lines if (lines, columns) != (1, 1) else 0):
            for column in range(columns):
                ids += [START, TILES + 6 * line + column, *[IMAGE] * TOKENS]
            ids.append(NEWLINE)
        pieces.append([*ids, START, GLOBAL, *[IMAGE] * TOKENS, START])
    if not grids:
        return Media({}, [], [])
    left = iter(grids)
    tiles = [[_tiles(next(left)) for _ in row] for row in rows]
    counts = [sum(row) for row in tiles]
    pixels = torch.zeros(len(rows), max(counts), 3, SIDE, SIDE)
    mask = torch.zeros(len(rows), max(counts), SIDE, SIDE, dtype=torch.long)
    for one, seen, n in zip(pixels, mask, counts, strict=True):
        one[:n], seen[:n] = noise(generator, n, 3, SIDE, SIDE), 1
    places: list[Place] = [
        (name, (number, where))
        for number, row in enumerate(tiles)
        for name, where in ranges("pixel_values", row)
    ]
    return Media({"pixel_values": pixels, "pixel_attention_mask": mask}, pieces, places)


def _gemma3(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    count = flat(rows, "image")
    pixels = {"pixel_values": noise(generator, count, 3, SIDE, SIDE)} if count else {}
    return Media(
        pixels, [[NEWLINE, START, *[IMAGE] * TOKENS, END, NEWLINE]] * count, one_each(rows)
    )


def _paligemma_media(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    count, side = flat(rows, "image"), model.config.vision_config.image_size
    pixels = {"pixel_values": noise(generator, count, 3, side, side)} if count else {}
    return Media(pixels, [[IMAGE] * (side // PATCH) ** 2] * count, one_each(rows))


FAMILIES: dict[str, Entry] = {
    "internvl": Entry("InternVL", internvl, _internvl),
    "idefics3": Entry("Idefics3", idefics3, _idefics3),
    "smolvlm": Entry("SmolVLM", smolvlm, _idefics3),
    "aya_vision": Entry("Aya Vision", aya_vision, _aya_vision),
    "llama4": Entry("Llama 4", llama4, _llama4),
    "gemma3": Entry(
        "Gemma 3",
        gemma3,
        _gemma3,
        aligned=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "paligemma": Entry(
        "PaliGemma",
        paligemma,
        _paligemma_media,
        aligned=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
        images_first=True,
    ),
    "paligemma2": Entry(
        "PaliGemma 2",
        paligemma2,
        _paligemma_media,
        aligned=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
        images_first=True,
        decoder_attention="eager",
    ),
}

# The families whose decoders look back no further than a window, with one shorter than requests.
# A window counts columns. Pruning takes columns away, so it reaches further back than in a full
# request whose dropped columns are masked: there, pruning does not equal masking.
WINDOWED: dict[str, Entry] = {
    name: replace(FAMILIES[name], make=partial(make, NEAR))
    for name, make in (
        ("aya_vision", aya_vision),
        ("llama4", llama4),
        ("gemma3", gemma3),
        ("paligemma2", paligemma2),
    )
}
