"""The families' own processors, built from their classes: no file of theirs is needed.

The tokenizer knows a few words and the marks that stand for images, under the ids that the zoo's
configs have. An image processor comes from torchvision, most users' default, or from PIL; video
processors there are of torchvision alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from zoo.base import (
    BOS,
    BREAK,
    END,
    EOS,
    GLOBAL,
    IMAGE,
    NEWLINE,
    PAD,
    SEPARATOR,
    START,
    TILES,
    VIDEO,
    WORDS,
)
from zoo.crops import ASPECT, FRAMES, PINPOINTS
from zoo.crops import PATCH as CROP_PATCH
from zoo.crops import SIDE as CROP_SIDE
from zoo.placed import PATCH as PLACED_PATCH
from zoo.placed import SIDE as POOLED
from zoo.qwen import MERGE
from zoo.qwen import PATCH as QWEN_PATCH
from zoo.tiles import PATCH as TILE_PATCH
from zoo.tiles import SIDE as TILE_SIDE
from zoo.tiles import TOKENS

Backend = Literal["pil", "torchvision"]

UNKNOWN, AUDIO, MARK = 59, 50, 51
QUESTION = [f"w{i}" for i in range(40)]


@dataclass(frozen=True)
class Made:
    """How a family's processor is made.

    Attributes:
        processor: its class, as "module.Class" below `transformers.models`.
        images: the image processor's, as "module.Name" without "ImageProcessor".
        settings: of the image processor, for the sizes of the zoo's model.
        marks: by the text of each mark its id.
        mark: what stands for an image in a prompt; {} in it for the text of the prompt.
        named: marks that the tokenizer has by a name.
        more: arguments of the processor.
        videos: the video processor, as `images`; "" without.
        video_settings: its settings.
        video_mark: what stands for a video.
        sounds: the class of its part for sounds; "" without.
        pil: whether there is an image processor of PIL.
        alone: whether the processor's file can be imported without torchvision.
        first: whether all images come before the text.
    """

    processor: str
    images: str
    settings: Mapping[str, Any]
    marks: Mapping[str, int]
    mark: str
    named: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    videos: str = ""
    video_settings: Mapping[str, Any] = field(default_factory=dict)
    video_mark: str = ""
    sounds: str = ""
    pil: bool = True
    alone: bool = True
    first: bool = False

    @property
    def torchvision(self) -> bool:
        """Whether it needs torchvision with PIL's image processor, too."""
        return bool(self.videos) or not self.alone


