"""The table of the families' processors: of which classes each is made, and with what settings.

`family_processors` makes them. Sizes are those of the zoo's models, and marks have the ids of its
configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo import gemma3n
from zoo.base import (
    BREAK,
    END,
    GLOBAL,
    IMAGE,
    NEWLINE,
    SEPARATOR,
    START,
    TILES,
    VIDEO,
)
from zoo.crops import ASPECT, FRAMES, PINPOINTS
from zoo.crops import PATCH as CROP_PATCH
from zoo.crops import SIDE as CROP_SIDE
from zoo.glm4v import VIDEO_END, VIDEO_START
from zoo.placed import PATCH as PLACED_PATCH
from zoo.placed import SIDE as POOLED
from zoo.qwen import MERGE
from zoo.qwen import PATCH as QWEN_PATCH
from zoo.tiles import PATCH as TILE_PATCH
from zoo.tiles import SIDE as TILE_SIDE
from zoo.tiles import TOKENS

AUDIO, MARK = 50, 51
# Pixels of a side: of a patch of the zoo's Gemma 4 unified, and of the images of its Gemma 3n.
UNIFIED_PATCH = 2
GEMMA3N_SIDE = gemma3n.STRIDE * int(gemma3n.TOKENS**0.5)


@dataclass(frozen=True)
class Made:
    """How a family's processor is made.

    Attributes:
        processor: its class, as "module.Class" below `transformers.models`.
        images: the image processor's, as "module.Name" without "ImageProcessor".
        settings: of the image processor, for the sizes of the zoo's model.
        marks: by the text of each mark its id.
        mark: what stands for an image in a prompt.
        named: marks that the tokenizer has by a name.
        more: arguments of the processor.
        videos: the video processor, as `images`; "" without.
        video_settings: its settings.
        video_mark: what stands for a video.
        sounds: the class of its part for sounds; "" without.
        pil: whether there is an image processor of PIL.
        alone: whether the processor's file can be imported without torchvision.
        first: whether all images come before the text.
        apart: whether images and videos cannot stand in one request.
        frames: whether a video's frames are told as images.
        packages: what must be installed beside.
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
    apart: bool = False
    frames: bool = False
    packages: tuple[str, ...] = ()

    @property
    def torchvision(self) -> bool:
        """Whether it needs torchvision with PIL's image processor, too."""
        return bool(self.videos) or not self.alone


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


_SIZES = {
    "patch_size": QWEN_PATCH,
    "merge_size": MERGE,
    "size": {"shortest_edge": 64, "longest_edge": 4000},
}


def _qwen(module: str, name: str, images: str = "", videos: str = "") -> Made:
    """Qwen's, and Cohere's, which writes its marks large."""
    marks = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    if module == "cohere_compass":
        marks = [f"<|{mark.strip('<|>').upper()}|>" for mark in marks]
    start, image, video, end = marks
    return Made(
        f"{module}.processing_{module}.{name}Processor",
        images or "qwen2_vl.Qwen2VL",
        _SIZES,
        {image: IMAGE, video: VIDEO, start: START, end: END},
        f"{start}{image}{end}",
        videos=videos or "qwen2_vl.Qwen2VL",
        video_settings={**_SIZES, "do_sample_frames": True, "num_frames": 4, "fps": None},
        video_mark=f"{start}{video}{end}",
    )


def _glm(module: str, name: str) -> Made:
    marks = {"<|image|>": IMAGE, "<|begin_of_image|>": START, "<|end_of_image|>": END}
    films = {"<|begin_of_video|>": VIDEO_START, "<|video|>": VIDEO, "<|end_of_video|>": VIDEO_END}
    return Made(
        f"{module}.processing_{module}.{name}Processor",
        f"{module}.{name}",
        _SIZES,
        marks | films,
        "<|begin_of_image|><|image|><|end_of_image|>",
        videos=f"{module}.{name}",
        # The frames of a second; GLM-4.6V has a rule of its own for them.
        video_settings={**_SIZES, "do_sample_frames": True, "fps": 6},
        video_mark="".join(films),
        apart=True,
    )


def _idefics(module: str, name: str, **more: Any) -> Made:
    return Made(
        f"{module}.processing_{module}.{name}Processor",
        f"{module}.{name}",
        {"max_image_size": {"longest_edge": TILE_SIDE}, "size": {"longest_edge": 2 * TILE_SIDE}},
        {
            "<image>": IMAGE,
            "<video>": VIDEO,
            "<fake_token_around_image>": START,
            "<global-img>": GLOBAL,
            **_ROWS,
        },
        "<image>",
        more={"image_seq_len": TOKENS},
        **more,
    )


def _gemma4(module: str, name: str, patch: int, pil: bool) -> Made:
    sizes = {"patch_size": patch, "pooling_kernel_size": POOLED, "max_soft_tokens": 70}
    return Made(
        f"{module}.processing_{module}.{name}Processor",
        f"{module}.{name}",
        sizes,
        {**_GEMMA, **_AUDIO, "<|video|>": VIDEO},
        "<image_soft_token>",
        {**_GEMMA_NAMES, **_AUDIO_NAMES},
        sounds=f"{module}.feature_extraction_{module}.{name}AudioFeatureExtractor",
        videos=f"{module}.{name}",
        video_settings={**sizes, "num_frames": 2},
        video_mark="<|video|>",
        pil=pil,
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
_COMPASS = "cohere_compass.CohereCompass"
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
        video_mark="<video>",
        frames=True,
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
    "idefics3": _idefics("idefics3", "Idefics3"),
    "smolvlm": _idefics(
        "smolvlm",
        "SmolVLM",
        videos="smolvlm.SmolVLM",
        video_settings={
            "max_image_size": {"longest_edge": TILE_SIDE},
            "size": {"longest_edge": 2 * TILE_SIDE},
            "do_sample_frames": True,
            "num_frames": FRAMES,
            "fps": FRAMES,
        },
        video_mark="<video>",
        apart=True,
        frames=True,
        packages=("num2words",),
    ),
    "qwen2_vl": _qwen("qwen2_vl", "Qwen2VL"),
    "qwen2_5_vl": _qwen("qwen2_5_vl", "Qwen2_5_VL"),
    "qwen3_vl": _qwen("qwen3_vl", "Qwen3VL", videos="qwen3_vl.Qwen3VL"),
    "cohere_compass": _qwen("cohere_compass", "CohereCompass", _COMPASS, _COMPASS),
    "glm4v": _glm("glm4v", "Glm4v"),
    "glm46v": _glm("glm46v", "Glm46V"),
    "gemma4": _gemma4("gemma4", "Gemma4", PLACED_PATCH, True),
    "gemma4_unified": _gemma4("gemma4_unified", "Gemma4Unified", UNIFIED_PATCH, False),
    "gemma3n": Made(
        "gemma3n.processing_gemma3n.Gemma3nProcessor",
        "siglip.Siglip",
        {"size": {"height": GEMMA3N_SIDE, "width": GEMMA3N_SIDE}},
        {**_GEMMA, **_AUDIO},
        "<image_soft_token>",
        {**_GEMMA_NAMES, **_AUDIO_NAMES},
        {"image_seq_length": gemma3n.TOKENS},
        sounds="gemma3n.feature_extraction_gemma3n.Gemma3nAudioFeatureExtractor",
    ),
}

# Models that share a processor's class with one above: as the release's mapping of processors has
# it or, for Cosmos 3 Omni and GLM-OCR, which stand in none, the example in the model's own file.
SHARED: dict[str, str] = {
    "cosmos3_omni": "qwen3_vl",
    "gemma4_small": "gemma4",
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm4v",
    "mistral_large4": "mistral3",
    "paligemma2": "paligemma",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_moe": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
}
MADE |= {name: MADE[other] for name, other in SHARED.items()}

# Models whose processor cannot be built from its classes, and why.
ABSENT: dict[str, str] = {}