def _class(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(import_module(f"transformers.models.{module}"), name)


def tokenizer_of(made: Made) -> Any:
    """Words by spaces, and the marks, wherever they stand."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    vocabulary |= dict(made.marks) | {word: WORDS + i for i, word in enumerate(QUESTION)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.add_special_tokens([AddedToken(mark, special=True) for mark in made.marks])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        padding_side="left",
        extra_special_tokens=dict(made.named),
        **names,
    )


def processor_of(family: str, backend: Backend) -> Any:
    """A family's processor.

    Raises:
        ImportError: torchvision is needed and is not there.
    """
    made = MADE[family]
    module, name = made.images.split(".")
    pil = backend == "pil"
    images = _class(
        f"{module}.image_processing_{'pil_' * pil}{module}.{name}ImageProcessor{'Pil' * pil}"
    )(**made.settings)
    if "image_seq_length" in made.settings:
        images.image_seq_length = made.settings["image_seq_length"]
    parts = {"image_processor": images, "tokenizer": tokenizer_of(made)}
    if made.videos:
        module, name = made.videos.split(".")
        cls = _class(f"{module}.video_processing_{module}.{name}VideoProcessor")
        parts["video_processor"] = cls(**made.video_settings)
    if made.sounds:
        parts["feature_extractor"] = _class(made.sounds)()
    return _class(made.processor)(**parts, **made.more)


def served(family: str, backend: str) -> bool:
    """Whether this environment has what the processor is made of; `make test-processors` has.

    Raises:
        RuntimeError: it is that environment, and has not.
    """
    there = find_spec("torchvision") is not None
    if not there and os.environ.get("VLMPRUNE_TEST_TORCHVISION"):
        raise RuntimeError("VLMPRUNE_TEST_TORCHVISION is set, and torchvision is not there.")
    return there or (backend == "pil" and not MADE[family].torchvision)


def inputs_of(processor: Any, made: Mapping[str, Any]) -> dict[str, Tensor]:
    """What goes into the model of what a processor made: no labels, and nothing told beside."""
    left = ("labels", *getattr(processor, "unused_input_names", ()))
    kept = {k: v for k, v in made.items() if k not in left and isinstance(v, Tensor)}
    # Llama 4's makes pixels of half precision.
    return {k: v.float() if v.is_floating_point() else v for k, v in kept.items()}


def question(family: str, row: Sequence[str], number: int) -> str:
    """A prompt with a mark for each image and video of a row, longer from row to row."""
    made = MADE[family]
    marks = {"image": made.mark, "video": made.video_mark}
    shown = [f"{marks[kind]} {QUESTION[i]}" for i, kind in enumerate(row)]
    if made.first:
        shown = [made.mark * len(row)]
    return " ".join([*([] if made.first else QUESTION[20:22]), *shown, *QUESTION[10 : 13 + number]])


_CROP = {
    "size": {"shortest_edge": CROP_SIDE},
    "crop_size": {"height": CROP_SIDE, "width": CROP_SIDE},
}
_SQUARE = {"height": CROP_SIDE, "width": CROP_SIDE}
_TILE = {"height": TILE_SIDE, "width": TILE_SIDE}
_ANY = {"image_grid_pinpoints": PINPOINTS}
_LLAVA: dict[str, Any] = {
    "marks": {"<image>": IMAGE, "<video>": VIDEO},
    "mark": "<image>",
    "more": {"patch_size": CROP_PATCH, "vision_feature_select_strategy": "default"},
}
_CLS = {**_LLAVA["more"], "num_additional_image_tokens": 1}
_FRAMES = {"size": _SQUARE, "do_sample_frames": True, "num_frames": FRAMES}


def _qwen(module: str, name: str, videos: str = "qwen2_vl.Qwen2VL") -> Made:
    size = {"shortest_edge": 64, "longest_edge": 10000}
    sizes = {"patch_size": QWEN_PATCH, "merge_size": MERGE, "size": size}
    vision = "<|vision_start|>", "<|vision_end|>"
    return Made(
        f"{module}.processing_{module}.{name}Processor",
        "qwen2_vl.Qwen2VL",
        sizes,
        {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, vision[0]: START, vision[1]: END},
        f"{vision[0]}<|image_pad|>{vision[1]}",
        videos=videos,
        video_settings={**sizes, "do_sample_frames": True, "num_frames": 4, "fps": None},
        video_mark=f"{vision[0]}<|video_pad|>{vision[1]}",
    )


def _pixtral(step: int, merge: int) -> Made:
    return Made(
        "pixtral.processing_pixtral.PixtralProcessor",
        "pixtral.Pixtral",
        {"size": {"longest_edge": 64}, "patch_size": step * merge},
        {"[IMG]": IMAGE, "[IMG_BREAK]": BREAK, "[IMG_END]": END},
        "[IMG]",
        more={"patch_size": step, "spatial_merge_size": merge},
        alone=False,
    )


_GEMMA = {"<start_of_image>": START, "<image_soft_token>": IMAGE, "<end_of_image>": END}
_GEMMA_NAMES = {
    "boi_token": "<start_of_image>",
    "image_token": "<image_soft_token>",
    "eoi_token": "<end_of_image>",
}
_AUDIO = {"<audio>": AUDIO, "<boa>": AUDIO + 2, "<eoa>": AUDIO + 3}
_AUDIO_NAMES = {"audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"}
_PLACED = {"patch_size": PLACED_PATCH, "pooling_kernel_size": POOLED, "max_soft_tokens": 70}
_GOT = {"size": _TILE, "crop_to_patches": True, "min_patches": 1, "max_patches": 6}
_ROWS = {f"<row_{i + 1}_col_{j + 1}>": TILES + 6 * i + j for i in range(6) for j in range(6)}

MADE: dict[str, Made] = {
    "llava": Made(
        "llava.processing_llava.LlavaProcessor", "clip.CLIP", _CROP, **{**_LLAVA, "more": _CLS}
    ),
    "llava_next": Made(
        "llava_next.processing_llava_next.LlavaNextProcessor",
        "llava_next.LlavaNext",
        {**_CROP, **_ANY},
        **{**_LLAVA, "more": _CLS},
    ),
    "llava_onevision": Made(
        "llava_onevision.processing_llava_onevision.LlavaOnevisionProcessor",
        "llava_onevision.LlavaOnevision",
        {"size": _SQUARE, **_ANY},
        **{
            **_LLAVA,
            "more": {
                "num_image_tokens": (CROP_SIDE // CROP_PATCH) ** 2,
                "vision_feature_select_strategy": "full",
                "vision_aspect_ratio": ASPECT,
            },
        },
        videos="llava_onevision.LlavaOnevision",
        video_settings=_FRAMES,
        video_mark="<video>",
    ),
    "llava_next_video": Made(
        "llava_next_video.processing_llava_next_video.LlavaNextVideoProcessor",
        "llava_next.LlavaNext",
        {**_CROP, **_ANY},
        **{**_LLAVA, "more": _CLS},
        videos="llava_next_video.LlavaNextVideo",
        video_settings={**_FRAMES, "crop_size": _SQUARE},
        video_mark="<video>",
    ),
    "video_llava": Made(
        "video_llava.processing_video_llava.VideoLlavaProcessor",
        "clip.CLIP",
        _CROP,
        **{**_LLAVA, "more": _CLS},
        videos="video_llava.VideoLlava",
        video_settings={**_FRAMES, "crop_size": _SQUARE},
        video_mark="<video>",
    ),
    "pixtral": _pixtral(8, 1),
    "mistral3": _pixtral(8, 2),
    "gemma3": Made(
        "gemma3.processing_gemma3.Gemma3Processor",
        "gemma3.Gemma3",
        {"size": _TILE},
        _GEMMA,
        "<start_of_image>",
        _GEMMA_NAMES,
        {"image_seq_length": TOKENS},
    ),
    "paligemma": Made(
        "paligemma.processing_paligemma.PaliGemmaProcessor",
        "siglip.Siglip",
        {"size": {"height": 32, "width": 32}, "image_seq_length": 16},
        {"<image>": IMAGE},
        "<image>",
        {"image_token": "<image>"},
        first=True,
    ),
    "internvl": Made(
        "internvl.processing_internvl.InternVLProcessor",
        "got_ocr2.GotOcr2",
        _GOT,
        {"<IMG_CONTEXT>": IMAGE, "<img>": START, "</img>": END, "<video>": VIDEO},
        "<IMG_CONTEXT>",
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_seq_length": TOKENS},
        videos="internvl.InternVL",
        video_settings={"size": _TILE, "do_sample_frames": True, "num_frames": FRAMES},
    ),
    "aya_vision": Made(
        "aya_vision.processing_aya_vision.AyaVisionProcessor",
        "got_ocr2.GotOcr2",
        _GOT,
        {
            "<|IMG_PATCH|>": IMAGE,
            "<|START_OF_IMG|>": START,
            "<|END_OF_IMG|>": END,
            "<image>": MARK,
        },
        "<image>",
        more={"patch_size": TILE_PATCH, "img_size": TILE_SIDE, "downsample_factor": 2},
    ),
    "llama4": Made(
        "llama4.processing_llama4.Llama4Processor",
        "llama4.Llama4",
        {"size": _TILE, "max_patches": 6, "resize_to_max_canvas": False},
        {
            "<|patch|>": IMAGE,
            "<|image_start|>": START,
            "<|image_end|>": END,
            "<|image|>": GLOBAL,
            "<|tile_x_separator|>": SEPARATOR,
            "<|tile_y_separator|>": NEWLINE,
        },
        "<|image|>",
        more={"patch_size": TILE_PATCH},
        pil=False,
    ),
    "idefics3": Made(
        "idefics3.processing_idefics3.Idefics3Processor",
        "idefics3.Idefics3",
        {"max_image_size": {"longest_edge": TILE_SIDE}, "size": {"longest_edge": 2 * TILE_SIDE}},
        {"<image>": IMAGE, "<fake_token_around_image>": START, "<global-img>": GLOBAL, **_ROWS},
        "<image>",
        more={"image_seq_len": TOKENS},
    ),
    "qwen2_vl": _qwen("qwen2_vl", "Qwen2VL"),
    "qwen2_5_vl": _qwen("qwen2_5_vl", "Qwen2_5_VL"),
    "qwen3_vl": _qwen("qwen3_vl", "Qwen3VL", "qwen3_vl.Qwen3VL"),
    "gemma4": Made(
        "gemma4.processing_gemma4.Gemma4Processor",
        "gemma4.Gemma4",
        _PLACED,
        {**_GEMMA, **_AUDIO, "<|video|>": VIDEO},
        "<image_soft_token>",
        {**_GEMMA_NAMES, **_AUDIO_NAMES},
        sounds="gemma4.feature_extraction_gemma4.Gemma4AudioFeatureExtractor",
        videos="gemma4.Gemma4",
        video_settings={**_PLACED, "num_frames": 2},
        video_mark="<|video|>",
    ),
}
